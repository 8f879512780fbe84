//! Containers in a guest: the agent asked over vsock, as a shim does. The guest is restored from the kept
//! template: none of it is about booting.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

#[path = "pod/cgroups.rs"]
mod cgroups;
#[path = "pod/places.rs"]
mod places;
#[path = "pod/rights.rs"]
mod rights;
#[path = "pod/sharing.rs"]
mod sharing;

use std::fs;
use std::path::Path;

use protocol::agent::messages::{
    CgroupStats, CheckRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest,
    Device, Empty, GetOomEventRequest, GuestDetailsRequest, GuestDetailsResponse,
    HealthCheckResponse, OnlineCpuMemRequest, OomEvent, ReadStreamRequest, ReadStreamResponse,
    StatsContainerRequest, StatsContainerResponse, Storage, TtyWinResizeRequest,
    WriteStreamRequest, WriteStreamResponse,
};
use protocol::agent::oci::{
    Hook, Hooks, LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxNamespace,
    LinuxPids, LinuxResources, LinuxSeccomp, LinuxSyscall, LinuxThrottleDevice, Mount, PosixRlimit,
    User,
};
use protocol::agent::{FOLLOWS_THE_CLOCK, HEALTH_SERVICE, PIDS_OF_ANOTHER};
use protocol::ttrpc::Code;
use serde_json::json;
use tempfile::TempDir;
use tests::guest;
use tests::network::{alone, set_up};
use tests::node::step;
use tests::pod::{Agent, SHARED, refusal, shell, spec, strings};
use tests::podvmm::kvm_is_here;
use tests::template::{ON_DISK, Template, Vm};

#[test]
fn containers_are_what_their_specification_says() {
    if !kvm_is_here() {
        return;
    }
    let turn = guest::one_at_a_time();
    let template = Template::kept(&turn);
    alone(move || pod(template.as_ref()));
}

fn pod(template: Option<&Template>) {
    let host = TempDir::new().unwrap();
    let applets = [
        "sh", "cat", "ls", "hostname", "id", "sleep", "grep", "stty", "dd", "tail", "touch",
        "kill", "cut", "readlink", "wc", "mkdir", "chmod", "ping", "tr", "mknod",
    ];
    fs::create_dir(host.path().join("one")).unwrap();
    let root = guest::root(&applets);
    fs::rename(root.path(), host.path().join("one/rootfs")).unwrap();
    fs::write(host.path().join("greeting"), "hello\n").unwrap();
    let places = TempDir::new().unwrap();
    let net = json!({"tap": "pod0", "mac": sharing::HARDWARE});
    let mut vm = Vm::start(template, places.path(), host.path(), &net);
    set_up("pod0", "10.77.0.1/24");
    let agent = step("the agent answers", || vm.agent());
    let health: HealthCheckResponse = agent
        .0
        .call(HEALTH_SERVICE, "Check", &CheckRequest::default(), None)
        .unwrap();
    assert_eq!(health.status, 1);
    sharing::network(&agent);
    let blocks = GuestDetailsRequest {
        mem_block_size: true,
        mem_hotplug_probe: true,
    };
    let details: GuestDetailsResponse = agent.ask("GetGuestDetails", &blocks).unwrap();
    // x86's memory is added by so much at a time.
    assert_eq!(details.mem_block_size_bytes, 128 << 20);
    let details = details.agent_details.unwrap();
    assert!(details.init_daemon && details.supports_seccomp);
    assert_eq!(details.extra_features, [PIDS_OF_ANOTHER, FOLLOWS_THE_CLOCK]);
    vm.grow();
    let cpus = OnlineCpuMemRequest {
        wait: true,
        // In all, as Kata has it.
        nb_cpus: 2,
        cpu_only: true,
    };
    for _ in 0..2 {
        let _: Empty = agent.ask("OnlineCPUMem", &cpus).unwrap();
    }
    let _: Empty = agent.ask("CreateSandbox", &sandbox()).unwrap();

    step("first", || sharing::first(&agent));
    step("what it sees", || what_it_sees(&agent, host.path()));
    step("what it may do", || what_it_may_do(&agent));
    step("what it may call", || what_it_may_call(&agent));
    step("whom it may ask", || whom_it_may_ask(&agent));
    step("own streams", || rights::streams(&agent));
    step("limits", || rights::limits(&agent));
    step("ambient capabilities", || rights::ambient(&agent));
    step("keyrings", || rights::keyrings(&agent));
    step("devices", || rights::devices(&agent));
    step("own proc", || rights::own_proc(&agent));
    step("working directories", || {
        places::working_directories(&agent, host.path());
    });
    step("dangling links", || {
        places::dangling_links(&agent, host.path());
    });
    step("a false null device", || places::false_null(&agent));
    step("a divided cgroup", || cgroups::divided(&agent));
    step("streams and signals", || streams_and_signals(&agent));
    step("limits and figures", || limits_and_figures(&agent));
    // Its processes are killed one by one, and each may be told of.
    step("cgroup files", || cgroups::as_one(&agent));
    step("disks", || disks(&agent));
    step("what it mapped", || what_it_mapped(&agent, host.path()));
    step("refusals", || refusals(&agent));
    step("pings", || sharing::pings(&agent));
    step("files", || sharing::files(&agent));
    step("volumes", || sharing::volumes(&agent));
    step("shared pids", || sharing::shared_pids(&agent));
    step("pids of another", || sharing::pids_of_another(&agent));
    step("metrics", || sharing::metrics(&agent));

    let _: Empty = agent
        .ask("DestroySandbox", &DestroySandboxRequest {})
        .unwrap();
    drop(agent);
    vm.ended();
}

