//! What each kind of thread is refused. Each attempt is made by a process of its own, this program once more,
//! for it ends there.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

const KINDS: [(&str, Kind); 12] = [
    ("control", Kind::Control),
    ("api", Kind::Api),
    ("snapshot", Kind::Snapshot),
    ("vcpu", Kind::Vcpu),
    ("io", Kind::Io),
    ("disk", Kind::Disk),
    ("files", Kind::Files),
    ("memory", Kind::Memory),
    ("pages", Kind::Pages),
    ("console", Kind::Console),
    ("signals", Kind::Signals),
    ("page-server", Kind::PageServer),
];

/// A call and its first arguments, with which it would fail if it were allowed.
type Call = (&'static str, [libc::c_long; 3]);

/// What no thread may do.
const NEVER: [Call; 22] = [
    ("execve", [0, 0, 0]),
    ("execveat", [-1, 0, 0]),
    ("fork", [0, 0, 0]),
    ("vfork", [0, 0, 0]),
    // Without CLONE_THREAD: a process.
    ("clone", [libc::SIGCHLD as _, 0, 0]),
    ("ptrace", [libc::PTRACE_ATTACH as _, 1, 0]),
    ("process_vm_readv", [1, 0, 0]),
    ("process_vm_writev", [1, 0, 0]),
    ("kill", [1, 0, 0]),
    ("socket", [libc::AF_INET as _, libc::SOCK_STREAM as _, 0]),
    ("socket", [libc::AF_NETLINK as _, libc::SOCK_RAW as _, 0]),
    ("mount", [0, 0, 0]),
    ("umount2", [0, 0, 0]),
    ("setns", [-1, 0, 0]),
    ("unshare", [libc::CLONE_NEWUSER as _, 0, 0]),
    ("init_module", [0, 0, 0]),
    ("bpf", [0, 0, 0]),
    ("io_uring_setup", [1, 0, 0]),
    ("perf_event_open", [0, 0, 0]),
    ("open_by_handle_at", [-1, 0, 0]),
    // PROT_READ | PROT_EXEC.
    ("mprotect", [0, 4096, 5]),
    // TIOCSTI: types on the terminal.
    ("ioctl", [0, 0x5412, 0]),
];

/// What none may do but those that open files.
const OPENERS: [&str; 3] = ["control", "snapshot", "files"];
const FILES: [Call; 4] = [
    ("openat", [libc::AT_FDCWD as _, 0, 0]),
    ("open", [0, 0, 0]),
    ("mkdirat", [libc::AT_FDCWD as _, 0, 0]),
    ("linkat", [libc::AT_FDCWD as _, 0, libc::AT_FDCWD as _]),
];

/// Names the kind and the call of a process that is to make it.
const ATTEMPT: &str = "PODVMM_TEST_ATTEMPT";

/// Makes the call that the environment names, if it names one: the tests below run this in other processes.
#[test]
fn attempt() {
    let Ok(what) = std::env::var(ATTEMPT) else {
        return;
    };
    let words: Vec<_> = what.split(' ').collect();
    let [kind, call, arguments @ ..] = &words[..] else {
        panic!("{what}")
    };
    let (_, kind) = KINDS.iter().find(|(name, _)| name == kind).unwrap();
    let call: syscalls::Sysno = call.parse().unwrap();
    let arguments: Vec<libc::c_long> = arguments.iter().map(|word| word.parse().unwrap()).collect();
    let first = match kind {
        Kind::PageServer => Kind::PageServer,
        _ => Kind::Control,
    };
    filter(first, Enforcement::On, None).unwrap();
    let attempt = move || {
        // SAFETY: it is refused, or fails for its arguments: none of them is the address of anything.
        unsafe {
            libc::syscall(
                call.id().into(),
                arguments[0],
                arguments[1],
                arguments[2],
                0,
                0,
            )
        }
    };
    let builder = Builder::new().name("the-thread".into());
    let _ = kind.spawn(builder, attempt).unwrap().join();
    // SAFETY: it ends the process without running what a filter may refuse.
    unsafe { libc::_exit(0) };
}

/// The exit code, and what was said, of a process that makes the call in a thread of the kind.
fn outcome(kind: &str, (call, arguments): Call) -> (Option<i32>, String) {
    let arguments = arguments.map(|argument| argument.to_string()).join(" ");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "host::thread::tests::attempt", "--nocapture"])
        .env(ATTEMPT, format!("{kind} {call} {arguments}"))
        .output()
        .unwrap();
    let status = output.status;
    assert_eq!(status.signal(), None, "{kind} {call}: {status}");
    (
        status.code(),
        String::from_utf8_lossy(&output.stderr).into(),
    )
}

fn is_refused(kind: &str, call: Call) {
    let (code, said) = outcome(kind, call);
    assert_eq!(code, Some(118), "{kind}: {call:?} is allowed: {said}");
    let line = format!(
        "podvmm: thread the-thread made the system call {} (",
        call.0
    );
    assert!(said.contains(&line), "{kind}: {call:?}: {said}");
}

#[test]
fn no_thread_reaches_another_process_or_the_kernels_own() {
    for (kind, _) in KINDS {
        for call in NEVER {
            is_refused(kind, call);
        }
    }
}

#[test]
fn threads_that_serve_no_files_open_none() {
    for (kind, _) in KINDS {
        for call in FILES {
            if !OPENERS.contains(&kind) {
                is_refused(kind, call);
            }
        }
    }
}

#[test]
fn what_a_thread_needs_is_allowed() {
    let read = ("read", [-1, 0, 0]);
    for kind in ["control", "api", "vcpu", "io", "disk", "files", "memory"] {
        assert_eq!(outcome(kind, read).0, Some(0), "{kind}");
    }
    // A share asks how many files it may have open (getrlimit), and sets no limit.
    let limit = libc::c_long::from(libc::RLIMIT_NOFILE);
    assert_eq!(outcome("control", ("prlimit64", [0, limit, 0])).0, Some(0));
    is_refused("control", ("prlimit64", [0, limit, 1]));
    // The C library is told that it is not there, and does without.
    assert_eq!(outcome("control", ("clone3", [0, 0, 0])).0, Some(0));
}

#[test]
fn a_violation_that_is_only_logged_is_allowed() {
    let logs = |program: &[sock_filter]| {
        let returns = program.iter().filter(|it| it.code == RETURN);
        returns.map(|it| it.k).collect::<Vec<_>>()
    };
    for (name, kind) in KINDS {
        assert!(
            logs(kind.program()).contains(&libc::SECCOMP_RET_TRAP),
            "{name}"
        );
        let logged = logs(&logged(kind.program()));
        assert!(logged.contains(&libc::SECCOMP_RET_LOG), "{name}");
        assert!(!logged.contains(&libc::SECCOMP_RET_TRAP), "{name}");
    }
}
