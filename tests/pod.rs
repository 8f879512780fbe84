//! Containers in a guest: the agent asked over vsock, as a shim does. One boot.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use agent::protocol::agent::{
    CheckRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, Empty,
    ExecProcessRequest, GetOomEventRequest, GuestDetailsRequest, GuestDetailsResponse,
    HealthCheckResponse, OomEvent, ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, StatsContainerResponse,
    Storage, TtyWinResizeRequest, WaitProcessRequest, WaitProcessResponse, WriteStreamRequest,
    WriteStreamResponse,
};
use agent::protocol::oci::{
    Linux, LinuxCapabilities, LinuxMemory, LinuxNamespace, LinuxPids, LinuxResources, Mount,
    PosixRlimit, Process, Root, Spec, User,
};
use agent::protocol::{AGENT_SERVICE, HEALTH_SERVICE, PORT};
use agent::ttrpc::{CallError, Client, Code};
use prost::Message;
use tempfile::TempDir;
use tests::podvmm::kvm_is_here;
use tests::{Podvmm, guest};

const SHARED: &str = "/run/kata-containers/shared/containers";

/// The guest's kernel may be interpreted.
const PATIENCE: Duration = Duration::from_secs(120);

/// The agent in the guest.
struct Agent(Client);

impl Agent {
    /// Waits for the guest to come up.
    fn reach(socket: &Path) -> Self {
        loop {
            match dial(socket) {
                Ok(stream) => return Self(Client::new(stream).expect("there are threads")),
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    fn ask<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.0.call(AGENT_SERVICE, method, request, Some(PATIENCE))
    }

    fn create(&self, id: &str, spec: Spec) -> Result<Empty, CallError> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            exec_id: id.into(),
            oci: Some(spec),
            ..CreateContainerRequest::default()
        };
        self.ask("CreateContainer", &request)
    }

    fn start(&self, id: &str) -> Result<Empty, CallError> {
        let container_id = id.into();
        self.ask("StartContainer", &StartContainerRequest { container_id })
    }

    /// All that a process prints, and its status.
    fn outcome(&self, id: &str, exec_id: &str) -> (String, String, i32) {
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

    fn run(&self, id: &str, spec: Spec) -> (String, String, i32) {
        self.create(id, spec).expect("it can be");
        self.start(id).expect("it is there");
        let (err, out, status) = self.outcome(id, id);
        self.remove(id);
        (out, err, status)
    }

    fn exec(&self, id: &str, exec_id: &str, process: Process) -> Result<Empty, CallError> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process),
            ..ExecProcessRequest::default()
        };
        self.ask("ExecProcess", &request)
    }

    fn signal(&self, id: &str, exec_id: &str, signal: u32) {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
        };
        let _: Empty = self.ask("SignalProcess", &request).expect("it is there");
    }

    fn remove(&self, id: &str) {
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

fn refusal(result: Result<Empty, CallError>) -> (Code, String) {
    match result {
        Err(CallError::Refused(status)) => (status.code, status.message),
        other => panic!("{other:?}"),
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn shell(script: &str) -> Process {
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

fn mount(kind: &str, destination: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        source: kind.into(),
        r#type: kind.into(),
        options: strings(options),
    }
}

/// A container of the shared root file system, as containerd describes one.
fn spec(script: &str) -> Spec {
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
            cgroups_path: "/../k8s.io/../pod/box".into(),
            masked_paths: strings(&["/proc/kcore", "/sys/firmware", "/nowhere"]),
            readonly_paths: strings(&["/proc/sys"]),
            sysctl: BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "7".into())]),
            ..Linux::default()
        }),
        ..Spec::default()
    }
}

