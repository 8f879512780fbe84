//! What people run in pods, each in a pod of runc and in one of podvmm on the same node: the outcome is the same.
//!
//! Programs are those of the image that resources/workloads makes. Every script has to succeed in both
//! runtimes, and what it prints has to be equal; times are printed, not compared. Sizes are those of users;
//! `PODVMM_TEST_PERCENT` says how much of that there is. `PODVMM_TEST_HANDLER=runc` holds the tests themselves
//! to what runc does. Needs root.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

mod files;
mod programs;
mod servers;

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use tests::containerd::{self, CRI, Ran, WORKLOADS};
use tests::cri::config::{ContainerConfig, PodSandboxConfig};
use tests::guest;
use tests::node::{self, Node, Pod, mount, pod_security, security, step};

/// A pod that a workload runs in.
struct Bench<'a> {
    node: &'a Node,
    pod: Pod,
    execs: Cell<u32>,
}

/// Runs a workload in a pod of runc and in one of the runtime under test. What it gives is what it printed, or
/// found out otherwise: that is equal.
fn same_as_runc(name: &str, workload: impl Fn(&Bench) -> Vec<String>) {
    same_in_pods(name, |_| (), workload);
}

/// The same in pods that are changed by `prepare`.
fn same_in_pods(
    name: &str,
    prepare: impl Fn(&mut PodSandboxConfig),
    workload: impl Fn(&Bench) -> Vec<String>,
) {
    on_a_node(|node| compare(node, name, prepare, workload));
}

/// Runs a workload in a pod of each runtime on a node.
fn compare(
    node: &Node,
    name: &str,
    prepare: impl Fn(&mut PodSandboxConfig),
    workload: impl Fn(&Bench) -> Vec<String>,
) {
    let [expected, found] = ["runc", &node.handler].map(|handler| {
        let start = Instant::now();
        let mut config = node.pod_config(name);
        prepare(&mut config);
        let pod = step(&format!("pod of {handler}"), || {
            node.run_pod_of(config, handler).unwrap()
        });
        let execs = Cell::new(0);
        let bench = Bench { node, pod, execs };
        let outcome = workload(&bench);
        node.remove_pod(&bench.pod);
        let seconds = start.elapsed().as_secs();
        eprintln!("{name} by {handler}: {seconds} s: {outcome:#?}");
        outcome
    });
    assert_eq!(found, expected, "what {name} gives by podvmm, and by runc");
}

/// Runs `cases` on a node that has the image, and has to be clean afterwards.
fn on_a_node(cases: impl FnOnce(&Node)) {
    if containerd::handler() == "podvmm" && !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let node = step("containerd", Node::shared);
    let image = Image::unpack(&node);
    cases(&node);
    drop(image);
    step("end of the node, the host compared", || node.end());
}

/// The image's files, where containerd has unpacked its archive. That takes minutes where processors are
/// emulated, so the archive has one file alone, and a file system with all of them is mounted over it.
struct Image(PathBuf);

impl Image {
    fn unpack(node: &Node) -> Self {
        let made = containerd::workloads();
        let archive = made.join("workloads.tar").display().to_string();
        let import = ["-n", CRI, "images", "import", &archive];
        node.containerd.ctr_must(&import);
        let folder = node.containerd.folder().join("root");
        let unpacked = folder.join("io.containerd.snapshotter.v1.overlayfs/snapshots");
        let snapshots = fs::read_dir(unpacked).unwrap();
        let mut snapshots = snapshots.map(|it| it.unwrap().path().join("fs"));
        let mut is_image = |path: &PathBuf| path.join("is-workloads").exists();
        let image = Self(snapshots.find(&mut is_image).unwrap());
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,ro"]).arg(made.join("root.erofs"));
        assert!(mount.arg(&image.0).status().unwrap().success());
        image
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A test that failed leaves containers that use it.
        let mut unmount = Command::new("umount");
        let _ = unmount.arg("--lazy").arg(&self.0).status();
    }
}

impl Bench<'_> {
    /// Runs a container in the pod and gives its id.
    fn run(&self, config: &ContainerConfig) -> String {
        self.node.run(&self.pod, config)
    }

    /// A container that waits for scripts, with folders of the pod's by their names there.
    fn waiting(&self, name: &str, folders: &[&str]) -> String {
        let mut config = waiting(name);
        self.mount(&mut config, folders);
        self.run(&config)
    }

    /// Adds folders of the pod's to a container: `data` is /data there, and the same for all that name it.
    fn mount(&self, config: &mut ContainerConfig, folders: &[&str]) {
        for name in folders {
            let folder = self.folder(name);
            config.mounts.push(mount(&folder, &format!("/{name}")));
        }
    }

    /// A folder of the pod's on the host, which every user may write to.
    fn folder(&self, name: &str) -> PathBuf {
        let uid = &self.pod.config.metadata.as_ref().unwrap().uid;
        let folder = self.node.volume(uid, "empty-dir", name);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        folder
    }

    /// A script to be run in a container, for as long as it takes.
    fn command(&self, container: &str, script: &str) -> Command {
        let number = self.execs.replace(self.execs.get() + 1);
        let exec = format!("script-{number}");
        let words = ["-n", CRI, "tasks", "exec", "--exec-id", &exec, container];
        let script = format!("set -eu\n{script}");
        let words = [&words[..], &["sh", "-c", &script]].concat();
        self.node.containerd.ctr_command(&words)
    }

    /// Runs a script in a container, and gives how it ended.
    fn ran(&self, container: &str, script: &str) -> Ran {
        self.command(container, script).output().unwrap().into()
    }

    /// Runs a script in a container, which has to succeed, and gives what it prints.
    fn sh(&self, what: &str, container: &str, script: &str) -> String {
        let ran = step(what, || self.ran(container, script));
        succeeded(what, ran)
    }

    /// Runs scripts at once, each in its container; all have to succeed.
    fn at_once<const N: usize>(&self, what: &str, scripts: [(&str, &str); N]) -> [String; N] {
        let children = scripts.map(|(container, script)| {
            let mut command = self.command(container, script);
            let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        });
        step(what, || {
            children.map(|child| succeeded(what, child.wait_with_output().unwrap().into()))
        })
    }

    /// What a container has written to its log so far.
    fn log(&self, name: &str) -> String {
        let path = Path::new(&self.pod.config.log_directory).join(format!("{name}.log"));
        fs::read_to_string(path).unwrap_or_default()
    }
}

fn succeeded(what: &str, ran: Ran) -> String {
    assert_eq!(ran.code, Some(0), "{what}: {ran:#?}");
    ran.stdout.trim_end().to_owned()
}

/// A container of the image.
fn container(name: &str, words: &[&str]) -> ContainerConfig {
    let mut config = node::container(name, words);
    config.image.get_or_insert_default().image = WORKLOADS.to_owned();
    config
}

/// A container of the image that runs until it is told to end.
fn waiting(name: &str) -> ContainerConfig {
    let mut config = node::waiting(name);
    config.image.get_or_insert_default().image = WORKLOADS.to_owned();
    config
}

/// Makes a pod such that containers in it can be privileged.
fn privileged_pod(config: &mut PodSandboxConfig) {
    pod_security(config).privileged = true;
}

fn privileged(config: &mut ContainerConfig) {
    security(config).privileged = true;
}
