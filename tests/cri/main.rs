//! Pods over the container runtime interface, as the kubelet makes them, with a real containerd.
//!
//! A pod that is a virtual machine takes long to start where KVM emulates, so cases share pods, and
//! each step prints how long it took. `PODVMM_TEST_HANDLER=runc` holds the tests themselves to what
//! runc does. Needs root.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

mod identity;
mod lifecycle;
mod network;
mod resources;
mod security;
mod volumes;

use std::fs;
use std::thread;

use tests::cri::Cri;
use tests::cri::config::PodSandboxConfig;
use tests::guest;
use tests::node::{self, Node, Pod, step};

/// Runs `cases` on a node, which has to be clean afterwards.
fn on_a_node(cases: impl FnOnce(&Node)) {
    if containers_handler_needs_kvm() && !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let node = step("containerd", Node::shared);
    cases(&node);
    step("end of the node, the host compared", || node.end());
}

fn containers_handler_needs_kvm() -> bool {
    tests::containerd::handler() == "podvmm"
}

/// One pod with two containers, and all that can be seen in it.
#[test]
fn a_pod_of_two_containers() {
    on_a_node(|node| {
        let mut config = node.pod_config("shared");
        identity::prepare(&mut config);
        resources::prepare(&mut config);
        let pod = node.run_pod(config);
        let one = node.run(&pod, &identity::container(node));
        let mut two = node::waiting("two");
        volumes::add(node, &pod, &mut two);
        let two = node.run(&pod, &two);
        step("pod and containers are listed", || {
            lifecycle::listed(node, &pod, &[&one, &two]);
        });
        lifecycle::exec(node, &one);
        lifecycle::logs(node, &pod, &one);
        identity::seen(node, &one, &two);
        network::shared(node, &pod, &one, &two);
        volumes::seen(node, &pod, &two);
        volumes::shared(node, &pod);
        resources::cases(node, &pod);
        lifecycle::stopping(node, &pod);
        node.remove_pod(&pod);
        volumes::remove(node, &pod);
        assert_eq!(node.cri.pods().unwrap(), [], "it is removed");
        assert_eq!(node.cri.containers().unwrap(), [], "it is removed");
    });
}

/// Pods beside each other: two under test and one of runc.
#[test]
fn pods_beside_each_other() {
    on_a_node(|node| {
        let mut config = node.pod_config("first");
        identity::share_processes(&mut config);
        let (first, second) = two_at_once(node, config, node.pod_config("second"));
        let plain = node.run_pod_of(node.pod_config("plain"), "runc").unwrap();
        network::between(node, &first, &second, &plain);
        identity::processes_shared(node, &first);
        lifecycle::refusals(node);
        identity::processes_of_another(node, &second);
        security::cases(node, &second);
        lifecycle::removed_by_force(node, &second);
        node.remove_pod(&first);
        node.remove_pod(&second);
        node.remove_pod(&plain);
    });
}

/// Starts two pods at the same time, as the kubelet would.
fn two_at_once(node: &Node, first: PodSandboxConfig, second: PodSandboxConfig) -> (Pod, Pod) {
    let socket = node.containerd.socket();
    let handler = node.handler.clone();
    step("two pods at once", || {
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let id = Cri::connect(&socket).run_pod(&second, &handler);
                Pod {
                    id: id.unwrap_or_else(|refusal| panic!("{refusal}")),
                    config: second,
                }
            });
            let first = node.run_pod(first);
            (first, other.join().expect("it says why not"))
        })
    })
}

/// The lines of a container's log: stream and text, in order.
fn log_of(pod: &Pod, name: &str) -> Vec<(String, String)> {
    let path = format!("{}/{name}.log", pod.config.log_directory);
    let text = fs::read_to_string(path).expect("it has a log");
    let lines = text.lines().map(|line| {
        let parts: Vec<_> = line.splitn(4, ' ').collect();
        assert_eq!(parts.len(), 4, "time, stream, tag and text: {line:?}");
        (parts[1].to_owned(), parts[3].to_owned())
    });
    lines.collect()
}
