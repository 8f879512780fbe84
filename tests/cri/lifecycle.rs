//! Containers from their start to their end, and pods that cannot be.

use std::fs;
use std::time::{Duration, Instant};

use tests::cri::config::NamespaceMode;
use tests::cri::status::{ContainerState, PodSandboxState};
use tests::node::{self, Node, Pod, eventually, step};

use crate::log_of;

pub(crate) fn listed(node: &Node, pod: &Pod, containers: &[&str]) {
    let pods = node.cri.pods().unwrap();
    let ids: Vec<_> = pods.iter().map(|pod| &pod.id).collect();
    assert_eq!(ids, [&pod.id]);
    assert_eq!(pods[0].runtime_handler, node.handler);
    let status = node.cri.pod_status(&pod.id).unwrap();
    assert_eq!(status.state, PodSandboxState::Ready as i32);
    let mut found: Vec<_> = node.cri.containers().unwrap();
    found.sort_by_key(|container| container.created_at);
    let ids: Vec<_> = found
        .iter()
        .map(|container| container.id.as_str())
        .collect();
    assert_eq!(ids, containers);
    for container in found {
        assert_eq!(container.state, ContainerState::Running as i32);
        let status = node.cri.container_status(&container.id).unwrap();
        assert!(status.started_at >= status.created_at, "{status:?}");
        assert_eq!(status.finished_at, 0, "{status:?}");
    }
}

pub(crate) fn exec(node: &Node, container: &str) {
    let exec = node.exec(container, &["sh", "-c", "echo one; echo two >&2; exit 7"]);
    assert_eq!(
        (exec.stdout.as_str(), exec.stderr.as_str(), exec.status),
        ("one\n", "two\n", 7)
    );
    let much = node.sh(
        container,
        "yes | head -c 300000 | wc -c; yes | head -c 300000 >&2",
    );
    assert_eq!(much, "300000");
    let refusal = node
        .cri
        .exec_sync(container, &["/no/such/program"], 0)
        .unwrap_err();
    assert!(
        refusal.message.to_lowercase().contains("no such file"),
        "it says what is missing: {refusal}"
    );
    let start = Instant::now();
    let refusal = step("exec that times out", || {
        node.cri
            .exec_sync(container, &["sleep", "1003"], 2)
            .unwrap_err()
    });
    assert!(
        refusal.message.contains("timeout"),
        "it says that it took too long: {refusal}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "it is ended, not waited for"
    );
    let left = node.sh(container, "cat /proc/[0-9]*/cmdline");
    assert!(
        !left.contains("sleep\x001003"),
        "the program has ended: {left}"
    );
}

pub(crate) fn logs(node: &Node, pod: &Pod, container: &str) {
    let line = |stream: &str, text: &str| (stream.to_owned(), text.to_owned());
    eventually("the log has two lines", || log_of(pod, "one").len() == 2);
    let mut lines = log_of(pod, "one");
    lines.sort();
    assert_eq!(
        lines,
        [line("stderr", "err"), line("stdout", "out of green paint")]
    );
    let path = format!("{}/one.log", pod.config.log_directory);
    fs::rename(&path, format!("{path}.1")).unwrap();
    node.cri.reopen_log(container).unwrap();
    node.sh(container, "echo later > /proc/1/fd/1");
    eventually("the new log has the new line", || {
        log_of(pod, "one") == [line("stdout", "later")]
    });
    let config = node::container(
        "talks",
        &["sh", "-c", "seq 1 2000; printf unended >&2; exit 3"],
    );
    let talks = node.run(pod, &config);
    assert_eq!(node.ended(&talks).exit_code, 3);
    eventually("all of it is in the log", || {
        log_of(pod, "talks").len() == 2001
    });
    let lines = log_of(pod, "talks");
    let numbers = lines.iter().filter(|(stream, _)| stream == "stdout");
    let numbers: Vec<_> = numbers.map(|(_, text)| text.clone()).collect();
    assert_eq!(
        numbers,
        (1..=2000)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    );
    assert!(
        lines.contains(&line("stderr", "unended")),
        "the last line is there too"
    );
    node.cri.remove(&talks).unwrap();
}

/// Ends within the grace time, after it, and at once.
pub(crate) fn stopping(node: &Node, pod: &Pod) {
    let polite = node.run(pod, &node::waiting("polite"));
    // Its shell has to have come to its trap.
    eventually("it waits", || !log_of(pod, "polite").is_empty());
    step("end within the grace time", || {
        node.cri.stop(&polite, 30).unwrap()
    });
    assert_eq!(node.ended(&polite).exit_code, 0);
    let script = "trap '' TERM; echo deaf; while :; do sleep 1; done";
    let deaf = node.run(pod, &node::container("deaf", &["sh", "-c", script]));
    eventually("it is deaf", || !log_of(pod, "deaf").is_empty());
    let start = Instant::now();
    step("end after the grace time", || {
        node.cri.stop(&deaf, 3).unwrap()
    });
    let took = start.elapsed();
    assert!(
        (3..20).contains(&took.as_secs()),
        "3 s and a little: {took:?}"
    );
    let status = node.ended(&deaf);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(status.finished_at > status.started_at, "{status:?}");
    // What the kubelet asks for twice is done.
    node.cri.stop(&deaf, 0).unwrap();
    for container in [&polite, &deaf] {
        node.cri.remove(container).unwrap();
        node.cri.remove(container).unwrap();
    }
    let refusal = node.cri.start(&deaf).unwrap_err();
    assert!(refusal.message.contains("not found"), "{refusal}");
    missing_program(node, pod);
}

fn missing_program(node: &Node, pod: &Pod) {
    let config = node::container("missing", &["/no/such/program"]);
    let id = node.cri.create(&pod.id, &pod.config, &config).unwrap();
    let refusal = node.cri.start(&id).unwrap_err();
    assert!(
        refusal.message.contains("/no/such/program"),
        "it says which: {refusal}"
    );
    let status = node.cri.container_status(&id).unwrap();
    assert_eq!(status.state, ContainerState::Exited as i32, "{status:?}");
    node.cri.remove(&id).unwrap();
}

/// A pod removed while its containers run: they are ended at once.
pub(crate) fn removed_by_force(node: &Node, pod: &Pod) {
    let deaf = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"];
    let deaf = node.run(pod, &node::container("still-there", &deaf));
    let start = Instant::now();
    step("end of a pod that runs", || {
        node.cri.stop_pod(&pod.id).unwrap()
    });
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(node.ended(&deaf).exit_code, 137);
    let status = node.cri.pod_status(&pod.id).unwrap();
    assert_eq!(status.state, PodSandboxState::Notready as i32);
}

/// Namespaces of the host cannot be had, and the answer says so.
pub(crate) fn refusals(node: &Node) {
    if !node.is_podvmm() {
        return;
    }
    let host = NamespaceMode::Node as i32;
    for kind in ["network", "pid", "ipc"] {
        let mut config = node.pod_config(&format!("host-{kind}"));
        let security = node::pod_security(&mut config);
        let namespaces = security.namespace_options.as_mut().unwrap();
        match kind {
            "network" => namespaces.network = host,
            "pid" => namespaces.pid = host,
            _ => namespaces.ipc = host,
        }
        let result = step(&format!("refusal of the host's {kind} namespace"), || {
            node.run_pod_of(config, &node.handler)
        });
        let refusal = result.expect_err("a virtual machine has namespaces of its own");
        let words = ["host", kind];
        let message = refusal.message.to_lowercase();
        assert!(
            words.iter().all(|word| message.contains(word)),
            "it says why: {refusal}"
        );
    }
}
