//! A pod of the real shim, whose podvmm is `lying_podvmm`, and whose containerd is the test.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use prost::Message;
use protocol::containerd::any;
use protocol::containerd::events::{ForwardRequest, TaskExit, TaskOnly};
use protocol::containerd::task::{
    ConnectResponse, CreateTaskRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    Options, PidResponse, ProcessRequest, SERVICES, ShutdownRequest, WaitResponse,
};
use protocol::ttrpc::{self, Call, CallError, Client, Service, Status, Workers};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::containerd::shim;

/// Longer than the shim takes to answer anything that it need not ask the guest more than once for.
pub(crate) const DEADLINE: Duration = Duration::from_secs(15);
/// The longest reason that the shim gives, in characters.
const MAX_REASON: usize = 4096;
/// The longest line of the shim's log, in bytes: what a FIFO takes in one piece (pipe(7), PIPE_BUF).
const MAX_LINE: usize = 4096;
/// The most lines that a pod's log has here: 500 of its guest's at once, one more each second, and the shim's own.
const MAX_LINES: usize = 700;

/// A containerd for one pod: where its events and its log go.
#[derive(Debug, Default)]
struct Heard {
    /// By topic and container: how many events.
    events: Mutex<Vec<(String, String)>>,
    exits: Mutex<Vec<TaskExit>>,
    log: Mutex<Vec<String>>,
}

impl Service for Heard {
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        call.answer(|forwarded: ForwardRequest| {
            let envelope = forwarded.envelope.expect("there is one");
            let event = envelope.event.expect("there is one").value;
            // All events have their container's identifier first.
            let of = TaskOnly::decode(&event[..]).map(|event| event.container_id);
            if envelope.topic == "/tasks/exit" {
                let exit = TaskExit::decode(&event[..]).expect("it is one");
                self.exits.lock().unwrap().push(exit);
            }
            let event = (envelope.topic, of.unwrap_or_default());
            self.events.lock().unwrap().push(event);
            Ok(Empty {})
        })
    }
}

/// What a process has of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holds {
    pub(crate) most_resident_kib: usize,
    pub(crate) threads: usize,
    pub(crate) descriptors: usize,
}

/// A pod whose shim runs.
pub(crate) struct Pod {
    pub(crate) id: String,
    folder: TempDir,
    place: PathBuf,
    client: Client,
    heard: Arc<Heard>,
    shim: u32,
    is_over: bool,
}

impl Pod {
    /// Starts a shim for a pod of that name, whose guest tells these lies, as in [`lies`].
    pub(crate) fn start(id: &str, lies: &str) -> Self {
        Self::with_network(id, lies, None)
    }

    /// The same with a path of a network namespace.
    pub(crate) fn with_network(id: &str, lies: &str, network: Option<&str>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix(tests::host::PREFIX)
            .tempdir()
            .unwrap();
        let config = format!(
            "podvmm = {:?}\nkernel = '/dev/null'\ninitramfs = '/dev/null'\ntemplates = ''\njail = 'off'\n\
             agent_timeout_s = 4\nmax_vcpus = 64\nmax_memory_mib = 65536\n",
            env!("CARGO_BIN_EXE_lying_podvmm")
        );
        fs::write(folder.path().join("config.toml"), config).unwrap();
        let heard = Arc::<Heard>::default();
        let events = folder.path().join("events.sock");
        serve(&events, &heard);
        let bundle = bundle(folder.path(), id, id, network);
        listen(&bundle.join("log"), &heard);
        let mut command = command(id, folder.path(), &bundle);
        command
            .arg("start")
            .env("TTRPC_ADDRESS", &events)
            .env("LIES", lies);
        let started = command.output().unwrap();
        assert!(started.status.success(), "{id}: {started:?}");
        let address = String::from_utf8(started.stdout).unwrap();
        let socket = PathBuf::from(address.strip_prefix("unix://").unwrap());
        let client = Client::new(UnixStream::connect(&socket).unwrap()).unwrap();
        let mut pod = Self {
            id: id.into(),
            folder,
            place: socket.parent().unwrap().into(),
            client,
            heard,
            shim: 0,
            is_over: false,
        };
        let ConnectResponse { shim_pid, .. } = pod.ask("Connect", &pod.process(id, "")).unwrap();
        pod.shim = shim_pid;
        pod
    }

    /// One that runs, so that its guest has told the truth so far.
    pub(crate) fn running(id: &str, lies: &str) -> Self {
        let pod = Self::start(id, lies);
        let id = pod.id.clone();
        pod.create(&id).unwrap();
        pod.begin(&id, "").unwrap();
        pod
    }

    pub(crate) fn process(&self, container: &str, exec: &str) -> ProcessRequest {
        ProcessRequest {
            id: container.into(),
            exec_id: exec.into(),
        }
    }

