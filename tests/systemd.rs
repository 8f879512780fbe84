//! Pods on a host whose cgroups are systemd's: each a scope in a slice, among other units there.
//!
//! Needs root, systemd and cgroups of version 2, as `resources/node` has them. On other hosts it says
//! that it is skipped.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tests::containerd;
use tests::ctr::{Container, signal};
use tests::guest;
use tests::node::{self, Node, eventually, processes_with, step};

const ROOT: &str = "/sys/fs/cgroup";

/// Runs `cases` on a node of systemd's, which has to be clean afterwards.
fn on_a_node(cases: impl FnOnce(&Node, &Slice)) {
    let is_systemds = Path::new("/run/systemd/system").is_dir();
    let is_unified = Path::new(ROOT).join("cgroup.controllers").exists();
    if !is_systemds || !is_unified {
        eprintln!(
            "SKIPPED: systemd runs this host: {is_systemds}, cgroups are of version 2: {is_unified}"
        );
        return;
    }
    if containerd::handler() != "podvmm" {
        eprintln!("SKIPPED: runc is not told to use systemd here");
        return;
    }
    if !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let node = step("containerd", Node::shared);
    let slice = Slice::start();
    cases(&node, &slice);
    drop(slice);
    step("end of the node, the host compared", || node.end());
}

/// Runs a program that has to succeed, and gives what it prints.
fn ran(words: &[&str]) -> String {
    let output = Command::new(words[0])
        .args(&words[1..])
        .stderr(Stdio::inherit())
        .output();
    let output = output.expect("systemd is installed");
    let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{words:?}: {printed}");
    printed
}

/// One property of a unit.
fn property(unit: &str, name: &str) -> String {
    ran(&["systemctl", "show", "--value", "--property", name, unit])
}

/// Units whose names match, in whatever state they are.
fn units(pattern: &str) -> String {
    let words = ["systemctl", "list-units", "--all", "--plain", "--no-legend"];
    ran(&[&words[..], &[pattern]].concat())
}

/// A slice as the kubelet makes one for pods, with other units in it.
struct Slice(String);

impl Slice {
    fn start() -> Self {
        let slice = Self(format!("podvmmtest{}.slice", std::process::id()));
        ran(&["systemctl", "start", &slice.0]);
        slice
    }

    fn cgroup(&self) -> PathBuf {
        Path::new(ROOT).join(&self.0)
    }

    /// Starts a neighbour of the pod, for which the slice has all controllers.
    fn add(&self, unit: &str) {
        let slice = format!("--slice={}", self.0);
        let unit = format!("--unit={unit}");
        let delegate = "--property=Delegate=yes";
        ran(&[
            "systemd-run",
            "--quiet",
            &slice,
            &unit,
            delegate,
            "sleep",
            "1000",
        ]);
    }

    /// Has systemd look at the slice again, with one unit fewer.
    fn rearrange(&self, unit: &str) {
        ran(&["systemctl", "stop", unit]);
        ran(&["systemctl", "daemon-reload"]);
        // Realized anew, with what it needs for its units.
        ran(&[
            "systemctl",
            "set-property",
            "--runtime",
            &self.0,
            "CPUWeight=50",
        ]);
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        for words in [["stop", &self.0], ["revert", &self.0]] {
            // What stays is for the comparison to find.
            let _ = Command::new("systemctl").args(words).status();
        }
    }
}

/// The scope of a pod, and what it has to have as long as the pod lives.
struct Scope {
    unit: String,
    cgroup: PathBuf,
}

impl Scope {
    fn of(slice: &Slice, unit: String) -> Self {
        let cgroup = slice.cgroup().join(&unit);
        Self { unit, cgroup }
    }

