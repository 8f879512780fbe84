//! Limits, their change while the container runs, what is used, and too much of it.

use tests::cri::config::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use tests::node::{self, Node, Pod, eventually, step};

const MIB: i64 = 1 << 20;

/// What the pod's containers may use together, as the kubelet says of the pod.
pub(crate) fn prepare(config: &mut PodSandboxConfig) {
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 200_000,
        cpu_shares: 2048,
        memory_limit_in_bytes: 512 * MIB,
        ..LinuxContainerResources::default()
    });
}

fn limits(memory: i64, cpu_percent: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpu_percent * 1000,
        cpu_shares: 1024 * cpu_percent / 100,
        memory_limit_in_bytes: memory,
        oom_score_adj: 500,
        ..LinuxContainerResources::default()
    }
}

fn limited(name: &str, memory: i64, cpu_percent: i64, words: &[&str]) -> ContainerConfig {
    let mut config = match words {
        [] => node::waiting(name),
        words => node::container(name, words),
    };
    config.linux.as_mut().unwrap().resources = Some(limits(memory, cpu_percent));
    config
}

pub(crate) fn cases(node: &Node, pod: &Pod) {
    // A guest whose kernel is interpreted has little left of half a CPU.
    let container = node.run(pod, &limited("limited", 64 * MIB, 90, &[]));
    let [limits_seen, adjusted] = node.sh_each(&container, [LIMITS, "cat /proc/1/oom_score_adj"]);
    assert_eq!(numbers(&limits_seen), (64 * MIB, 90));
    assert_eq!(adjusted, "500");
    step("limits shrink and grow in place", || {
        for (memory, cpu_percent) in [(48 * MIB, 80), (192 * MIB, 150)] {
            node.cri
                .update(&container, limits(memory, cpu_percent))
                .unwrap();
            assert_eq!(seen(node, &container), (memory, cpu_percent));
        }
    });
    if node.is_podvmm() {
        grow(node, &container);
    }
    stats(node, pod, &container);
    node.cri.stop(&container, 30).unwrap();
    node.cri.remove(&container).unwrap();
    too_much(node, pod);
}

/// Prints what a container's own cgroup says it has.
const LIMITS: &str = "cd /sys/fs/cgroup; \
     if [ -e memory.max ]; then cat memory.max cpu.max; \
     else cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us; fi";

fn seen(node: &Node, container: &str) -> (i64, i64) {
    numbers(&node.sh(container, LIMITS))
}

/// Memory in bytes and CPU in hundredths.
fn numbers(text: &str) -> (i64, i64) {
    let numbers: Vec<i64> = text
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    (numbers[0], numbers[1] * 100 / numbers[2])
}

/// Beyond what the pod was made with: the virtual machine grows.
fn grow(node: &Node, container: &str) {
    const TOTAL: &str = "awk '/^MemTotal:/ { print $2 }' /proc/meminfo";
    const CPUS: &str = "grep -c ^processor /proc/cpuinfo";
    let kib = |total: &str| -> i64 { total.parse().unwrap() };
    let before = kib(&node.sh(container, TOTAL));
    let to = before * 1024 + 512 * MIB;
    step("the machine grows", || {
        node.cri.update(container, limits(to, 200)).unwrap();
        eventually("the guest has more memory and two CPUs", || {
            let [seen, total, cpus] = node.sh_each(container, [LIMITS, TOTAL, CPUS]);
            assert_eq!(numbers(&seen), (to, 200));
            kib(&total) > before + 256 * 1024 && cpus == "2"
        });
    });
}

fn stats(node: &Node, pod: &Pod, container: &str) {
    node.sh(
        container,
        "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=20 2>/dev/null",
    );
    let of = || node.cri.stats(container).unwrap();
    let used = |stats: &tests::cri::status::ContainerStats| {
        let cpu = stats.cpu.unwrap_or_default();
        cpu.usage_core_nano_seconds.map_or(0, |value| value.value)
    };
    let first = of();
    let memory = first.memory.unwrap_or_default();
    let memory = memory.working_set_bytes.map_or(0, |value| value.value);
    assert!(memory > 19_000_000, "the ballast counts: {memory}");
    assert!(used(&first) > 0, "{first:?}");
    node.sh(
        container,
        "rm /dev/shm/ballast; i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done",
    );
    let second = of();
    assert!(used(&second) > used(&first), "work counts: {second:?}");
    let attributes = second.attributes.unwrap_or_default();
    assert_eq!(attributes.id, container);
    let pod_stats = node.cri.pod_stats(&pod.id).unwrap();
    let linux = pod_stats.linux.unwrap_or_default();
    let memory = linux.memory.unwrap_or_default();
    assert!(
        memory
            .working_set_bytes
            .is_some_and(|value| value.value > 0),
        "the pod's: {memory:?}"
    );
    let network = linux.network.unwrap_or_default();
    let interface = network.default_interface.unwrap_or_default();
    let received = interface.rx_bytes.map_or(0, |value| value.value);
    assert!(interface.name == "eth0" && received > 0, "{interface:?}");
}

/// A container that takes more memory than it may have is ended, and the others are not.
fn too_much(node: &Node, pod: &Pod) {
    let script = "sleep 1; exec dd if=/dev/zero of=/dev/null bs=32M count=1";
    let greedy = ["sh", "-c", script];
    let greedy = node.run(pod, &limited("greedy", 12 * MIB, 0, &greedy));
    let status = step("a container runs out of memory", || node.ended(&greedy));
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled"),
        "{status:?}"
    );
    node.cri.remove(&greedy).unwrap();
    let state = node.cri.pod_status(&pod.id).unwrap().state;
    assert_eq!(state, tests::cri::status::PodSandboxState::Ready as i32);
}