#[test]
fn containers_are_what_their_specification_says() {
    if !kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let host = TempDir::new().unwrap();
    let applets = [
        "sh", "cat", "ls", "hostname", "id", "sleep", "grep", "stty", "dd", "tail", "touch",
        "kill", "cut", "readlink", "wc", "mkdir",
    ];
    fs::create_dir(host.path().join("one")).unwrap();
    let root = guest::root(&applets);
    fs::rename(root.path(), host.path().join("one/rootfs")).unwrap();
    fs::write(host.path().join("greeting"), "hello\n").unwrap();
    let sockets = TempDir::new().unwrap();
    let vsock = sockets.path().join("vsock");
    let kernel = guest::folder().join("vmlinux");
    let initramfs = guest::folder().join("initramfs.cpio");
    let running = Podvmm::new([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initramfs",
        initramfs.to_str().unwrap(),
        "--cmdline",
        "podvmm.pod",
        "--cpus",
        "boot=2",
        "--serial",
        "null",
        "--fs",
        &format!("tag=kataShared,shared_dir={}", host.path().display()),
        "--vsock",
        &format!("cid=3,socket={}", vsock.display()),
    ])
    .spawn();
    let agent = Agent::reach(&vsock);
    let health: HealthCheckResponse = agent
        .0
        .call(HEALTH_SERVICE, "Check", &CheckRequest::default(), None)
        .unwrap();
    assert_eq!(health.status, 1);
    let details: GuestDetailsResponse = agent
        .ask("GetGuestDetails", &GuestDetailsRequest::default())
        .unwrap();
    assert!(details.agent_details.unwrap().init_daemon);
    let _: Empty = agent.ask("CreateSandbox", &sandbox()).unwrap();

    what_it_sees(&agent, host.path());
    what_it_may_do(&agent);
    streams_and_signals(&agent);
    limits_and_figures(&agent);
    refusals(&agent);

    let _: Empty = agent
        .ask("DestroySandbox", &DestroySandboxRequest {})
        .unwrap();
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

fn sandbox() -> CreateSandboxRequest {
    CreateSandboxRequest {
        hostname: "a-pod".into(),
        sandbox_id: "sandbox".into(),
        storages: vec![
            Storage {
                driver: "virtio-fs".into(),
                source: "kataShared".into(),
                fstype: "virtiofs".into(),
                mount_point: format!("{SHARED}/"),
                ..Storage::default()
            },
            Storage {
                driver: "ephemeral".into(),
                source: "shm".into(),
                fstype: "tmpfs".into(),
                mount_point: "/run/kata-containers/sandbox/shm".into(),
                options: strings(&["noexec", "nosuid", "nodev", "mode=1777", "size=65536"]),
                ..Storage::default()
            },
        ],
        ..CreateSandboxRequest::default()
    }
}

fn what_it_sees(agent: &Agent, host: &Path) {
    let script = "echo $$ $COLOUR $HOME; hostname; readlink /proc/self/cwd; cat /etc/greeting
        touch /made; touch /etc/greeting 2>/dev/null && echo wrote
        cat /proc/self/cgroup; ls -A /sys/firmware | wc -l; ls /dev | wc -l
        echo 1 2>/dev/null >/proc/sys/kernel/printk && echo wrote
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ls /proc | grep -c '^[0-9]'
        cat /proc/1/root/etc/greeting; exit 3";
    let (out, err, status) = agent.run("sees", spec(script));
    let seen: Vec<_> = out.lines().collect();
    let expected = [
        "1 green /",
        "a-pod",
        "/tmp",
        "hello",
        "0::/",
        "0",
        "12",
        "7",
        "3",
        "hello",
    ];
    assert_eq!((seen, status), (expected.to_vec(), 3), "{err}");
    assert!(host.join("one/rootfs/made").exists());

    let mut readonly = spec("touch /more; touch /tmp/more");
    readonly.root.as_mut().expect("spec() has it").readonly = true;
    let (_, err, status) = agent.run("readonly", readonly);
    assert_eq!(status, 1);
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
}

fn what_it_may_do(agent: &Agent) {
    let mut user = spec(
        "id; grep -E 'Cap(Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status; ulimit -n; cat /proc/self/oom_score_adj",
    );
    let process = user.process.as_mut().expect("spec() has it");
    process.user = Some(User {
        uid: 1000,
        gid: 1001,
        additional_gids: vec![7],
        username: String::new(),
    });
    process.rlimits = vec![PosixRlimit {
        r#type: "RLIMIT_NOFILE".into(),
        hard: 50,
        soft: 40,
    }];
    process.oom_score_adj = 200;
    process
        .capabilities
        .as_mut()
        .expect("spec() has it")
        .ambient = strings(&["CAP_KILL"]);
    process
        .capabilities
        .as_mut()
        .expect("spec() has it")
        .inheritable = strings(&["CAP_KILL"]);
    let (out, err, status) = agent.run("user", user);
    let expected = [
        "uid=1000 gid=1001 groups=7",
        // CAP_KILL is number 5, CAP_CHOWN number 0.
        "CapEff:\t0000000000000020",
        "CapBnd:\t0000000000000021",
        "CapAmb:\t0000000000000020",
        "NoNewPrivs:\t1",
        "40",
        "200",
    ];
    assert_eq!(
        (out.lines().collect::<Vec<_>>(), status),
        (expected.to_vec(), 0),
        "{err}"
    );
}

fn streams_and_signals(agent: &Agent) {
    agent
        .create("streams", spec("cat; echo ended >&2; sleep 1000"))
        .unwrap();
    agent.start("streams").unwrap();
    let input = |data: &[u8]| {
        let request = WriteStreamRequest {
            container_id: "streams".into(),
            exec_id: String::new(),
            data: data.to_vec(),
        };
        let written: WriteStreamResponse = agent.ask("WriteStdin", &request).unwrap();
        written.len
    };
    assert_eq!(input(b"typed\n"), 6);
    input(b"");
    let mut tty = shell("stty size; kill -0 1 && echo $$; exit 9");
    tty.terminal = true;
    agent.exec("streams", "tty", tty).unwrap();
    let size = TtyWinResizeRequest {
        container_id: "streams".into(),
        exec_id: "tty".into(),
        row: 10,
        column: 20,
    };
    let _: Empty = agent.ask("TtyWinResize", &size).unwrap();
    let (_, out, status) = agent.outcome("streams", "tty");
    assert!(out.lines().count() == 2 && status == 9, "{out} {status}");
    agent
        .exec("streams", "slept", shell("exec sleep 1000"))
        .unwrap();
    agent.signal("streams", "slept", 15);
    assert_eq!(agent.outcome("streams", "slept").2, 143);
    agent.signal("streams", "", 9);
    let (err, out, status) = agent.outcome("streams", "");
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("typed\n", "ended\n", 137)
    );
    agent.remove("streams");
}