    fn read(&self, file: &str) -> String {
        let path = self.cgroup.join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}", path.display());
        });
        text.trim().to_owned()
    }

    /// Panics unless it is as it was made, with `processes` in it.
    fn holds(&self, when: &str, processes: &[i32]) {
        assert_eq!(property(&self.unit, "ActiveState"), "active", "{when}");
        assert_eq!(property(&self.unit, "Delegate"), "yes", "{when}");
        assert_eq!(property(&self.unit, "DevicePolicy"), "strict", "{when}");
        let controllers = self.read("cgroup.controllers");
        for controller in ["cpu", "memory", "pids", "io"] {
            let mut names = controllers.split(' ');
            assert!(names.any(|it| it == controller), "{when}: {controllers}");
        }
        let inside = self.read("cgroup.procs");
        for process in processes {
            let mut lines = inside.lines();
            assert!(
                lines.any(|line| line == process.to_string()),
                "{when}: {process} is not among {inside:?}"
            );
            // What any thread of it does is charged to the pod.
            let threads = self.read("cgroup.threads");
            let threads: Vec<&str> = threads.lines().collect();
            for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let thread = thread.unwrap().file_name();
                let thread = thread.to_str().unwrap();
                // One that has just ended is in no cgroup.
                let lives = || Path::new(&format!("/proc/{process}/task/{thread}")).exists();
                assert!(
                    threads.contains(&thread)
                        || !lives()
                        || self.read("cgroup.threads").contains(thread),
                    "{when}: thread {thread} of {process} is not among {threads:?}"
                );
            }
        }
        let used: u64 = self.read("memory.current").parse().unwrap();
        assert!(used > 4 << 20, "{when}: {used} bytes of memory");
    }

    fn is_gone(&self) {
        eventually(&format!("{} is gone", self.unit), || {
            !self.cgroup.exists() && units(&self.unit).is_empty()
        });
    }
}

/// A pod beside units that come and go keeps its cgroup with all controllers, and its figures are
/// true; after it nothing is left, whether it ended or its shim was killed.
#[test]
fn a_pod_lives_in_a_slice_whatever_systemd_does_to_it() {
    on_a_node(|node, slice| {
        let neighbours = ["one", "two"].map(|name| format!("podvmmtest-{name}.service"));
        slice.add(&neighbours[0]);
        let mut config = node.pod_config("scoped");
        // As the kubelet names it.
        config.linux.get_or_insert_default().cgroup_parent = format!("/{}", slice.0);
        let pod = node.run_pod(config.clone());
        let container = node.run(&pod, &node::waiting("one"));
        let scope = Scope::of(slice, format!("cri-containerd-{}.scope", pod.id));
        let processes = [shim(&pod.id), vmm(&pod.id)];
        scope.holds("at first", &processes);
        slice.rearrange(&neighbours[0]);
        scope.holds("without its neighbour", &processes);
        slice.add(&neighbours[1]);
        slice.rearrange(&neighbours[1]);
        scope.holds("after another neighbour", &processes);
        figures(node, &pod.id, &container);
        node.remove_pod(&pod);
        scope.is_gone();

        let pod = node.run_pod(config);
        let scope = Scope::of(slice, format!("cri-containerd-{}.scope", pod.id));
        scope.holds("of the second pod", &[vmm(&pod.id)]);
        signal(shim(&pod.id), libc::SIGKILL);
        eventually("the VM ends with its shim", || vmms(&pod.id).is_empty());
        scope.is_gone();
        node.remove_pod(&pod);
        assert_eq!(units("*podvmm*.scope cri-containerd-*"), "");
    });
}

fn shim(pod: &str) -> i32 {
    let found = processes_with(&["containerd-shim-podvmm-v2", "-id", pod]);
    assert_eq!(found.len(), 1, "shims of {pod}: {found:?}");
    found[0]
}

fn vmms(pod: &str) -> Vec<i32> {
    processes_with(&["podvmm ", "--api-socket", pod])
}

fn vmm(pod: &str) -> i32 {
    let found = vmms(pod);
    assert_eq!(found.len(), 1, "VMs of {pod}: {found:?}");
    found[0]
}

