//! A node without a kubelet: a containerd, what a kubelet makes on the host for a pod, and pods.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::{Builder, TempDir};

use crate::containerd::{self, BUSYBOX, Containerd};
use crate::cri::config::{
    ContainerConfig, ContainerMetadata, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
};
use crate::cri::requests::ExecSyncResponse;
use crate::cri::status::{ContainerState, ContainerStatus};
use crate::cri::{Cri, Refusal};
use crate::host::{Cgroup, PREFIX, Snapshot};

/// Longer than anything takes in a guest that runs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Does something and prints how long it took.
pub fn step<T>(name: &str, action: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = action();
    took(start, name);
    result
}

/// Says how long something took.
pub(crate) fn took(start: Instant, what: &str) {
    eprintln!("{:7.1}s {what}", start.elapsed().as_secs_f32());
}

/// Waits for `condition`, and panics if it never holds.
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    within(PATIENCE, what, condition);
}

/// Waits for `condition`, and panics if it does not hold in time.
pub fn within(patience: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// A containerd and what belongs to it. `end` checks that nothing is left.
#[derive(Debug)]
pub struct Node {
    pub cri: Cri,
    pub containerd: Containerd,
    /// The runtime under test, as CRI knows it.
    pub handler: String,
    folder: Folder,
    cgroup: Cgroup,
    before: Snapshot,
    is_shared: bool,
    pods: Cell<u32>,
}

/// A folder that things may be mounted in. A test that fails leaves nothing mounted.
#[derive(Debug)]
struct Folder(TempDir);

impl Drop for Folder {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let points: Vec<_> = points
            .filter(|point| Path::new(point).starts_with(&self.0))
            .collect();
        for point in points.into_iter().rev() {
            // What stays mounted is for a snapshot to find.
            let _ = Command::new("umount").args(["--lazy", point]).status();
        }
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    pub id: String,
    pub config: PodSandboxConfig,
}

/// How a program in a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    pub stdout: String,
    pub stderr: String,
    pub status: i32,
}

impl From<ExecSyncResponse> for Exec {
    fn from(answer: ExecSyncResponse) -> Self {
        Self {
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            status: answer.exit_code,
        }
    }
}

impl Node {
    /// One whose containerd no other test has: it may be restarted, and its end is checked, too.
    pub fn start() -> Self {
        let before = Snapshot::take();
        Self::of(Containerd::start(), before, false)
    }

    /// One whose containerd other tests have had and will have. If a test fails, its containerd ends with it,
    /// and the next test starts another.
    pub fn shared() -> Self {
        // In two steps: what is started is not started under the lock.
        let left = idle().take();
        let mut containerd = left.unwrap_or_else(Containerd::start);
        containerd.begin_log();
        Self::of(containerd, Snapshot::take(), true)
    }

    fn of(containerd: Containerd, before: Snapshot, is_shared: bool) -> Self {
        let cgroup = Cgroup::new(&format!("podvmm-test-{}", std::process::id()));
        let folder = Builder::new().prefix(PREFIX).tempdir();
        Self {
            cri: Cri::connect(&containerd.socket()),
            containerd,
            handler: containerd::handler(),
            folder: Folder(folder.expect("there is a temporary folder")),
            cgroup,
            before,
            is_shared,
            pods: Cell::new(0),
        }
    }

    /// Ends containerd, or leaves it to the next test, and panics if anything on the host is not as it was.
    pub fn end(self) {
        let Self {
            cri,
            containerd,
            folder,
            cgroup,
            before,
            is_shared,
            ..
        } = self;
        drop(cri);
        // This is checked before the test cleans up: a pod that was removed has no shim left.
        let socket = containerd.socket().display().to_string();
        eventually("shims end with their pods", || {
            processes_with(&["containerd-shim-", &socket]).is_empty()
        });
        // One that is not shared ends here.
        let stays = is_shared.then_some(containerd);
        if let Some(containerd) = &stays {
            containerd.has_no_containers();
        }
        drop(folder);
        drop(cgroup);
        before.check("after the node's end");
        if stays.is_some() {
            *idle() = stays;
        }
    }

    /// Whether pods are virtual machines.
    pub fn is_podvmm(&self) -> bool {
        self.handler == "podvmm"
    }

    /// Where logs and volumes are.
    pub fn folder(&self) -> &Path {
        self.folder.0.path()
    }

    /// The cgroup that pods are to be in.
    pub fn cgroup(&self) -> &str {
        self.cgroup.path()
    }

    /// A new folder as the kubelet makes it for a volume of a pod.
    pub fn volume(&self, pod: &str, kind: &str, name: &str) -> PathBuf {
        let folder = self.folder().join("pods").join(pod);
        let folder = folder
            .join("volumes")
            .join(format!("kubernetes.io~{kind}"))
            .join(name);
        fs::create_dir_all(&folder).expect("the folder is writable");
        folder
    }

    /// A pod as the kubelet describes the plainest one.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let number = self.pods.replace(self.pods.get() + 1);
        let logs = self.folder().join(format!("logs-{number}"));
        fs::create_dir_all(&logs).expect("the folder is writable");
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(own_namespaces()),
            ..LinuxSandboxSecurityContext::default()
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-{number}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup().to_owned(),
                security_context: Some(security),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    pub fn run_pod(&self, config: PodSandboxConfig) -> Pod {
        let name = config.hostname.clone();
        let pod = step(&format!("pod {name}"), || {
            self.run_pod_of(config, &self.handler)
        });
        pod.unwrap_or_else(|refusal| panic!("pod {name}: {refusal}"))
    }