    /// Asks the shim, which has to answer in time, and with a reason that is fit to be shown.
    pub(crate) fn ask<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, String> {
        self.ask_within(method, request, DEADLINE)
    }

    pub(crate) fn ask_within<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
        deadline: Duration,
    ) -> Result<A, String> {
        let answer = self
            .client
            .call(SERVICES[0], method, request, Some(deadline));
        answer.map_err(|error| match error {
            CallError::Refused(status) => {
                let why = status.message;
                let length = why.chars().count();
                assert!(length <= MAX_REASON, "{}: {method}: {length}", self.id);
                let is_plain = !why.chars().any(char::is_control);
                assert!(is_plain, "{}: {method}: {why:?}", self.id);
                why
            }
            // As it may be after it was told to end.
            CallError::Gone(_) => "the shim has ended".into(),
            other => panic!("{}: {method}: {other}; {:#?}", self.id, self.log()),
        })
    }

    pub(crate) fn create(&self, container: &str) -> Result<PidResponse, String> {
        let bundle = match container == self.id {
            true => self.folder.path().join(container),
            false => bundle(self.folder.path(), container, &self.id, None),
        };
        let options = Options {
            config_path: self.folder.path().join("config.toml").display().to_string(),
            ..Options::default()
        };
        let request = CreateTaskRequest {
            id: container.into(),
            bundle: bundle.display().to_string(),
            options: Some(any("runtimeoptions.v1.Options", &options)),
            ..CreateTaskRequest::default()
        };
        self.ask("Create", &request)
    }

    /// Starts a container's first process, or an exec.
    pub(crate) fn begin(&self, container: &str, exec: &str) -> Result<PidResponse, String> {
        self.ask("Start", &self.process(container, exec))
    }

    /// Adds an exec of this name to the pod's first container, and starts it. `streams` are paths for its input
    /// and its output.
    pub(crate) fn exec(&self, exec: &str, streams: [&str; 2]) -> Result<PidResponse, String> {
        let spec = json!({"args": [exec], "cwd": "/"}).to_string();
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: streams[0].into(),
            stdout: streams[1].into(),
            spec: Some(prost_types::Any {
                type_url: String::new(),
                value: spec.into_bytes(),
            }),
            ..ExecProcessRequest::default()
        };
        let Empty {} = self.ask("Exec", &request).unwrap();
        self.begin(&self.id, exec)
    }

    pub(crate) fn kill(&self, container: &str, exec: &str, signal: u32) -> Result<Empty, String> {
        let request = KillRequest {
            id: container.into(),
            exec_id: exec.into(),
            signal,
            all: false,
        };
        self.ask("Kill", &request)
    }

    /// Waits for a process's end, and returns its status.
    pub(crate) fn wait(&self, container: &str, exec: &str, deadline: Duration) -> u32 {
        let request = self.process(container, exec);
        let end: WaitResponse = self.ask_within("Wait", &request, deadline).unwrap();
        end.exit_status
    }

    pub(crate) fn delete(&self, container: &str, exec: &str) -> Result<DeleteResponse, String> {
        self.ask("Delete", &self.process(container, exec))
    }

    /// Kills the pod as containerd does, and sees that nothing is left of it.
    pub(crate) fn end(self) {
        self.end_within(DEADLINE);
    }

    /// The same for one whose end may take its time.
    pub(crate) fn end_within(self, deadline: Duration) {
        // It may have ended already, or have refused.
        let _ = self.kill(&self.id, "", 9);
        self.wait(&self.id, "", deadline);
        self.delete(&self.id, "").unwrap();
        self.shut_down();
    }

    /// Ends the shim, whatever its pod does, and sees that nothing is left.
    pub(crate) fn shut_down(self) {
        let vmm = self.order_shutdown();
        self.leaves_nothing(vmm);
    }

    /// Tells the shim to end, whatever its pod does. Returns the process that stood for podvmm.
    pub(crate) fn order_shutdown(&self) -> Option<u32> {
        let vmm = self.vmm();
        let request = ShutdownRequest {
            id: self.id.clone(),
            now: true,
        };
        let Empty {} = self.ask("Shutdown", &request).unwrap();
        vmm
    }

    /// Sees that neither the shim is left nor `vmm`, nor anything else.
    pub(crate) fn leaves_nothing(mut self, vmm: Option<u32>) {
        let began = Instant::now();
        let place = self.place.display().to_string();
        let is_over = || {
            let runs = [Some(self.shim), vmm].into_iter().flatten().any(is_alive);
            !runs && !self.place.exists() && !mounts().contains(&place)
        };
        while !is_over() {
            assert!(
                began.elapsed() < DEADLINE,
                "{}: shim {} {}, VMM {vmm:?}, {}: {}, mounts: {}\n{:#?}",
                self.id,
                self.shim,
                is_alive(self.shim),
                place,
                self.place.exists(),
                mounts().contains(&place),
                self.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
        self.is_over = true;
        let log = self.log();
        let longest = log.iter().map(String::len).max().unwrap_or(0);
        assert!(longest < MAX_LINE, "{}: {longest}", self.id);
        assert!(log.len() <= MAX_LINES, "{}: {}", self.id, log.len());
        let is_whole =
            |line: &&String| line.starts_with("level=") && line.ends_with("runtime=podvmm");
        let broken = log.iter().find(|line| !is_whole(line));
        assert_eq!(broken, None, "{}", self.id);
        let complains = log.iter().find(|line| line.contains("panicked"));
        assert_eq!(complains, None, "{}", self.id);
    }

    /// The process that stands for podvmm, if it was started.
    pub(crate) fn vmm(&self) -> Option<u32> {
        let record = fs::read(self.place.join("record.json")).ok()?;
        let record: Value = serde_json::from_slice(&record).ok()?;
        u32::try_from(record["vmm"][0].as_u64()?).ok()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.heard.log.lock().unwrap().clone()
    }

    /// How many events of this topic there were of a container.
    pub(crate) fn events(&self, topic: &str, container: &str) -> usize {
        let events = self.heard.events.lock().unwrap();
        let these = events.iter().filter(|(a, b)| a == topic && b == container);
        these.count()
    }

    /// The events of processes' ends.
    pub(crate) fn exits(&self) -> Vec<TaskExit> {
        self.heard.exits.lock().unwrap().clone()
    }

    /// What the shim has of the host now.
    pub(crate) fn holds(&self) -> Holds {
        let proc = PathBuf::from(format!("/proc/{}", self.shim));
        let status = fs::read_to_string(proc.join("status")).unwrap();
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let number = line.unwrap().split_whitespace().next();
            number.unwrap().parse().unwrap()
        };
        let count = |folder: &str| fs::read_dir(proc.join(folder)).unwrap().count();
        Holds {
            most_resident_kib: kib("VmHWM:"),
            threads: count("task"),
            descriptors: count("fd"),
        }
    }
}