/// What the shim and containerd say that the pod has used grows with what it does.
fn figures(node: &Node, pod: &str, container: &str) {
    let of_shim = || {
        let words = ["-n", "k8s.io", "tasks", "metrics", "--format", "json", pod];
        let text = node.containerd.ctr_must(&words);
        let metrics: Value = serde_json::from_str(&text).unwrap();
        let number = |pointer: &str| {
            let value = metrics.pointer(pointer);
            value.and_then(Value::as_u64).unwrap_or_default()
        };
        [
            number("/cpu/usage_usec"),
            number("/memory/usage"),
            number("/pids/current"),
        ]
    };
    let of_containerd = || {
        let stats = node.cri.pod_stats(pod).unwrap();
        let linux = stats.linux.unwrap_or_default();
        let cpu = linux.cpu.unwrap_or_default().usage_core_nano_seconds;
        let memory = linux.memory.unwrap_or_default().working_set_bytes;
        [cpu, memory].map(|value| value.map_or(0, |it| it.value))
    };
    let before = (of_shim(), of_containerd());
    let ([cpu, memory, processes], [same_cpu, same_memory]) = before;
    assert!(cpu > 0 && memory > 4 << 20 && processes > 5, "{before:?}");
    assert!(same_cpu > 0 && same_memory > 4 << 20, "{before:?}");
    let work = "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=32 2>/dev/null";
    node.sh(container, work);
    eventually("the figures grow", || {
        let ([later, more, _], [same_later, same_more]) = (of_shim(), of_containerd());
        later > cpu
            && same_later > same_cpu
            && more > memory + (24 << 20)
            && same_more > same_memory + (24 << 20)
    });
}

/// Limits of a container alone, for one whose VM is started and for one whose VM waited in the pool.
#[test]
fn a_container_alone_is_held_to_its_limits() {
    on_a_node(|node, slice| {
        let limits = ["--cpus", "0.9", "--memory-limit", "536870912"];
        let run = |name: &str, config: Option<&Path>| {
            let mut container = Container::new(node, name);
            if let Some(config) = config {
                container = container.with_config(config);
            }
            let id = container.id().to_owned();
            let container = container.with_cgroup(&format!("{}:podvmm:{id}", slice.0));
            step(name, || {
                container.start(&node.containerd, &limits, &["sleep", "1000"]);
            });
            let scope = Scope::of(slice, format!("podvmm-{id}.scope"));
            (container, scope)
        };
        let is_held = |scope: &Scope| {
            assert_eq!(property(&scope.unit, "CPUQuotaPerSecUSec"), "900ms");
            assert_eq!(scope.read("cpu.max"), "90000 100000");
            let most: u64 = scope.read("memory.max").parse().unwrap();
            assert!(most > 512 << 20 && most < 1 << 30, "{most}");
        };
        let end = |container: Container, scope: &Scope| {
            let words = ["tasks", "kill", "--signal", "KILL", container.id()];
            node.containerd.ctr_must(&words);
            let state = || container.state(&node.containerd);
            eventually("it ends", || state() == "STOPPED");
            container.delete(&node.containerd);
            scope.is_gone();
        };

        let (container, scope) = run("limited", None);
        is_held(&scope);
        ran(&["systemctl", "daemon-reload"]);
        is_held(&scope);
        end(container, &scope);

        let pool = node.folder().join("pool.toml");
        let templates = match containerd::has_templates() {
            true => containerd::templates(),
            false => node.folder().join("templates"),
        };
        let adjust = |size: usize| {
            containerd::write_config(&pool, &templates, size);
            let shim = containerd::shim().to_str().unwrap();
            let path = pool.to_str().unwrap();
            step(&format!("pool of {size}"), || {
                ran(&[shim, "pool", "-config", path]);
            });
        };
        adjust(1);
        let (container, scope) = run("claimed", Some(&pool));
        let vmm = container.process(&node.containerd);
        scope.holds("of a claimed VM", &[vmm]);
        is_held(&scope);
        end(container, &scope);
        adjust(0);
    });
}

/// Without systemd's form of a path the cgroup is a folder, which has controllers and limits too.
#[test]
fn a_plain_path_has_controllers_and_limits() {
    on_a_node(|node, _| {
        let container = Container::new(node, "plain");
        step("plain", || {
            let limits = ["--cpus", "0.5"];
            container.start(&node.containerd, &limits, &["sleep", "1000"]);
        });
        let cgroup = Path::new(ROOT)
            .join(node.cgroup().trim_start_matches('/'))
            .join(container.id());
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap();
        assert_eq!(read("cpu.max"), "50000 100000\n");
        let used: u64 = read("memory.current").trim().parse().unwrap();
        assert!(used > 4 << 20, "{used} bytes of memory");
        let words = ["tasks", "kill", "--signal", "KILL", container.id()];
        node.containerd.ctr_must(&words);
        let state = || container.state(&node.containerd);
        eventually("it ends", || state() == "STOPPED");
        container.delete(&node.containerd);
        eventually("its cgroup goes", || !cgroup.exists());
    });
}
