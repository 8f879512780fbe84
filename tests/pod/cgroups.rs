//! Containers' cgroups: those they make themselves, and what is set by its name in version 2.

use std::collections::BTreeMap;

use protocol::agent::messages::{
    GetOomEventRequest, OomEvent, ReadStreamRequest, ReadStreamResponse,
};
use protocol::agent::oci::{LinuxMemory, LinuxResources, Spec};
use tests::pod::{Agent, refusal, spec};

/// One that may change its cgroup.
fn manager(script: &str) -> Spec {
    let mut spec = spec(script);
    for mount in &mut spec.mounts {
        if mount.r#type == "cgroup" {
            mount.options.retain(|option| option != "ro");
        }
    }
    spec
}

/// If a container divides its cgroup, as systemd does, a new process joins it in the cgroup of its
/// first process.
pub(crate) fn a_new_process_joins_a_divided_cgroup(agent: &Agent) {
    let script = "cd /sys/fs/cgroup; mkdir init init/deep other; echo 1 >init/cgroup.procs
        echo +memory >cgroup.subtree_control; cat cgroup.subtree_control; exec sleep 1000";
    agent.create("divided", manager(script)).unwrap();
    agent.start("divided").unwrap();
    let request = ReadStreamRequest {
        container_id: "divided".into(),
        exec_id: String::new(),
        len: 99,
    };
    let read: ReadStreamResponse = agent.ask("ReadStdout", &request).unwrap();
    assert_eq!(read.data, b"memory\n");
    let (out, status) = agent.exec_shell("divided", "cat /proc/self/cgroup /proc/1/cgroup");
    assert_eq!((out.as_str(), status), ("0::/init\n0::/init\n", 0));
    agent.remove("divided");

    let mut all = spec("ls /sys/fs/cgroup/k8s.io/pod | grep divided");
    let namespaces = &mut all.linux.as_mut().unwrap().namespaces;
    namespaces.retain(|namespace| namespace.r#type != "cgroup");
    let (out, err, status) = agent.run("all", all);
    assert_eq!((out.as_str(), status), ("", 1), "{err}");
}

fn unified(entries: &[(&str, &str)]) -> LinuxResources {
    let entries = entries.iter();
    let unified: BTreeMap<_, _> = entries
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    LinuxResources {
        unified,
        ..LinuxResources::default()
    }
}

/// A container is killed as a whole where that is asked for.
pub(crate) fn a_cgroup_is_killed_as_one(agent: &Agent) {
    let script = "cat /sys/fs/cgroup/memory.oom.group /sys/fs/cgroup/memory.low
        dd if=/dev/zero of=/dev/null bs=32M count=1; echo survived";
    let mut group = spec(script);
    group.linux.as_mut().unwrap().resources = Some(LinuxResources {
        memory: Some(LinuxMemory {
            limit: 64 << 20,
            reservation: 1 << 20,
            ..LinuxMemory::default()
        }),
        ..unified(&[
            ("memory.oom.group", "1"),
            // It has the last word.
            ("memory.low", "4194304"),
            ("memory.max", "16777216"),
            ("memory.swap.max", "0"),
        ])
    });
    agent.create("group", group).unwrap();
    agent.start("group").unwrap();
    let (_, out, status) = agent.outcome("group", "");
    assert_eq!((out.as_str(), status), ("1\n4194304\n", 137));
    let oom: OomEvent = agent.ask("GetOOMEvent", &GetOomEventRequest {}).unwrap();
    assert_eq!(oom.container_id, "group");
    agent.remove("group");

    agent.create("unified", spec("exec sleep 1000")).unwrap();
    agent.start("unified").unwrap();
    agent
        .update("unified", unified(&[("memory.high", "8388608")]))
        .unwrap();
    let (out, _) = agent.exec_shell("unified", "cat /sys/fs/cgroup/memory.high");
    assert_eq!(out, "8388608\n");
    for key in [
        "memory.no-such-limit",
        "../unified/memory.max",
        "cgroup.procs",
    ] {
        let (_, why) = refusal(agent.update("unified", unified(&[(key, "1")])));
        assert!(why.contains(key), "{why}");
    }
    agent.remove("unified");
}
