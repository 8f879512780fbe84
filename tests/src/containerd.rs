//! A containerd of the tests' own, which knows podvmm's shim, and ctr for it. Needs root.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::{Builder, TempDir};

use crate::host::{self, PREFIX};
use crate::{guest, podvmm};

/// The image that containers are made of.
pub const BUSYBOX: &str = "docker.io/podvmm/busybox:1";

/// The image with the programs of tests/workloads.
pub const WORKLOADS: &str = "docker.io/podvmm/workloads:1";

/// The namespace of what CRI makes.
pub const CRI: &str = "k8s.io";

/// The namespaces that tests use: ctr's own, and that one.
const NAMESPACES: [&str; 2] = ["default", CRI];

/// What it and the shims print, in its folder.
const LOG: &str = "log";

/// The runtime under test as CRI knows it: `PODVMM_TEST_HANDLER`, or podvmm.
pub fn handler() -> String {
    std::env::var("PODVMM_TEST_HANDLER").unwrap_or_else(|_| "podvmm".to_owned())
}

/// The runtime of a handler as ctr knows it.
pub fn runtime(handler: &str) -> String {
    format!("io.containerd.{handler}.v2")
}

/// A containerd that runs. Dropped, it and all that it started end; if this program ends before that, or is
/// killed, a process of its own sees to it.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    guard: Child,
    folder: TempDir,
    /// Where the part of the log begins that its present user is to see.
    log_start: usize,
}

/// How a ctr ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Exit code; None if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Containerd {
    /// Starts one in a new folder, with the images of tests in the namespaces of ctr and CRI.
    pub fn start() -> Self {
        host::need_root();
        let folder = Builder::new().prefix(PREFIX).tempdir();
        let folder = folder.expect("there is a temporary folder");
        if handler() == "podvmm" {
            write_config(&folder.path().join("podvmm.toml"), &templates(), 0);
        }
        let mut containerd = Self {
            guard: guard(folder.path()),
            child: spawn(folder.path()),
            folder,
            log_start: 0,
        };
        containerd.wait_until_it_answers();
        for namespace in NAMESPACES {
            for image in image_files() {
                containerd.ctr_must(&["-n", namespace, "images", "import", &image]);
            }
        }
        containerd
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// All that is its own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the runtime is to read, if it reads anything.
    pub fn runtime_config(&self) -> Option<PathBuf> {
        let path = self.folder().join("podvmm.toml");
        path.exists().then_some(path)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it and the shims have printed, since [`Self::begin_log`].
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.whole_log()[self.log_start..]).into_owned()
    }

    /// Has the log begin here for a test, which is to see nothing of those before it.
    pub(crate) fn begin_log(&mut self) {
        self.log_start = self.whole_log().len();
    }

    fn whole_log(&self) -> Vec<u8> {
        fs::read(self.folder().join(LOG)).expect("the log is there")
    }

    /// Panics if it knows of a container.
    pub(crate) fn has_no_containers(&self) {
        for namespace in NAMESPACES {
            let left = self.ctr_must(&["-n", namespace, "containers", "ls", "--quiet"]);
            assert_eq!(left, "", "containers that are left in {namespace}");
        }
    }

    /// ctr, to be given more arguments.
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.socket()).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs ctr to its end.
    pub fn ctr(&self, arguments: &[&str]) -> Ran {
        let output = self.ctr_command(arguments).output();
        output
            .expect("containerd is installed; resources/test does that")
            .into()
    }

    /// Runs ctr, which has to succeed, and gives what it prints.
    pub fn ctr_must(&self, arguments: &[&str]) -> String {
        let ran = self.ctr(arguments);
        assert_eq!(ran.code, Some(0), "ctr {}: {ran:?}", arguments.join(" "));
        ran.stdout
    }

    /// Ends it by `signal` and starts it again; what runs in shims runs on.
    pub fn restart(&mut self, signal: i32) {
        self.restart_after(signal, || ());
    }

    /// The same, with something done while there is none.
    pub fn restart_after(&mut self, signal: i32, meanwhile: impl FnOnce()) {
        self.signal(signal);
        self.wait_for_its_end();
        meanwhile();
        self.child = spawn(self.folder.path());
        self.wait_until_it_answers();
    }

    /// A containerd that was asked to end may wait for a client's call: it is given 10 s.
    fn wait_for_its_end(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self
            .child
            .try_wait()
            .expect("it is a child of ours")
            .is_none()
        {
            if Instant::now() > deadline {
                eprintln!("containerd does not end when asked to: killed");
                self.signal(libc::SIGKILL);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("pids are positive");
        // SAFETY: the child has not been waited for, so the pid is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    fn wait_until_it_answers(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.ctr(&["version"]).code != Some(0) {
            let ended = self.child.try_wait().expect("it is a child of ours");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "containerd does not answer, {ended:?}: {}",
                self.log()
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let lines = log.lines().filter(|line| !line.contains("level=info"));
            let lines: Vec<_> = lines.collect();
            let last = lines.len().saturating_sub(40);
            eprintln!("containerd said:\n{}", lines[last..].join("\n"));
        }
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut clean = Command::new(script("containerd"));
        clean.arg("--clean").arg(self.folder());
        if !with_shim(&mut clean).status().is_ok_and(|it| it.success()) {
            eprintln!("resources/containerd --clean fails");
        }
        // Nothing is left for it to do.
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../resources")
        .join(name)
}

/// Has resources/containerd find the shim under test.
fn with_shim(command: &mut Command) -> &mut Command {
    if handler() == "podvmm" {
        command.env("PODVMM_BIN_DIR", shim_folder());
    }
    command
}

/// What ends the containerd of a folder when this program has ended, which its input tells it. It waits for
/// the turn of a test that another program runs meanwhile, and compares the host for.
fn guard(folder: &Path) -> Child {
    const SCRIPT: &str = r#"read -r _; exec flock --close "$0" "$1" --clean "$2""#;
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT]).arg(guest::turns());
    command.arg(script("containerd")).arg(folder);
    // A signal for this program's group does not end it.
    command.process_group(0).stdin(Stdio::piped());
    with_shim(&mut command).spawn().expect("there is a shell")
}

