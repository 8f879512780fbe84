//! podvmm as a child process.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Longer than any guest of the tests lives, on the slowest KVM.
const DEADLINE: Duration = Duration::from_secs(600);

/// Whether the tests that need KVM can run. Panics where they must and cannot.
pub fn kvm_is_here() -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    let skip = std::env::var_os("PODVMM_TESTS_WITHOUT_KVM").is_some_and(|value| value == "skip");
    assert!(
        skip,
        "no /dev/kvm; set PODVMM_TESTS_WITHOUT_KVM=skip to pass without these tests"
    );
    eprintln!("SKIPPED: no /dev/kvm");
    false
}

/// Copies a program that is to be run. Not by this process: a child that another test starts
/// meanwhile would hold the copy open for writing, and running it would fail ("text file busy").
pub fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").args([from, to]).status();
    assert!(status.expect("there is cp").success());
}

/// The binary under test: `PODVMM_BIN`, or the one cargo builds.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("PODVMM_BIN") {
        Some(path) => path.into(),
        None => build("vmm", "podvmm"),
    })
}

/// Builds a program of the workspace. A test executable lies in `target/<profile>/deps`, the program
/// one above.
pub(crate) fn build(package: &str, program: &str) -> PathBuf {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", package, "--bin", program])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "{program} does not build");
    let tests = std::env::current_exe().expect("a test knows its own path");
    let profile = tests
        .ancestors()
        .nth(2)
        .expect("a test lies in target/<profile>/deps");
    profile.with_file_name("debug").join(program)
}

/// A podvmm to be started.
#[derive(Debug)]
pub struct Podvmm {
    command: Command,
    input: Vec<u8>,
}

/// How it ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; None if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Podvmm {
    pub fn new<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(binary());
        command.args(arguments);
        Self {
            command,
            input: Vec::new(),
        }
    }

    /// Bytes for its standard input, which then ends.
    #[must_use]
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = bytes.to_vec();
        self
    }

    /// The largest file that it may make, in bytes.
    #[must_use]
    pub fn file_size_limit(mut self, bytes: u64) -> Self {
        let limit = Rlimit {
            current: Some(bytes),
            maximum: Some(bytes),
        };
        let set = move || Ok(setrlimit(Resource::Fsize, limit)?);
        // SAFETY: between fork and exec it makes one system call, and allocates nothing.
        unsafe { self.command.pre_exec(set) };
        self
    }

    /// The command, to be changed before it starts.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    pub fn spawn(mut self) -> Running {
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().expect("podvmm starts");
        let mut stdin = child.stdin.take().expect("it was piped");
        let input = self.input;
        // A thread, for a guest may read late; a closed pipe is its decision.
        thread::spawn(move || stdin.write_all(&input));
        let pid = child.id();
        Running {
            child: Some(child),
            pid,
        }
    }

    /// Runs it to its end.
    pub fn run(self) -> Outcome {
        self.spawn().wait()
    }
}

/// A podvmm that runs.
#[derive(Debug)]
pub struct Running {
    /// None once it is waited for.
    child: Option<Child>,
    pid: u32,
}

/// A test that fails leaves nothing running.
impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.pid()).expect("pids are positive");
        // SAFETY: the child has not been waited for, so the pid is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end, and kills it if that never comes.
    pub fn wait(mut self) -> Outcome {
        let pid = self.pid();
        let (done, waiting) = std::sync::mpsc::channel();
        let watchdog = thread::spawn(move || {
            if waiting.recv_timeout(DEADLINE).is_err() {
                eprintln!("podvmm {pid} hangs and is killed");
                // SAFETY: `wait_with_output` has not returned, so the pid is
                // still the child's.
                unsafe {
                    libc::kill(
                        i32::try_from(pid).expect("pids are positive"),
                        libc::SIGKILL,
                    )
                };
            }
        });
        let child = self.child.take().expect("it is waited for once");
        let output = child.wait_with_output().expect("podvmm is a child of ours");
        // The watchdog may have ended at its deadline.
        let _ = done.send(());
        watchdog.join().expect("the watchdog does not panic");
        assert_ne!(
            output.status.signal(),
            Some(libc::SIGKILL),
            "podvmm was killed"
        );
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
