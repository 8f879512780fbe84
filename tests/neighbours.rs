//! A pod at its limits of CPU, memory, files and network beside another: how long the other's small requests
//! take, with it and without. On a virtual node; `.ci/long` runs it. Needs root.
//!
//! The times are the node's, and say how far one pod reaches into another, not how fast either is.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs;
use std::path::{Path, PathBuf};

use tests::containerd::{self, Ran};
use tests::ctr::Container;
use tests::guest;
use tests::network::PodNetwork;
use tests::node::{Node, eventually, step};

/// What one request is made of, and their sum.
const PARTS: [&str; 4] = ["program", "file", "loopback", "all"];
/// Requests in each round.
const REQUESTS: &str = "60";
/// Processors that each pod may have.
const CPUS: [(&str, &str); 2] = [("quiet", "0.9"), ("noisy", "0.4")];
/// Memory that each may have.
const MEMORY: &str = "268435456";
/// What of it the neighbour fills, in MiB: the rest are its program and the pages of files.
const FILLED_MIB: &str = "200";
/// Rates of the neighbour's files.
const BYTES_PER_S: u64 = 20 << 20;
const REQUESTS_PER_S: u64 = 2000;
/// The most times that half of the requests may take longer beside a neighbour: on a node whose processors
/// are programs themselves.
const MOST_RATIO: f64 = 10.0;

#[test]
fn a_pod_at_its_limits_leaves_the_other_its_share() {
    if containerd::handler() != "podvmm" || !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let node = step("containerd", Node::start);
    let network = PodNetwork::new(1);
    let tools = guest::root(&[]);
    let quiet = Pod::new(&node, "quiet", &tools.path().join("bin"));
    step("the quiet pod", || quiet.start(&[], &["sleep", "100000"]));
    let alone = quiet.measure();
    let [(_, much), (_, little)] = CPUS;
    eprintln!(
        "neighbours: {much} CPUs and {MEMORY} bytes; the other {little} CPUs, as much memory, \
         {BYTES_PER_S} bytes and {REQUESTS_PER_S} requests about files in a second"
    );
    report("alone", &alone);
    let mut rows = Vec::new();
    for what in ["cpu", "memory", "files", "network", "all"] {
        let noisy = Pod::new(&node, what, &tools.path().join("bin"));
        let namespace = format!("network:{}", network.path());
        let disturb = [
            "/tools/guest_load",
            "disturb",
            what,
            FILLED_MIB,
            "/data",
            "10.9.0.1",
        ];
        step(what, || noisy.start(&["--with-ns", &namespace], &disturb));
        std::thread::sleep(std::time::Duration::from_secs(3));
        let used = noisy.usage();
        let times = quiet.measure();
        let used = noisy.usage().saturating_sub(used);
        report(
            &format!("beside one that takes {what} ({used} us of CPU)"),
            &times,
        );
        noisy.end();
        rows.push((what, times));
    }
    let again = quiet.measure();
    report("alone again", &again);
    quiet.end();
    drop(network);
    node.end();
    for (what, times) in rows {
        let [now, before, after] = [&times, &alone, &again].map(|times| percentile(&times[3], 50));
        // The node has other work, too, and not always as much.
        let ratio = now as f64 / before.max(after) as f64;
        assert!(ratio < MOST_RATIO, "{what}: {ratio:.1} times as long");
    }
}

/// A container alone, and so a pod, with limits.
struct Pod<'a> {
    node: &'a Node,
    container: Container,
    cpus: &'static str,
    mounts: [String; 2],
}

impl<'a> Pod<'a> {
    fn new(node: &'a Node, name: &str, tools: &Path) -> Self {
        let data = node.folder().join(format!("data-{name}"));
        fs::create_dir(&data).unwrap();
        let mount = |source: &Path, place: &str| {
            let source = source.display();
            format!("type=bind,src={source},dst={place},options=rbind:rw")
        };
        let container = Container::new(node, name);
        let [(quiet, much), (_, little)] = CPUS;
        let (container, cpus) = match name == quiet {
            true => (container, much),
            false => (container.with_config(&with_rates(node)), little),
        };
        Self {
            node,
            container,
            cpus,
            mounts: [mount(tools, "/tools"), mount(&data, "/data")],
        }
    }

    fn start(&self, options: &[&str], words: &[&str]) {
        let [tools, data] = &self.mounts;
        let limits = ["--cpus", self.cpus, "--memory-limit", MEMORY];
        let mounts = ["--mount", tools, "--mount", data];
        let options = [&limits, &mounts[..], options].concat();
        self.container.start(&self.node.containerd, &options, words);
    }

    /// How long requests take, by their parts, sorted.
    fn measure(&self) -> [Vec<u64>; 4] {
        let words = ["/tools/guest_load", "requests", REQUESTS, "/data"];
        let ran: Ran = self.container.exec(&self.node.containerd, &[], &words);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let mut times = [const { Vec::new() }; 4];
        for line in ran.stdout.lines() {
            let parts: Vec<u64> = line.split(' ').map(|it| it.parse().unwrap()).collect();
            let sum = parts.iter().sum();
            for (times, time) in times.iter_mut().zip(parts.into_iter().chain([sum])) {
                times.push(time);
            }
        }
        times.iter_mut().for_each(|times| times.sort_unstable());
        times
    }

    /// Processor time of its control group, in microseconds.
    fn usage(&self) -> u64 {
        let folder =
            Path::new("/sys/fs/cgroup").join(self.container.cgroup().trim_start_matches('/'));
        let stat = fs::read_to_string(folder.join("cpu.stat")).unwrap_or_default();
        let usage = stat
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        usage.and_then(|usage| usage.parse().ok()).unwrap_or(0)
    }

    fn end(&self) {
        let containerd = &self.node.containerd;
        let id = self.container.id();
        containerd.ctr_must(&["tasks", "kill", "--signal", "KILL", id]);
        eventually("it ends", || self.container.state(containerd) == "STOPPED");
        self.container.delete(containerd);
    }
}

/// The node's configuration, with limits of rate for files.
fn with_rates(node: &Node) -> PathBuf {
    let path = node.folder().join("rates.toml");
    let own = node.containerd.runtime_config().unwrap();
    let text = fs::read_to_string(own).unwrap();
    let rates = format!("fs_bytes_per_s = {BYTES_PER_S}\nfs_requests_per_s = {REQUESTS_PER_S}\n");
    fs::write(&path, text + &rates).unwrap();
    path
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn report(what: &str, times: &[Vec<u64>; 4]) {
    for (part, times) in PARTS.iter().zip(times) {
        let [half, nine, most] = [50, 90, 99].map(|percent| percentile(times, percent));
        eprintln!("neighbours: {what}: {part}: {half} us, 90 %: {nine}, 99 %: {most}");
    }
}
