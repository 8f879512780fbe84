//! Who a pod is: host name, hosts file, DNS, environment, namespaces.

use std::fs;

use tests::cri::config::{ContainerConfig, DnsConfig, KeyValue, NamespaceMode, PodSandboxConfig};
use tests::node::{self, Node, Pod, step};

pub(crate) fn prepare(config: &mut PodSandboxConfig) {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    config.hostname = "web-0".to_owned();
    config.dns_config = Some(DnsConfig {
        servers: words(&["198.51.100.53"]),
        searches: words(&["default.svc.cluster.local", "svc.cluster.local"]),
        options: words(&["ndots:5"]),
    });
    let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
    sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "77".into());
    sysctls.insert("net.ipv4.ping_group_range".into(), "0 2000".into());
}

/// A container that prints to both streams, with an environment, and with the node's hosts file.
pub(crate) fn container(node: &Node) -> ContainerConfig {
    let hosts = node.folder().join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.7 registry.example\n").unwrap();
    let mut config = node::container(
        "one",
        &[
            "sh",
            "-c",
            "echo out of $COLOUR; echo err >&2; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
        ],
    );
    config.working_dir = "/tmp".to_owned();
    config.envs.push(KeyValue {
        key: "COLOUR".into(),
        value: "green paint".into(),
    });
    config.mounts.push(node::mount(&hosts, "/etc/hosts"));
    config
}

pub(crate) fn seen(node: &Node, one: &str, two: &str) {
    const FIRST: &str = "cat /proc/1/cmdline";
    const SHARED: &str = "for kind in ipc net; do readlink /proc/self/ns/$kind; done";
    const APART: &str = "readlink /proc/self/ns/pid";
    let [who, hosts, of_one, shared, apart, _] = node.sh_each(
        one,
        [
            "hostname; echo $COLOUR; pwd",
            "cat /etc/hosts",
            FIRST,
            SHARED,
            APART,
            "echo from one > /dev/shm/note",
        ],
    );
    assert_eq!(who, "web-0\ngreen paint\n/tmp");
    assert!(hosts.contains("192.0.2.7 registry.example"), "{hosts}");
    let [name, dns, sysctls, of_two, also_shared, also_apart, note] = node.sh_each(
        two,
        [
            "cat /etc/hostname",
            "cat /etc/resolv.conf",
            "cd /proc/sys; cat kernel/shm_rmid_forced net/ipv4/ip_unprivileged_port_start \
             net/ipv4/ping_group_range",
            FIRST,
            SHARED,
            APART,
            "cat /dev/shm/note; rm /dev/shm/note",
        ],
    );
    assert_eq!(name, "web-0");
    for line in [
        "search default.svc.cluster.local svc.cluster.local",
        "nameserver 198.51.100.53",
        "options ndots:5",
    ] {
        assert!(
            dns.lines().any(|found| found == line),
            "{line} is not in {dns}"
        );
    }
    assert_eq!(sysctls, "1\n77\n0\t2000");
    for first in [of_one, of_two] {
        let is_its_own = first.starts_with("sh\0-c\0");
        assert!(is_its_own, "process 1 is the container's: {first}");
    }
    assert_eq!(
        note, "from one",
        "what one container puts there, the other sees"
    );
    assert_eq!(shared, also_shared, "one namespace of each kind for both");
    assert_ne!(apart, also_apart, "one each");
}

/// As `kubectl debug --target` has it.
pub(crate) fn processes_of_another(node: &Node, pod: &Pod) {
    let run = |name: &str, words: &[&str]| node.run(pod, &node::container(name, words));
    let other = run("other", &["sleep", "1003"]);
    let target = run("target", &["sleep", "1004"]);
    let mut config = node::waiting("debugger");
    let security = node::security(&mut config);
    let namespaces = security.namespace_options.as_mut().unwrap();
    namespaces.pid = NamespaceMode::Target as i32;
    namespaces.target_id.clone_from(&target);
    let debugger = node.run(pod, &config);
    step("another's processes are seen", || {
        let all = node.sh(&debugger, "cat /proc/[0-9]*/cmdline");
        let all = all.replace('\0', " ");
        assert!(all.contains("sleep 1004"), "{all}");
        for line in ["/pause", "sleep 1003"] {
            assert!(!all.contains(line), "{line} is among {all}");
        }
    });
    for container in [debugger, target, other] {
        node.cri.stop(&container, 0).unwrap();
        node.cri.remove(&container).unwrap();
    }
}

/// As `shareProcessNamespace: true` has it.
pub(crate) fn share_processes(config: &mut PodSandboxConfig) {
    let security = node::pod_security(config);
    let namespaces = security.namespace_options.as_mut().unwrap();
    namespaces.pid = NamespaceMode::Pod as i32;
}

pub(crate) fn processes_shared(node: &Node, pod: &Pod) {
    let shared = |name: &str, words: &[&str]| {
        let mut config = node::container(name, words);
        let security = node::security(&mut config);
        security.namespace_options.as_mut().unwrap().pid = NamespaceMode::Pod as i32;
        node.run(pod, &config)
    };
    let one = shared("sees", &["sleep", "1001"]);
    let two = shared("seen", &["sleep", "1002"]);
    step("processes are shared", || {
        let script = "cat /proc/[0-9]*/cmdline; \
             for p in $(pidof sleep); do [ $p -lt ${last:-0} ] || last=$p; done; kill -9 $last";
        let all = node.sh(&one, script).replace('\0', " ");
        for line in ["/pause", "sleep 1001", "sleep 1002"] {
            assert!(all.contains(line), "{line} is not among {all}");
        }
        assert_eq!(
            node.ended(&two).exit_code,
            137,
            "one container killed the other's process"
        );
    });
}
