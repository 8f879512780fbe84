use super::*;
use crate::poll;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::dumpable_behavior;
use std::time::Duration;

/// Until it has its program, the process holds the agent's memory and descriptors. The container that
/// it enters may have processes that look for such: they may not trace it, nor open what /proc has of it
/// (ptrace(2), "Ptrace access mode checking"; the class of CVE-2016-9962).
#[test]
fn a_process_is_closed_to_the_container_before_it_enters() {
    const WITHIN: &str = "PODVMM_TEST_STAGE";
    const NAME: &str = "container::stage::tests::\
        a_process_is_closed_to_the_container_before_it_enters";
    if std::env::var_os(WITHIN).is_none() {
        // It is all of a process that is closed, so it is done in one of its own.
        let mut within = Command::new(std::env::current_exe().unwrap());
        within.args(["--exact", NAME, "--nocapture"]);
        let output = within.env(WITHIN, "yes").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    assert_eq!(dumpable_behavior(), Ok(DumpableBehavior::Dumpable));
    let flags = SocketFlags::CLOEXEC;
    let channel = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (agents, channel) = channel.unwrap();
    let nothing = || File::open("/dev/null").unwrap();
    // No order ever comes, so it stays before the first step.
    std::mem::forget(agents);
    std::thread::spawn(move || Stage::new(channel, nothing(), nothing().into()).pass());
    let is_closed = || dumpable_behavior() == Ok(DumpableBehavior::NotDumpable);
    let closed = poll::until(Duration::from_secs(10), || is_closed().then_some(()));
    assert_eq!(closed, Some(()), "it waits, and can be traced");
}

/// A wrong order would open a container, or fail where runc does not.
#[test]
fn steps_that_need_others_come_after_them() {
    let at = |name: &str| {
        let found = STEPS.iter().position(|step| step.name == name);
        found.unwrap_or_else(|| panic!("{name}"))
    };
    assert_eq!(at("close to tracing"), 0);
    assert_eq!(at("join the cgroup"), 1);
    assert_eq!(at("become the program"), STEPS.len() - 1);
    for (early, late) in [
        ("set the oom score", "enter the container"),
        ("enter the pod's pids", "mount the root"),
        ("enter the container", "leave the namespaces' descriptor"),
        ("set sysctls", "mount the root"),
        ("enter a cgroup namespace", "mount the root"),
        ("part the mounts", "mount the root"),
        ("enter the root", "mask paths"),
        ("enter the root", "make paths read-only"),
        ("make the working folder", "make the root read-only"),
        ("make the root read-only", "await the order to start"),
        (
            "await the order to start",
            "load the seccomp filter with rights",
        ),
        ("close descriptors", "load the seccomp filter with rights"),
        (
            "load the seccomp filter with rights",
            "bound the capabilities",
        ),
        ("set limits", "set the capabilities"),
        ("bound the capabilities", "become the user"),
        ("become the user", "set the capabilities"),
        ("set the capabilities", "forbid new privileges"),
        ("forbid new privileges", "load the seccomp filter"),
    ] {
        assert!(at(early) < at(late), "{early} after {late}");
    }
}

/// What holds a process holds those that are started in the container later.
#[test]
fn later_processes_take_every_step_that_holds_the_first() {
    let of = |wanted: Of| {
        let steps = STEPS.iter().filter(move |step| step.of == wanted);
        steps.map(|step| step.name).collect::<Vec<_>>()
    };
    // They make what the others enter.
    let made = [
        "enter the pod's pids",
        "set sysctls",
        "enter a cgroup namespace",
        "part the mounts",
        "mount the root",
        "enter the root",
        "mask paths",
        "make paths read-only",
        "make the working folder",
        "make the root read-only",
        "find the program",
    ];
    assert_eq!(of(Of::First), made);
    assert_eq!(of(Of::Later), ["enter the container"]);
}

#[test]
fn a_bare_error_is_told_with_its_step() {
    let step = step(Of::All, "become the user", become_user);
    let bare: Error = Errno::PERM.into();
    assert!(step.describe(&*bare).starts_with("become the user: "));
    assert_eq!(step.describe(&*Error::from("/x: gone")), "/x: gone");
}