fn limits_and_figures(agent: &Agent) {
    let mut small = spec("dd if=/dev/zero of=/dev/null bs=32M count=1; echo survived $?");
    let linux = small.linux.as_mut().expect("spec() has it");
    linux.resources = Some(LinuxResources {
        memory: Some(LinuxMemory {
            limit: 16 << 20,
            ..LinuxMemory::default()
        }),
        pids: Some(LinuxPids { limit: 20 }),
        ..LinuxResources::default()
    });
    agent.create("small", small).unwrap();
    // Its first process is there, and waits.
    let figures = StatsContainerRequest {
        container_id: "small".into(),
    };
    let stats: StatsContainerResponse = agent.ask("StatsContainer", &figures).unwrap();
    let stats = stats.cgroup_stats.unwrap();
    assert_eq!(stats.memory_stats.unwrap().usage.unwrap().limit, 16 << 20);
    let pids = stats.pids_stats.unwrap();
    assert_eq!((pids.current, pids.limit), (1, 20));
    agent.start("small").unwrap();
    let (_, out, _) = agent.outcome("small", "");
    assert!(out.starts_with("survived 137"), "{out}");
    let oom: OomEvent = agent.ask("GetOOMEvent", &GetOomEventRequest {}).unwrap();
    assert_eq!(oom.container_id, "small");
    agent.remove("small");
}

fn refusals(agent: &Agent) {
    let mut nowhere = spec("true");
    nowhere.process.as_mut().expect("spec() has it").args = strings(&["no-such-program"]);
    agent.create("nowhere", nowhere).unwrap();
    let (code, why) = refusal(agent.start("nowhere"));
    assert_eq!(code, Code::Internal);
    assert!(why.contains("no-such-program"), "{why}");
    let (code, _) = refusal(agent.create("nowhere", spec("true")));
    assert_eq!(code, Code::AlreadyExists);
    agent.remove("nowhere");

    assert_eq!(refusal(agent.start("nobody")).0, Code::NotFound);
    assert_eq!(
        refusal(agent.ask("Dance", &Empty {})).0,
        Code::Unimplemented
    );
    let mut apart = spec("true");
    apart
        .linux
        .as_mut()
        .unwrap()
        .namespaces
        .push(LinuxNamespace {
            r#type: "user".into(),
            path: String::new(),
        });
    let (_, why) = refusal(agent.create("apart", apart));
    assert_eq!(why, "a user namespace is not possible in a pod's VM");
    let mut lost = spec("true");
    lost.mounts.push(Mount {
        destination: "/data".into(),
        source: "/no/such/folder".into(),
        r#type: "bind".into(),
        options: Vec::new(),
    });
    let (_, why) = refusal(agent.create("lost", lost));
    assert!(why.starts_with("mount /no/such/folder on /data: "), "{why}");
}
