//! A pod's agent in a guest, asked as a shim does, and containers for it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use prost::Message;
use protocol::agent::messages::{
    CheckRequest, CreateContainerRequest, Empty, ExecProcessRequest, GetMetricsRequest,
    HealthCheckResponse, Metrics, ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest,
    SignalProcessRequest, StartContainerRequest, UpdateContainerRequest, WaitProcessRequest,
    WaitProcessResponse,
};
use protocol::agent::oci::{
    Linux, LinuxCapabilities, LinuxNamespace, LinuxResources, Mount, Process, Root, Spec,
};
use protocol::agent::{AGENT_SERVICE, HEALTH_SERVICE, PORT};
use protocol::ttrpc::{CallError, Client, Code};

/// Where the guest has what the host shares.
pub const SHARED: &str = "/run/kata-containers/shared/containers";

/// The guest's kernel may be interpreted.
const PATIENCE: Duration = Duration::from_secs(120);

/// The agent in the guest.
#[derive(Debug)]
pub struct Agent(pub Client);

impl Agent {
    /// Waits for the guest to come up.
    pub fn reach(socket: &Path) -> Self {
        loop {
            match dial(socket) {
                Ok(stream) => return Self(Client::new(stream).expect("there are threads")),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Has it answer.
    pub fn check(&self) {
        let request = CheckRequest::default();
        let answer = self
            .0
            .call(HEALTH_SERVICE, "Check", &request, Some(PATIENCE));
        let _: HealthCheckResponse = answer.expect("it serves");
    }

    /// Calls a method of the agent's.
    pub fn ask<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.0.call(AGENT_SERVICE, method, request, Some(PATIENCE))
    }

    /// One of the agent's own figures.
    pub fn figure(&self, name: &str) -> u64 {
        let answer = self.ask("GetMetrics", &GetMetricsRequest {});
        let Metrics { metrics } = answer.expect("it tells its figures");
        let mut lines = metrics.lines().filter_map(|line| line.split_once(' '));
        let value = lines.find(|(key, _)| *key == name);
        let value = value.and_then(|(_, value)| value.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {metrics}"))
    }

    pub fn create(&self, id: &str, spec: Spec) -> Result<Empty, CallError> {
        self.create_with(id, spec, CreateContainerRequest::default())
    }

    /// With more than a specification.
    pub fn create_with(
        &self,
        id: &str,
        mut spec: Spec,
        more: CreateContainerRequest,
    ) -> Result<Empty, CallError> {
        if let Some(linux) = &mut spec.linux {
            linux.cgroups_path = format!("/../k8s.io/../pod/{id}");
        }
        let request = CreateContainerRequest {
            container_id: id.into(),
            exec_id: id.into(),
            oci: Some(spec),
            ..more
        };
        self.ask("CreateContainer", &request)
    }

    /// All that another process of a container prints and complains of, and its status.
    pub fn exec_shell(&self, id: &str, script: &str) -> (String, i32) {
        self.exec(id, script, shell(script)).expect("it can be");
        let (err, out, status) = self.outcome(id, script);
        (out + &err, status)
    }

    pub fn update(&self, id: &str, resources: LinuxResources) -> Result<Empty, CallError> {
        let request = UpdateContainerRequest {
            container_id: id.into(),
            resources: Some(resources),
        };
        self.ask("UpdateContainer", &request)
    }

    pub fn start(&self, id: &str) -> Result<Empty, CallError> {
        let container_id = id.into();
        self.ask("StartContainer", &StartContainerRequest { container_id })
    }

    /// All that a process prints, and its status.
    pub fn outcome(&self, id: &str, exec_id: &str) -> (String, String, i32) {
        let read = |method| {
            let mut text = String::new();
            loop {
                let request = ReadStreamRequest {
                    container_id: id.into(),
                    exec_id: exec_id.into(),
                    len: 4096,
                };
                let read: ReadStreamResponse = self.ask(method, &request).expect("it is there");
                if read.data.is_empty() {
                    return text;
                }
                text.push_str(&String::from_utf8_lossy(&read.data));
            }
        };
        let (err, out) = thread::scope(|scope| {
            let out = scope.spawn(|| read("ReadStdout"));
            (read("ReadStderr"), out.join().expect("it reads"))
        });
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
        };
        let end: WaitProcessResponse = self.ask("WaitProcess", &request).expect("it is there");
        (err, out, end.status)
    }

    pub fn run(&self, id: &str, spec: Spec) -> (String, String, i32) {
        self.create(id, spec).expect("it can be");
        self.start(id).expect("it is there");
        let (err, out, status) = self.outcome(id, id);
        self.remove(id);
        (out, err, status)
    }

    pub fn exec(&self, id: &str, exec_id: &str, process: Process) -> Result<Empty, CallError> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process),
            ..ExecProcessRequest::default()
        };
        self.ask("ExecProcess", &request)
    }

    pub fn signal(&self, id: &str, exec_id: &str, signal: u32) {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
        };
        let _: Empty = self.ask("SignalProcess", &request).expect("it is there");
    }

    pub fn remove(&self, id: &str) {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            timeout: 0,
        };
        let _: Empty = self.ask("RemoveContainer", &request).expect("it is there");
    }
}

fn dial(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
    }
    Ok(stream)
}

/// Why it was refused.
pub fn refusal(result: Result<Empty, CallError>) -> (Code, String) {
    match result {
        Err(CallError::Refused(status)) => (status.code, status.message),
        other => panic!("{other:?}"),
    }
}

/// Words as messages have them.
pub fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

/// A process that runs `script`.
pub fn shell(script: &str) -> Process {
    let capabilities = strings(&["CAP_CHOWN", "CAP_KILL"]);
    Process {
        args: strings(&["sh", "-c", script]),
        env: strings(&["PATH=/bin", "COLOUR=green"]),
        cwd: "/tmp".into(),
        capabilities: Some(LinuxCapabilities {
            bounding: capabilities.clone(),
            effective: capabilities.clone(),
            permitted: capabilities,
            ..LinuxCapabilities::default()
        }),
        no_new_privileges: true,
        ..Process::default()
    }
}

/// A mount of a file system without a source.
pub fn mount(kind: &str, destination: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        source: kind.into(),
        r#type: kind.into(),
        options: strings(options),
    }
}

/// A container of the shared root file system, as containerd describes one.
pub fn spec(script: &str) -> Spec {
    let namespace = |kind: &&str| LinuxNamespace {
        r#type: (*kind).into(),
        path: String::new(),
    };
    Spec {
        version: "1.0.2".into(),
        process: Some(shell(script)),
        root: Some(Root {
            path: format!("{SHARED}/one/rootfs"),
            readonly: false,
        }),
        mounts: vec![
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "tmpfs",
                "/dev",
                &["nosuid", "strictatime", "mode=755", "size=64k"],
            ),
            mount(
                "devpts",
                "/dev/pts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                ],
            ),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "cgroup",
                "/sys/fs/cgroup",
                &["nosuid", "noexec", "nodev", "ro"],
            ),
            Mount {
                destination: "/etc/greeting".into(),
                source: format!("{SHARED}/greeting"),
                r#type: "bind".into(),
                options: strings(&["rbind", "ro"]),
            },
        ],
        linux: Some(Linux {
            namespaces: ["pid", "ipc", "uts", "mount", "cgroup"]
                .iter()
                .map(namespace)
                .collect(),
            masked_paths: strings(&["/proc/kcore", "/sys/firmware", "/nowhere"]),
            readonly_paths: strings(&["/proc/sys"]),
            sysctl: BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "7".into())]),
            ..Linux::default()
        }),
        ..Spec::default()
    }
}
