//! What a container has in its file system, and what it leaves on the host.

use std::fs;
use std::path::Path;

use protocol::agent::messages::{ReadStreamRequest, ReadStreamResponse};
use tests::pod::{Agent, spec};

/// Its processes, host name, mounts, cgroup and devices are its own; what is to be read-only is.
pub(crate) fn a_container_sees_what_its_specification_says(agent: &Agent, host: &Path) {
    let script = "echo $$ $COLOUR $HOME; hostname; readlink /proc/self/cwd; cat /etc/greeting
        touch /made; touch /etc/greeting 2>/dev/null && echo wrote
        cat /proc/self/cgroup; ls -A /sys/firmware | wc -l; ls /dev | wc -l
        echo 1 2>/dev/null >/proc/sys/kernel/printk && echo wrote
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start; set -- /proc/[0-9]*; echo $#
        cd /proc/1/root; cat etc/greeting; ls /proc/self/fd | tr '\\n' ' '; exit 3";
    let (out, err, status) = agent.run("sees", spec(script));
    let seen: Vec<_> = out.lines().collect();
    let expected = [
        "1 green /",
        "a-pod",
        "/tmp",
        "hello",
        "0::/",
        "0",
        "12",
        "7",
        "1",
        "hello",
        // The last one is the folder's own.
        "0 1 2 3 ",
    ];
    assert_eq!((seen, status), (expected.to_vec(), 3), "{err}");
    assert!(host.join("one/rootfs/made").exists());

    let mut readonly = spec("touch /more; touch /tmp/more");
    readonly.root.as_mut().expect("spec() has it").readonly = true;
    let (_, err, status) = agent.run("readonly", readonly);
    assert_eq!(status, 1);
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
}

/// What a container wrote to a mapping is on the host once it is removed, though it was killed.
pub(crate) fn what_a_killed_container_mapped_is_on_the_host(agent: &Agent, host: &Path) {
    agent
        .create("maps", spec("exec guest_load map /mapped"))
        .unwrap();
    agent.start("maps").unwrap();
    let request = ReadStreamRequest {
        container_id: "maps".into(),
        exec_id: "maps".into(),
        len: 7,
    };
    let said: ReadStreamResponse = agent.ask("ReadStdout", &request).unwrap();
    assert_eq!(said.data, b"mapped\n");
    agent.signal("maps", "maps", 9);
    agent.remove("maps");
    let written = fs::read(host.join("one/rootfs/mapped")).unwrap();
    assert_eq!(written[..6], *b"mapped");
}
