//! What a newcomer does on a Kubernetes node, with the node's own containerd: install podvmm, run a
//! pod beside those of runc, look at it, install another version, and uninstall.
//!
//! Needs root, systemd, cgroups of version 2 and a service `containerd` that has nothing else to do,
//! as `resources/node` has them. On other hosts it says that it is skipped.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_norway::Value;
use tempfile::{Builder, TempDir};
use tests::containerd;
use tests::cri::Cri;
use tests::cri::config::{
    ContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    PodSandboxConfig, PodSandboxMetadata,
};
use tests::guest;
use tests::host::{PREFIX, Snapshot, need_root};
use tests::node::{Exec, container, eventually, own_namespaces, processes_with, step, waiting};
use tests::podvmm;
use tests::tree::manifest;

const CONFIG: &str = "/etc/containerd/config.toml";
const SHIM: &str = "/opt/podvmm/current/containerd-shim-podvmm-v2";
const MIB: i64 = 1 << 20;

/// Why this host is not for this test, if so.
fn unfit() -> Option<String> {
    let is_there = |path: &str| Path::new(path).exists();
    if !is_there("/run/systemd/system") || !is_there("/sys/fs/cgroup/cgroup.controllers") {
        return Some("needs systemd and cgroups of version 2".into());
    }
    if !is_there(CONFIG)
        || !run(&["systemctl", "is-active", "containerd"])
            .status
            .success()
    {
        return Some("needs a service containerd of the system's, which runs".into());
    }
    if is_there("/opt/podvmm") || is_there("/etc/podvmm") {
        return Some("podvmm is installed on this host".into());
    }
    for namespace in said(&["ctr", "namespaces", "list", "-q"]).lines() {
        let words = ["ctr", "-n", namespace, "containers", "list", "-q"];
        if !said(&words).is_empty() {
            return Some(format!("the system's containerd is in use, by {namespace}"));
        }
    }
    None
}

#[test]
fn a_newcomers_walk() {
    if let Some(why) = unfit() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    if !podvmm::kvm_is_here() {
        return;
    }
    need_root();
    let _one = guest::one_at_a_time();
    let system = System::prepare();
    let first = Release::new("first", "");
    let second = Release::new("second", "another version");
    let before = step("the host as it is", Host::take);
    system.connected();

    let plain = system.run_pod("plain", "runc");
    let beside = system.run(&plain, &waiting("beside"));
    let first = step("install", || first.install());
    assert_eq!(system.sh(&beside, "echo runs"), "runs", "while installed");
    let configured = fs::read_to_string(CONFIG).unwrap();

    let pod = system.run_pod("walk", "podvmm");
    assert_eq!(pod.version(), first);
    example(&system);
    let inside = system.run(&pod, &limited("inside", 64 * MIB, 50));
    seen_inside(&system, &inside, &plain);
    seen_on_the_host(&pod);
    by_ctr();

    refused_to_uninstall();
    let second = step("install another version", || second.install());
    assert_ne!(second, first);
    assert_eq!(fs::read_to_string(CONFIG).unwrap(), configured);
    goes_on(&system, &pod, &inside, &first);
    let later = system.run_pod("later", "podvmm");
    assert_eq!(later.version(), second);
    let other = system.run(&later, &waiting("other"));
    assert_eq!(system.sh(&other, "echo runs"), "runs");

    let restart = ["systemctl", "restart", "containerd"];
    step("containerd restarts", || must(&restart));
    system.connected();
    goes_on(&system, &pod, &inside, &first);
    for pod in [&pod, &later] {
        system.remove(pod);
    }
    step("uninstall", || must(&[INSTALLER, "--uninstall"]));
    system.connected();
    let refusal = Cri::connect(&system.socket()).run_pod(&system.config("none"), "podvmm");
    let refusal = refusal.unwrap_err();
    assert!(refusal.message.contains("podvmm"), "{refusal}");
    assert_eq!(system.sh(&beside, "echo runs"), "runs", "uninstalled");
    system.remove(&plain);
    must(&["systemctl", "stop", "kubepods.slice"]);
    step("the host compared", || before.check());
}

/// As a newcomer has it from the repository.
const INSTALLER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../resources/kubernetes/install"
);