    /// Runs a pod by a given handler.
    pub fn run_pod_of(&self, config: PodSandboxConfig, handler: &str) -> Result<Pod, Refusal> {
        let id = self.cri.run_pod(&config, handler)?;
        Ok(Pod { id, config })
    }

    /// Runs a container in a pod and gives its id.
    pub fn run(&self, pod: &Pod, config: &ContainerConfig) -> String {
        let name = config.metadata.clone().unwrap_or_default().name;
        step(&format!("container {name}"), || {
            let created = self.cri.create(&pod.id, &pod.config, config);
            let id = created.unwrap_or_else(|refusal| panic!("container {name}: {refusal}"));
            let started = self.cri.start(&id);
            started.unwrap_or_else(|refusal| panic!("container {name}: {refusal}"));
            id
        })
    }

    /// Runs a program in a container.
    pub fn exec(&self, container: &str, words: &[&str]) -> Exec {
        let start = Instant::now();
        let answer = self.cri.exec_sync(container, words, 0);
        let answer = answer.unwrap_or_else(|refusal| panic!("{words:?}: {refusal}"));
        let exec = Exec::from(answer);
        let words = words.join(" ").replace('\n', " ");
        took(start, &format!("exec {words}: status {}", exec.status));
        exec
    }

    /// Runs a script in a container, which has to succeed, and gives what it prints.
    pub fn sh(&self, container: &str, script: &str) -> String {
        let exec = self.exec(container, &["sh", "-c", script]);
        assert_eq!(exec.status, 0, "{script}: {exec:?}");
        exec.stdout.trim_end().to_owned()
    }

    /// The same for several scripts at once: it is the start of a program that takes long where the
    /// guest's kernel is interpreted.
    pub fn sh_each<const N: usize>(&self, container: &str, scripts: [&str; N]) -> [String; N] {
        const END: char = '\u{1}';
        let all = scripts.map(|script| format!("{{ {script}\n}} || exit\nprintf '\\001'\n"));
        let printed = self.sh(container, &all.concat());
        let parts: Vec<_> = printed.split_terminator(END).collect();
        let parts = parts.into_iter().map(|part| part.trim_end().to_owned());
        let parts: Vec<_> = parts.collect();
        parts.try_into().expect("each script has succeeded")
    }

    /// How a container ended, once it has.
    pub fn ended(&self, container: &str) -> ContainerStatus {
        let status = || self.cri.container_status(container).expect("it is there");
        let exited = ContainerState::Exited as i32;
        eventually("the container ends", || status().state == exited);
        status()
    }

    /// Stops a pod and forgets it.
    pub fn remove_pod(&self, pod: &Pod) {
        step(&format!("end of pod {}", pod.config.hostname), || {
            let stopped = self.cri.stop_pod(&pod.id);
            stopped.unwrap_or_else(|refusal| panic!("{refusal}"));
            let removed = self.cri.remove_pod(&pod.id);
            removed.unwrap_or_else(|refusal| panic!("{refusal}"));
        });
    }

    /// The pod's address.
    pub fn address(&self, pod: &Pod) -> String {
        let status = self.cri.pod_status(&pod.id).expect("it is there");
        let address = status.network.unwrap_or_default().ip;
        assert!(!address.is_empty(), "the pod has no address");
        address
    }
}

/// The containerd that the tests of this program share, while none of them has it.
fn idle() -> MutexGuard<'static, Option<Containerd>> {
    static IDLE: Mutex<Option<Containerd>> = Mutex::new(None);
    IDLE.lock().expect("it is locked for a moment")
}

/// The namespaces of a pod that asks for none in particular.
pub fn own_namespaces() -> NamespaceOption {
    use crate::cri::config::NamespaceMode::{Container, Pod};
    NamespaceOption {
        network: Pod as i32,
        pid: Container as i32,
        ipc: Pod as i32,
        target_id: String::new(),
    }
}

/// A container of busybox.
pub fn container(name: &str, words: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: BUSYBOX.to_owned(),
            ..ImageSpec::default()
        }),
        command: words.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// A container that runs until it is told to end, at once then. Its log says when it can be told.
pub fn waiting(name: &str) -> ContainerConfig {
    let script = "trap 'exit 0' TERM; echo waits; while :; do sleep 1000 & wait $!; done";
    container(name, &["sh", "-c", script])
}

/// The security context of a container, to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// The security context of a pod, to be changed.
pub fn pod_security(config: &mut PodSandboxConfig) -> &mut LinuxSandboxSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// A file or folder of the host in a container.
pub fn mount(host: &Path, container: &str) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        ..Mount::default()
    }
}

/// Processes whose command line has all of `parts`.
pub fn processes_with(parts: &[&str]) -> Vec<i32> {
    let output = Command::new("ps").args(["-eo", "pid=,args="]).output();
    let output = output.expect("procps is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text
        .lines()
        .filter(|line| parts.iter().all(|part| line.contains(part)));
    lines
        .filter_map(|line| line.split_whitespace().next()?.parse().ok())
        .collect()
}