impl Drop for Pod {
    /// A case that fails leaves nothing either.
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let shim_pid = i32::try_from(self.shim).unwrap();
        // SAFETY: it is this pod's shim, which was not seen to end.
        unsafe { libc::kill(shim_pid, libc::SIGKILL) };
        let bundle = self.folder.path().join(&self.id);
        let deleted = command(&self.id, self.folder.path(), &bundle)
            .arg("delete")
            .output();
        drop(deleted);
    }
}

/// The shim as containerd calls it.
fn command(id: &str, folder: &Path, bundle: &Path) -> Command {
    let mut command = Command::new(shim());
    command.args(["-namespace", "liars", "-id", id, "-address"]);
    command.arg(folder.join("containerd.sock"));
    command.arg("-bundle").arg(bundle).stdin(Stdio::null());
    command
}

/// A FIFO in a folder, open at the test's end for both, so that neither end is ever missing.
pub(crate) fn fifo(path: &Path) -> File {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
    let mut options = File::options();
    options.read(true).write(true).open(path).unwrap()
}

fn serve(socket: &Path, heard: &Arc<Heard>) {
    let listener = UnixListener::bind(socket).unwrap();
    let service: Arc<dyn Service> = Arc::<Heard>::clone(heard);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, service) = (stream.unwrap(), Arc::clone(&service));
            let writer = stream.try_clone().unwrap();
            thread::spawn(move || ttrpc::serve(stream, writer, &service, &Workers::default()));
        }
    });
}

/// Keeps the lines that are written to the FIFO for a log.
fn listen(path: &Path, heard: &Arc<Heard>) {
    let file = fifo(path);
    let heard = Arc::clone(heard);
    thread::spawn(move || {
        for line in BufReader::new(file).split(b'\n') {
            let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
            heard.log.lock().unwrap().push(line);
        }
    });
}

/// The folder of a container of `pod`, as containerd makes it.
fn bundle(folder: &Path, id: &str, pod: &str, network: Option<&str>) -> PathBuf {
    let bundle = folder.join(id);
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let annotations = match id == pod {
        true => json!({}),
        false => json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod,
        }),
    };
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "annotations": annotations,
        "linux": {"namespaces": [
            {"type": "network", "path": network.unwrap_or_default()},
            {"type": "pid"}, {"type": "ipc"}, {"type": "mount"},
        ]},
    });
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    bundle
}

/// Whether there is such a process that has not ended.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.starts_with('Z'));
    state == Some(false)
}

fn mounts() -> String {
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}