fn run(words: &[&str]) -> Output {
    let mut command = Command::new(words[0]);
    let output = command.args(&words[1..]).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

fn said(words: &[&str]) -> String {
    let output = run(words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn must(words: &[&str]) {
    said(words);
}

/// The files of a version of podvmm.
struct Release(TempDir);

impl Release {
    /// The one under test, with something after the end of its programs, which changes nothing.
    fn new(name: &str, end: &str) -> Self {
        let folder = Builder::new().prefix(&format!("{PREFIX}{name}-")).tempdir();
        let folder = folder.unwrap();
        for program in [podvmm::binary(), containerd::shim()] {
            let place = folder.path().join(program.file_name().unwrap());
            fs::copy(program, &place).unwrap();
            let mut file = OpenOptions::new().append(true).open(place).unwrap();
            file.write_all(end.as_bytes()).unwrap();
        }
        for file in ["vmlinux", "initramfs.cpio"] {
            fs::copy(guest::folder().join(file), folder.path().join(file)).unwrap();
        }
        Self(folder)
    }

    /// Gives the version's name.
    fn install(&self) -> String {
        must(&[INSTALLER, "--from", self.0.path().to_str().unwrap()]);
        let version = fs::read_link("/opt/podvmm/current").unwrap();
        version.display().to_string()
    }
}

/// The node's containerd, with the images of tests. A first pod has run: its network's bridge and
/// containerd's folders stay, and are no pod's of this test.
struct System {
    folder: TempDir,
}

struct Pod {
    id: String,
    config: PodSandboxConfig,
}

impl Pod {
    fn scope(&self) -> PathBuf {
        let parent = &self.config.linux.as_ref().unwrap().cgroup_parent;
        let scope = format!("cri-containerd-{}.scope", self.id);
        Path::new("/sys/fs/cgroup").join(&parent[1..]).join(scope)
    }

    fn vmm(&self) -> i32 {
        let found = processes_with(&["podvmm ", "--api-socket", &self.id]);
        assert_eq!(found.len(), 1, "VMs of {}: {found:?}", self.id);
        found[0]
    }

    /// That of the program that runs it.
    fn version(&self) -> String {
        let program = fs::read_link(format!("/proc/{}/exe", self.vmm())).unwrap();
        let folder = program.parent().unwrap().file_name().unwrap();
        folder.to_str().unwrap().to_owned()
    }
}

impl System {
    fn prepare() -> Self {
        let system = Self {
            folder: Builder::new().prefix(PREFIX).tempdir().unwrap(),
        };
        for image in containerd::image_files() {
            must(&["ctr", "-n", containerd::CRI, "images", "import", &image]);
        }
        let first = system.run_pod("first", "runc");
        system.run(&first, &waiting("warm"));
        system.remove(&first);
        must(&["systemctl", "stop", "kubepods.slice"]);
        system
    }

    fn socket(&self) -> PathBuf {
        "/run/containerd/containerd.sock".into()
    }

    fn cri(&self) -> Cri {
        Cri::connect(&self.socket())
    }

    /// Waits for a containerd that was started again.
    fn connected(&self) {
        eventually("containerd answers", || {
            run(&["ctr", "version"]).status.success()
        });
        eventually("its CRI answers", || self.cri().pods().is_ok());
    }

    /// A pod as the kubelet describes one of the class Guaranteed, with the path of its slice.
    fn config(&self, name: &str) -> PodSandboxConfig {
        let uid = format!("{name}_{}", std::process::id());
        let logs = self.folder.path().join(name);
        fs::create_dir_all(&logs).unwrap();
        // Limits as of all containers, and half a CPU asked for.
        let resources = LinuxContainerResources {
            cpu_shares: 512,
            ..resources(256 * MIB, 100)
        };
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(own_namespaces()),
            ..LinuxSandboxSecurityContext::default()
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods.slice/kubepods-pod{uid}.slice"),
                security_context: Some(security),
                resources: Some(resources),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    fn run_pod(&self, name: &str, handler: &str) -> Pod {
        let config = self.config(name);
        let linux = config.linux.as_ref().unwrap();
        let slice = linux.cgroup_parent.rsplit('/').next().unwrap();
        must(&["systemctl", "start", slice]);
        let limits = ["MemoryMax=332M", "CPUQuota=105%"];
        must(
            &[
                &["systemctl", "set-property", "--runtime", slice],
                &limits[..],
            ]
            .concat(),
        );
        let id = step(&format!("pod {name}"), || {
            self.cri().run_pod(&config, handler)
        });
        let id = id.unwrap_or_else(|refusal| panic!("pod {name}: {refusal}"));
        Pod { id, config }
    }

    fn run(&self, pod: &Pod, config: &ContainerConfig) -> String {
        let cri = self.cri();
        step(&config.log_path, || {
            let id = cri.create(&pod.id, &pod.config, config).unwrap();
            cri.start(&id).unwrap();
            id
        })
    }

    fn sh(&self, container: &str, script: &str) -> String {
        let answer = self.cri().exec_sync(container, &["sh", "-c", script], 0);
        let exec = Exec::from(answer.unwrap_or_else(|refusal| panic!("{script}: {refusal}")));
        assert_eq!(exec.status, 0, "{script}: {exec:?}");
        exec.stdout.trim_end().to_owned()
    }

    fn remove(&self, pod: &Pod) {
        step(&format!("end of pod {}", pod.config.hostname), || {
            self.cri().stop_pod(&pod.id).unwrap();
            self.cri().remove_pod(&pod.id).unwrap();
        });
        eventually("its scope is gone", || !pod.scope().exists());
        assert!(processes_with(&[&pod.id]).is_empty());
    }
}

impl Drop for System {
    /// A test that failed leaves the host as it found it, too.
    fn drop(&mut self) {
        run(&["systemctl", "start", "containerd"]);
        if !run(&["ctr", "version"]).status.success() {
            eprintln!("the system's containerd does not answer: podvmm stays installed");
            return;
        }
        let cri = self.cri();
        for pod in cri.pods().unwrap_or_default() {
            let _ = cri.stop_pod(&pod.id);
            let _ = cri.remove_pod(&pod.id);
        }
        run(&["systemctl", "stop", "kubepods.slice"]);
        run(&[INSTALLER, "--uninstall"]);
        let images = ["ctr", "-n", containerd::CRI, "images"];
        let listed = run(&[&images[..], &["list", "-q"]].concat()).stdout;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        for image in listed.lines().filter(|name| name.contains("podvmm/")) {
            run(&[&images[..], &["remove", image]].concat());
        }
    }
}

/// All that installing and pods may change.
struct Host {
    snapshot: Snapshot,
    files: BTreeMap<PathBuf, String>,
}

impl Host {
    /// While containerd does not run: it is restarted in between.
    fn take() -> Self {
        must(&["systemctl", "stop", "containerd"]);
        let snapshot = Snapshot::take();
        let files = Self::files();
        must(&["systemctl", "start", "containerd"]);
        Self { snapshot, files }
    }

    fn files() -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        for folder in ["/etc/containerd", "/opt", "/usr/local"] {
            let below = manifest(Path::new(folder)).unwrap().into_iter();
            files.extend(below.map(|(path, text)| (Path::new(folder).join(path), text)));
        }
        for folder in ["/etc", "/var/lib", "/run"] {
            let entries = fs::read_dir(folder).unwrap();
            let paths = entries.map(|entry| entry.unwrap().path());
            let paths = paths.filter(|path| path.to_str().unwrap().contains("podvmm"));
            files.extend(paths.map(|path| (path, String::new())));
        }
        files
    }

    fn check(&self) {
        must(&["systemctl", "stop", "containerd"]);
        let files = Self::files();
        self.snapshot.check("after uninstalling");
        must(&["systemctl", "start", "containerd"]);
        assert_eq!(files, self.files);
    }
}

fn resources(memory: i64, cpu_percent: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 1000 * cpu_percent,
        cpu_shares: 1024 * cpu_percent / 100,
        memory_limit_in_bytes: memory,
        ..LinuxContainerResources::default()
    }
}

fn limited(name: &str, memory: i64, cpu_percent: i64) -> ContainerConfig {
    let mut config = waiting(name);
    let linux = config.linux.get_or_insert_default();
    linux.resources = Some(resources(memory, cpu_percent));
    config
}

/// The pod of the manifest for newcomers, whose log says what it shows.
fn example(system: &System) {
    let manifest = Path::new(INSTALLER).with_file_name("pod.yaml");
    let manifest: Value = serde_norway::from_str(&fs::read_to_string(manifest).unwrap()).unwrap();
    assert_eq!(manifest["spec"]["runtimeClassName"], "podvmm");
    let described = &manifest["spec"]["containers"][0];
    let words = described["command"].as_sequence().unwrap();
    let words: Vec<_> = words.iter().map(|word| word.as_str().unwrap()).collect();
    assert_eq!(described["resources"]["limits"]["cpu"], "1");
    assert_eq!(described["resources"]["limits"]["memory"], "256Mi");
    let mut config = container("example", &words);
    config.linux.get_or_insert_default().resources = Some(resources(256 * MIB, 100));
    let pod = system.run_pod("example", "podvmm");
    system.run(&pod, &config);
    let log = Path::new(&pod.config.log_directory).join("example.log");
    let text = || fs::read_to_string(&log).unwrap_or_default();
    eventually("the log is whole", || text().contains("MemTotal"));
    let text = text();
    let lines: Vec<_> = text
        .lines()
        .map(|line| line.splitn(4, ' ').last().unwrap())
        .collect();
    let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(
        lines[0] != own.trim() && lines[0].contains("podvmm"),
        "{text}"
    );
    assert_eq!(lines[1], "1", "{text}");
    let total = lines[2].split_whitespace().nth(1).unwrap();
    let total: i64 = total.parse().unwrap();
    assert!((256..320).contains(&(total >> 10)), "{text}");
    system.remove(&pod);
}

fn seen_inside(system: &System, inside: &str, plain: &Pod) {
    let limits = system.sh(inside, "cd /sys/fs/cgroup; cat memory.max cpu.max");
    assert_eq!(limits, format!("{}\n50000 100000", 64 * MIB));
    let status = system
        .cri()
        .exec_sync(inside, &["sh", "-c", "echo to >&2; exit 7"], 0);
    let exec = Exec::from(status.unwrap());
    assert_eq!((exec.stderr.as_str(), exec.status), ("to\n", 7));
    let status = system.cri().pod_status(&plain.id).unwrap();
    let address = status.network.unwrap_or_default().ip;
    system.sh(inside, &format!("ping -q -c 1 -W 60 {address}"));
}

/// The pod's scope is in the kubelet's slice, with the pod's weight there and all of its processes.
fn seen_on_the_host(pod: &Pod) {
    let scope = pod.scope();
    let read = |file: &str| fs::read_to_string(scope.join(file)).unwrap();
    let processes = read("cgroup.procs");
    let shim = processes_with(&["containerd-shim-podvmm-v2", "-id", &pod.id]);
    for process in shim.iter().chain(&[pod.vmm()]) {
        let process = process.to_string();
        assert!(processes.lines().any(|line| line == process), "{processes}");
    }
    // 512 shares, as runc counts them.
    assert_eq!(read("cpu.weight"), "59\n");
    assert_eq!(read("../cpu.max"), "105000 100000\n");
    assert_eq!(read("../memory.max"), format!("{}\n", 332 * MIB));
    let used: i64 = read("memory.current").trim().parse().unwrap();
    assert!(used > 4 * MIB && used < 332 * MIB, "{used} bytes of memory");
}

/// The installer does not put the shim on containerd's `PATH`, so ctr is given the file.
fn by_ctr() {
    // A pod's size, for which there is a template.
    let options = ["--memory-limit", "268435456", "--cpus", "1"];
    let words = [
        &[
            "ctr",
            "-n",
            containerd::CRI,
            "run",
            "--rm",
            "--runtime",
            SHIM,
        ][..],
        &options,
        &[containerd::BUSYBOX, "by-ctr", "uname", "-r"],
    ];
    let printed = step("ctr run", || said(&words.concat()));
    assert!(printed.contains("podvmm"), "{printed}");
    if said(&["containerd", "--version"]).contains(" 1.") {
        eprintln!("containerd 1 cannot be asked for what a runtime can do");
        return;
    }
    let words = ["ctr", "plugins", "inspect-runtime", "--runtime", SHIM];
    let printed = said(&words);
    assert!(printed.contains("\"io.containerd.podvmm.v2\""), "{printed}");
    assert!(printed.contains("\"rro\""), "{printed}");
}

fn refused_to_uninstall() {
    let output = run(&[INSTALLER, "--uninstall"]);
    assert!(!output.status.success());
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(why.contains("pods still run"), "{why}");
    assert!(Path::new(SHIM).exists());
}

/// A pod whose version is no longer installed still runs, and new containers start in it.
fn goes_on(system: &System, pod: &Pod, inside: &str, version: &str) {
    assert_eq!(pod.version(), version, "its VM is still the same");
    assert_eq!(system.sh(inside, "echo runs"), "runs");
    let more = system.run(pod, &waiting("more"));
    assert_eq!(system.sh(&more, "echo more"), "more");
    system.cri().stop(&more, 30).unwrap();
    system.cri().remove(&more).unwrap();
}
