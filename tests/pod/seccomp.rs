//! The system calls that a container's filter allows.

use protocol::agent::oci::{LinuxSeccomp, LinuxSyscall};
use tests::pod::{Agent, spec, strings};

fn syscalls(names: &[&str], action: &str, errno_ret: Option<u32>) -> LinuxSyscall {
    LinuxSyscall {
        names: strings(names),
        action: action.into(),
        errno_ret,
        args: Vec::new(),
    }
}

/// A filter of some calls holds while it is loaded with rights, and one of nearly all where it is loaded last.
pub(crate) fn a_process_may_call_what_its_filter_allows(agent: &Agent) {
    // All but some, and without no-new-privileges.
    const FULL: u32 = 28;
    let mut held = spec("exec sleep 1000");
    held.linux.as_mut().unwrap().seccomp = Some(LinuxSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        flags: strings(&["SECCOMP_FILTER_FLAG_LOG"]),
        syscalls: vec![
            syscalls(&["mkdir", "mkdirat"], "SCMP_ACT_ERRNO", Some(FULL)),
            syscalls(
                &["chmod", "fchmodat", "fchmodat2", "no_such_call"],
                "SCMP_ACT_ERRNO",
                None,
            ),
            syscalls(&["sethostname"], "SCMP_ACT_KILL_PROCESS", None),
        ],
        ..LinuxSeccomp::default()
    });
    held.process.as_mut().unwrap().no_new_privileges = false;
    agent.create("held", held).unwrap();
    agent.start("held").unwrap();
    let script =
        "mkdir /tmp/new; chmod 700 /tmp; hostname other; echo $?; grep Seccomp: /proc/self/status";
    let (out, status) = agent.exec_shell("held", script);
    assert!(out.contains("No space left on device"), "{out}");
    assert!(out.contains("Operation not permitted"), "{out}");
    // 128 + SIGSYS
    assert!(
        out.contains("159\n") && out.contains("Seccomp:\t2"),
        "{out}"
    );
    assert_eq!(status, 0);
    agent.remove("held");

    // None but some, loaded last.
    let allowed = [
        "read",
        "write",
        "close",
        "stat",
        "fstat",
        "lstat",
        "newfstatat",
        "mmap",
        "mprotect",
        "munmap",
        "brk",
        "rt_sigaction",
        "rt_sigprocmask",
        "ioctl",
        "pread64",
        "execve",
        "exit",
        "exit_group",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "getpid",
        "getppid",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "fcntl",
        "getcwd",
        "open",
        "openat",
        "sigaltstack",
        "poll",
        "uname",
        "prctl",
    ];
    let mut few = spec("echo fine; touch /tmp/there; mkdir /tmp/new || echo refused");
    few.linux.as_mut().unwrap().seccomp = Some(LinuxSeccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        architectures: strings(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        syscalls: vec![syscalls(&allowed, "SCMP_ACT_ALLOW", None)],
        ..LinuxSeccomp::default()
    });
    let (out, err, _) = agent.run("few", few);
    // Not even a child may be had for touch and mkdir.
    assert_eq!(out, "fine\n", "{err}");
    assert!(err.contains("fork: Operation not permitted"), "{err}");
}