fn sandbox() -> CreateSandboxRequest {
    CreateSandboxRequest {
        hostname: "a-pod".into(),
        dns: strings(&["search pod.local", "nameserver 10.0.0.10"]),
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
                mount_point: sharing::SHM.into(),
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
        cd /proc/1/root; cat etc/greeting; ls /proc/self/fd | tr '\\n' ' '; exit 3";
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
        // The last one is the folder's own.
        "0 1 2 3 ",
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

fn syscalls(names: &[&str], action: &str, errno_ret: Option<u32>) -> LinuxSyscall {
    LinuxSyscall {
        names: strings(names),
        action: action.into(),
        errno_ret,
        args: Vec::new(),
    }
}

fn what_it_may_call(agent: &Agent) {
    // All but some, and without no-new-privileges.
    const FULL: u32 = 28;
    let mut held = spec("exec sleep 1000");
    held.linux.as_mut().unwrap().seccomp = Some(LinuxSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        flags: strings(&["SECCOMP_FILTER_FLAG_LOG"]),
        syscalls: vec![
            syscalls(&["mkdir", "mkdirat"], "SCMP_ACT_ERRNO", Some(FULL)),
            syscalls(
                &["chmod", "fchmodat", "fchmodat2", "no_such_call"],
                "SCMP_ACT_ERRNO",
                None,
            ),
            syscalls(&["sethostname"], "SCMP_ACT_KILL_PROCESS", None),
        ],
        ..LinuxSeccomp::default()
    });
    held.process.as_mut().unwrap().no_new_privileges = false;
    agent.create("held", held).unwrap();
    agent.start("held").unwrap();
    let script =
        "mkdir /tmp/new; chmod 700 /tmp; hostname other; echo $?; grep Seccomp: /proc/self/status";
    let (out, status) = agent.exec_shell("held", script);
    assert!(out.contains("No space left on device"), "{out}");
    assert!(out.contains("Operation not permitted"), "{out}");
    // 128 + SIGSYS
    assert!(
        out.contains("159\n") && out.contains("Seccomp:\t2"),
        "{out}"
    );
    assert_eq!(status, 0);
    agent.remove("held");

    // None but some, loaded last.
    let allowed = [
        "read",
        "write",
        "close",
        "stat",
        "fstat",
        "lstat",
        "newfstatat",
        "mmap",
        "mprotect",
        "munmap",
        "brk",
        "rt_sigaction",
        "rt_sigprocmask",
        "ioctl",
        "pread64",
        "execve",
        "exit",
        "exit_group",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "getpid",
        "getppid",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "fcntl",
        "getcwd",
        "open",
        "openat",
        "sigaltstack",
        "poll",
        "uname",
        "prctl",
    ];
    let mut few = spec("echo fine; touch /tmp/there; mkdir /tmp/new || echo refused");
    few.linux.as_mut().unwrap().seccomp = Some(LinuxSeccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        architectures: strings(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        syscalls: vec![syscalls(&allowed, "SCMP_ACT_ALLOW", None)],
        ..LinuxSeccomp::default()
    });
    let (out, err, _) = agent.run("few", few);
    // Not even a child may be had for touch and mkdir.
    assert_eq!(out, "fine\n", "{err}");
    assert!(err.contains("fork: Operation not permitted"), "{err}");
}

/// The agent is the host's: a container reaches its port, by the guest's own CID and by the local one,
/// and is not heard.
fn whom_it_may_ask(agent: &Agent) {
    let script = "for cid in 1 3; do guest_load vsock-knock $cid 1024 2>&1 || :; done";
    let (out, err, status) = agent.run("knocks", spec(script));
    let answers: Vec<_> = out.lines().collect();
    assert_eq!((answers.len(), status), (2, 0), "{out} {err}");
    for answer in answers {
        let refused = ["reset", "No such device", "refused", "timed out"];
        let is_refused = refused.iter().any(|reason| answer.contains(reason));
        assert!(answer == "ended" || is_refused, "{answer}");
    }
}

/// What a container wrote to a mapping is on the host once it is removed, though it was killed.
fn what_it_mapped(agent: &Agent, host: &Path) {
    agent
        .create("maps", spec("exec guest_load map /mapped"))
        .unwrap();
    agent.start("maps").unwrap();
    let request = ReadStreamRequest {
        container_id: "maps".into(),
        exec_id: "maps".into(),
        len: 7,
    };
    let said: ReadStreamResponse = agent.ask("ReadStdout", &request).unwrap();
    assert_eq!(said.data, b"mapped\n");
    agent.signal("maps", "maps", 9);
    agent.remove("maps");
    let written = fs::read(host.join("one/rootfs/mapped")).unwrap();
    assert_eq!(written[..6], *b"mapped");
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
    // What it leaves behind has its streams, and is not waited for.
    let (out, status) = agent.exec_shell("streams", "sleep 1000 & echo hi");
    assert_eq!((out.as_str(), status), ("hi\n", 0));
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
    let late = agent.exec("streams", "late", shell("true"));
    assert_eq!(refusal(late).1, "the container has ended");
    agent.remove("streams");
}

fn cpus(cpus: &str) -> LinuxCpu {
    LinuxCpu {
        cpus: cpus.into(),
        ..LinuxCpu::default()
    }
}

fn limits_and_figures(agent: &Agent) {
    let mut small = spec(
        "grep Cpus_allowed_list /proc/self/status; dd if=/dev/zero of=/dev/null bs=32M count=1; echo survived $?",
    );
    let linux = small.linux.as_mut().expect("spec() has it");
    linux.resources = Some(LinuxResources {
        memory: Some(LinuxMemory {
            limit: 16 << 20,
            ..LinuxMemory::default()
        }),
        pids: Some(LinuxPids { limit: 20 }),
        cpu: Some(cpus("1")),
        ..LinuxResources::default()
    });
    agent.create("small", small).unwrap();
    // Its first process is there, and waits.
    let small = stats(agent, "small");
    assert_eq!(small.memory_stats.unwrap().usage.unwrap().limit, 16 << 20);
    let pids = small.pids_stats.unwrap();
    assert_eq!((pids.current, pids.limit), (1, 20));
    let tiny = LinuxResources {
        memory: Some(LinuxMemory {
            limit: 4096,
            ..LinuxMemory::default()
        }),
        ..LinuxResources::default()
    };
    let (_, why) = refusal(agent.update("small", tiny));
    assert!(why.starts_with("a memory limit of 4096 bytes: "), "{why}");
    agent.start("small").unwrap();
    let (_, out, _) = agent.outcome("small", "");
    assert_eq!(out, "Cpus_allowed_list:\t1\nsurvived 137\n");
    let oom: OomEvent = agent.ask("GetOOMEvent", &GetOomEventRequest {}).unwrap();
    assert_eq!(oom.container_id, "small");
    agent.remove("small");

    agent.create("moved", spec("exec sleep 1000")).unwrap();
    agent.start("moved").unwrap();
    let resources = LinuxResources {
        cpu: Some(cpus("0")),
        ..LinuxResources::default()
    };
    agent.update("moved", resources).unwrap();
    let huge = LinuxHugepageLimit {
        pagesize: "2MB".into(),
        limit: 4 << 20,
    };
    let resources = LinuxResources {
        hugepage_limits: vec![huge],
        ..LinuxResources::default()
    };
    agent.update("moved", resources).unwrap();
    let stats = stats(agent, "moved");
    assert_eq!(stats.hugetlb_stats["2MB"].usage, 0);
    let (out, _) = agent.exec_shell("moved", "grep Cpus_allowed_list /proc/self/status");
    assert_eq!(out, "Cpus_allowed_list:\t0\n");
    agent.remove("moved");
}

fn disks(agent: &Agent) {
    let (number, _, _) = agent.run("number", spec("cat /sys/block/vda/dev"));
    let (major, minor) = number.trim().split_once(':').unwrap();
    let devices = vec![Device {
        r#type: "mmioblk".into(),
        vm_path: "/dev/vda".into(),
        container_path: "/dev/data".into(),
        ..Device::default()
    }];
    let more = CreateContainerRequest {
        devices,
        ..CreateContainerRequest::default()
    };
    // No process in the guest has read the far part of the disk before.
    let mut disk = spec(
        "test -b /dev/data && dd if=/dev/data bs=8 count=1 2>/dev/null
        dd if=/dev/data of=/dev/null bs=4096 skip=200 count=1 2>/dev/null
        cat /sys/fs/cgroup/io.max",
    );
    disk.linux.as_mut().unwrap().resources = Some(LinuxResources {
        block_io: Some(LinuxBlockIo {
            weight: 500,
            throttle_read_bps_device: vec![LinuxThrottleDevice {
                major: major.parse().unwrap(),
                minor: minor.parse().unwrap(),
                rate: 1 << 20,
            }],
            ..LinuxBlockIo::default()
        }),
        ..LinuxResources::default()
    });
    agent.create_with("disk", disk, more).unwrap();
    agent.start("disk").unwrap();
    let limits = "rbps=1048576 wbps=max riops=max wiops=max";
    let expected = format!("{ON_DISK}{major}:{minor} {limits}\n");
    assert_eq!(agent.outcome("disk", "").1, expected);
    let stats = stats(agent, "disk").blkio_stats.unwrap();
    let read = stats.io_service_bytes_recursive.iter();
    let read: u64 = read
        .filter(|entry| entry.op == "Read")
        .map(|entry| entry.value)
        .sum();
    assert!(read >= 4096, "{stats:?}");
    agent.remove("disk");
}

fn stats(agent: &Agent, id: &str) -> CgroupStats {
    let request = StatsContainerRequest {
        container_id: id.into(),
    };
    let stats: StatsContainerResponse = agent.ask("StatsContainer", &request).unwrap();
    stats.cgroup_stats.unwrap()
}

fn refusals(agent: &Agent) {
    let mut nowhere = spec("true");
    nowhere.process.as_mut().expect("spec() has it").args = strings(&["no-such-program"]);
    let (code, why) = refusal(agent.create("nowhere", nowhere));
    assert_eq!(code, Code::Internal);
    assert!(why.contains("no-such-program"), "{why}");
    // Nothing is left of it.
    agent.create("nowhere", spec("true")).unwrap();
    let (code, _) = refusal(agent.create("nowhere", spec("true")));
    assert_eq!(code, Code::AlreadyExists);
    agent.remove("nowhere");

    assert_eq!(refusal(agent.start("absent")).0, Code::NotFound);
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

    let mut hooked = spec("true");
    hooked.hooks = Some(Hooks {
        start_container: vec![Hook {
            path: "/bin/hook".into(),
            ..Hook::default()
        }],
        ..Hooks::default()
    });
    let (_, why) = refusal(agent.create("hooked", hooked));
    assert_eq!(
        why,
        "startContainer hook /bin/hook: no hooks are run in a guest"
    );
}
