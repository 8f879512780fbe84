//! Containers' cgroups, and those that containers make themselves.

use agent::protocol::agent::{ReadStreamRequest, ReadStreamResponse};
use agent::protocol::oci::Spec;
use tests::pod::{Agent, spec};

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

/// Whoever divides its cgroup, as systemd does, is joined where its first process is.
pub(crate) fn divided(agent: &Agent) {
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
