//! Containers are kept apart: from the agent, from what it has of others, and from processes on their way into them.

use protocol::agent::oci::{LinuxCapabilities, Process, Spec};
use tests::pod::{Agent, mount, refusal, shell, spec, strings};

/// What containerd gives a container.
const USUAL: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What else one may be given that is not privileged. All there are but CAP_SYS_ADMIN, and CAP_DAC_READ_SEARCH, with
/// which a container finds files by their numbers in the file system that its root is in, as with runc.
const MORE: [&str; 15] = [
    "CAP_BPF",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_ADMIN",
    "CAP_PERFMON",
    "CAP_SYSLOG",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TTY_CONFIG",
];

fn with_rights(names: &[&str], mut process: Process) -> Process {
    let names = strings(names);
    process.capabilities = Some(LinuxCapabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..LinuxCapabilities::default()
    });
    process.no_new_privileges = false;
    process
}

fn container(names: &[&str], script: &str) -> Spec {
    let mut container = spec(script);
    container.process = Some(with_rights(names, shell(script)));
    container
}

/// Neither the agent nor another container, by numbers, paths, mounts, switches of the kernel's and ports.
pub(crate) fn a_container_reaches_nothing_but_itself(agent: &Agent) {
    let mut neighbour = container(&USUAL, "echo private >/private/note; exec sleep 1000");
    neighbour
        .mounts
        .push(mount("tmpfs", "/private", &["mode=700"]));
    agent.create("neighbour", neighbour).unwrap();
    agent.start("neighbour").unwrap();
    let all = [&USUAL[..], &MORE].concat();
    for (id, names) in [("usual", &USUAL[..]), ("many", &all)] {
        let script = "guest_load reach 1024; cat /private/note; true";
        let (out, err, status) = agent.run(id, container(names, script));
        assert_eq!((out.as_str(), status), ("", 0), "{id}: {err}");
        assert!(err.contains("/private/note"), "{err}");
    }
    agent.remove("neighbour");
}

/// A process that is started in a container comes from the agent. A process that watches for it there gets
/// nothing of it before it has its program.
pub(crate) fn a_process_on_its_way_is_out_of_reach(agent: &Agent) {
    let states = "grep -E '^Cap(Eff|Bnd)' /proc/self/status";
    let got = watched(agent, "coming", || {
        let (out, err, status) = run_in(agent, "coming", shell(states));
        // Those of [`USUAL`], as containerd's: it takes the steps that the first process took.
        let expected = "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n";
        assert_eq!((out.as_str(), status), (expected, 0), "{err}");
    });
    assert_eq!(got, [""; 0]);
}

/// An image may name as its program the one that its process is before: the agent's. It is the container's own
/// then, but no process there may write to it (the class of CVE-2019-5736).
pub(crate) fn the_agents_program_is_not_written_to(agent: &Agent) {
    let got = watched(agent, "writing", || {
        let mut process = shell("");
        process.args = strings(&["/proc/self/exe"]);
        let (_, err, status) = run_in(agent, "writing", process);
        assert_ne!(status, 0, "{err}");
    });
    let written = got.iter().find(|line| line.contains("write"));
    assert_eq!(written, None);
}

fn run_in(agent: &Agent, id: &str, process: Process) -> (String, String, i32) {
    let process = with_rights(&USUAL, process);
    agent.exec(id, "within", process).unwrap();
    let (err, out, status) = agent.outcome(id, "within");
    (out, err, status)
}

/// What a container gets that watches while something is done in it, three times.
fn watched(agent: &Agent, id: &str, done: impl Fn()) -> Vec<String> {
    let watch = "rm -f /tmp/stop; exec guest_load watch /bin /tmp/stop";
    agent.create(id, container(&USUAL, watch)).unwrap();
    agent.start(id).unwrap();
    (0..3).for_each(|_| done());
    // The watcher, which is the first process of its namespace, may be gone before this one is, and take it along.
    let (said, status) = agent.exec_shell(id, "touch /tmp/stop");
    assert!(status == 0 || status == 137, "{status}: {said}");
    let (err, out, status) = agent.outcome(id, id);
    assert_eq!(status, 0, "{id}: {out}{err}");
    agent.remove(id);
    let mut lines = out.lines().map(String::from);
    assert_eq!(lines.next().as_deref(), Some("watching"));
    lines.collect()
}

/// A program has three descriptors, and none of the agent's leads it, or its working folder, elsewhere
/// (the class of CVE-2024-21626).
pub(crate) fn a_program_has_its_streams_and_no_other_descriptor(agent: &Agent) {
    // The last is that of the folder which is listed.
    let list = "ls /proc/self/fd | tr '\n' ' '";
    let (out, err, status) = agent.run("descriptors", spec(list));
    assert_eq!((out.as_str(), status), ("0 1 2 3 ", 0), "{err}");
    agent.create("folders", spec("exec sleep 1000")).unwrap();
    agent.start("folders").unwrap();
    assert_eq!(agent.exec_shell("folders", list), ("0 1 2 3 ".into(), 0));
    for number in 3..10 {
        let mut process = shell("pwd; ls ..");
        process.cwd = format!("/proc/self/fd/{number}");
        let (_, why) = refusal(agent.exec("folders", &process.cwd.clone(), process));
        assert!(why.starts_with("/proc/self/fd/"), "{why}");
    }
    agent.remove("folders");
}