fn spawn(folder: &Path) -> Child {
    let log = folder.join(LOG);
    let log = File::options().create(true).append(true).open(log);
    let log = log.expect("the folder is writable");
    let mut command = Command::new(script("containerd"));
    command
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("there are file descriptors"))
        .stderr(log);
    if handler() == "podvmm" {
        command.env("PODVMM_CONFIG", folder.join("podvmm.toml"));
    }
    let child = with_shim(&mut command).spawn();
    child.expect("resources/containerd is there")
}

/// What the shim is told of: the monitor, the guest, where its templates are, and how many VMs wait
/// for pods. VMs can grow to two CPUs, also on a host with one.
pub fn write_config(path: &Path, templates: &Path, pool: usize) {
    let guest = guest::folder();
    let text = format!(
        "podvmm = {:?}\nkernel = {:?}\ninitramfs = {:?}\ntemplates = {:?}\n\
         pool = {pool}\nmax_vcpus = 2\ntransport = {:?}\n",
        podvmm::binary(),
        guest.join("vmlinux"),
        guest.join("initramfs.cpio"),
        templates,
        guest::transport(),
    );
    fs::write(path, text).expect("the folder is writable");
}

/// Where the templates of all nodes are, so that one boot serves all tests. `PODVMM_TEST_TEMPLATES`
/// names another folder; empty, every pod boots.
pub fn templates() -> PathBuf {
    match std::env::var_os("PODVMM_TEST_TEMPLATES") {
        Some(folder) => folder.into(),
        None => {
            let tests = std::env::current_exe().expect("a test knows its own path");
            let target = tests.ancestors().nth(3);
            let target = target.expect("a test lies in target/<profile>/deps");
            target.join("tmp/podvmm-templates")
        }
    }
}

/// Whether pods are restored from templates at all.
pub fn has_templates() -> bool {
    !templates().as_os_str().is_empty()
}

/// The shim under test: `PODVMM_SHIM`, or the one cargo builds.
pub fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| match std::env::var_os("PODVMM_SHIM") {
        Some(path) => path.into(),
        None => podvmm::build("shim", "containerd-shim-podvmm-v2"),
    })
}

fn shim_folder() -> &'static Path {
    shim().parent().expect("it lies in a folder")
}

/// The archives of all images that tests need.
pub fn image_files() -> Vec<String> {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    let images = IMAGES.get_or_init(|| made("PODVMM_TEST_IMAGES", "images"));
    let files = ["busybox.tar", "pause.tar"].map(|file| images.join(file));
    files
        .iter()
        .map(|file| file.display().to_string())
        .collect()
}

/// The folder with the image [`WORKLOADS`]: its archive and its files.
pub fn workloads() -> PathBuf {
    made("PODVMM_TEST_WORKLOADS", "workloads")
}

/// The folder that a variable names, or else the one that a script of resources makes.
fn made(variable: &str, name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os(variable) {
        return folder.into();
    }
    let output = Command::new(script(name))
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("resources/{name}: {error}"));
    assert!(output.status.success(), "resources/{name} fails");
    let printed = String::from_utf8_lossy(&output.stdout);
    printed.lines().last().expect("it prints a folder").into()
}
