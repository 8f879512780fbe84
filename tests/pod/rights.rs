//! What a container's processes may open, use and be: as runc has it on a node.

use protocol::agent::messages::{
    CreateContainerRequest, Device, WriteStreamRequest, WriteStreamResponse,
};
use protocol::agent::oci::{LinuxDeviceCgroup, LinuxResources, PosixRlimit, Process, User};
use tests::pod::{Agent, shell, spec, strings};

fn by_user(uid: u32, mut process: Process) -> Process {
    process.user = Some(User {
        uid,
        gid: 1001,
        ..User::default()
    });
    process
}

/// A user opens its standard streams by their names in /dev, as pipes and as terminals.
pub(crate) fn streams(agent: &Agent) {
    let script = "echo out >/dev/stdout; echo err >/dev/stderr; : </dev/stdin && echo in";
    let mut own = spec(script);
    own.process = own.process.map(|process| by_user(1000, process));
    let (out, err, status) = agent.run("own-streams", own);
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("out\nin\n", "err\n", 0)
    );

    let console = "echo out >/dev/stdout; echo tty >/dev/tty; echo console >/dev/console";
    let mut terminal = spec(&format!("{console}; read line; exec sleep 1000"));
    terminal.process = terminal.process.map(|process| Process {
        terminal: true,
        ..by_user(1000, process)
    });
    agent.create("own-terminal", terminal).unwrap();
    agent.start("own-terminal").unwrap();
    for (name, terminal) in [("by-pipes", false), ("by-terminal", true)] {
        let process = Process {
            terminal,
            ..by_user(1234, shell("echo out >/dev/stdout; echo err >/dev/stderr"))
        };
        agent.exec("own-terminal", name, process).unwrap();
        let (err, out, status) = agent.outcome("own-terminal", name);
        let said = (out + &err).replace('\r', "");
        assert_eq!((said.as_str(), status), ("out\nerr\n", 0), "{name}");
    }
    let typed = WriteStreamRequest {
        container_id: "own-terminal".into(),
        exec_id: String::new(),
        data: b"\n".to_vec(),
    };
    let _: WriteStreamResponse = agent.ask("WriteStdin", &typed).unwrap();
    agent.signal("own-terminal", "", 9);
    let (_, out, _) = agent.outcome("own-terminal", "");
    let out = out.replace('\r', "");
    assert!(out.starts_with("out\ntty\nconsole\n"), "{out}");
    agent.remove("own-terminal");
}

/// Without limits of its own a container has those of containerd's service; else what it says.
pub(crate) fn limits(agent: &Agent) {
    let script =
        "grep -E 'open files|processes' /proc/self/limits; cat /proc/sys/kernel/threads-max";
    let (out, err, _) = agent.run("unlimited", spec(script));
    let words: Vec<Vec<_>> = out
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(words[0][2..4], ["unlimited", "unlimited"], "{out}{err}");
    assert_eq!(words[1][3..5], ["1048576", "1048576"], "{out}{err}");
    // As many as there are numbers for, however little memory the guest began with.
    assert!(words[2][0].parse::<u32>().unwrap() >= 32768, "{out}{err}");

    let mut many = spec("ulimit -n; ulimit -Hn");
    many.process.as_mut().unwrap().rlimits = vec![PosixRlimit {
        r#type: "RLIMIT_NOFILE".into(),
        hard: 1_073_741_816,
        soft: 70_000,
    }];
    let (out, err, status) = agent.run("many-files", many);
    assert_eq!((out.as_str(), status), ("70000\n1073741816\n", 0), "{err}");
}

/// Ambient capabilities that are not inheritable are left out; `runc spec` writes such.
pub(crate) fn ambient(agent: &Agent) {
    let mut ambient = spec("grep -E 'Cap(Prm|Amb)' /proc/self/status");
    let process = ambient.process.as_mut().unwrap();
    process.capabilities.as_mut().unwrap().ambient = strings(&["CAP_KILL"]);
    let (out, err, status) = agent.run("ambient", ambient);
    let expected = "CapPrm:\t0000000000000021\nCapAmb:\t0000000000000000\n";
    assert_eq!((out.as_str(), status), (expected, 0), "{err}");
}

/// A container's processes share a session keyring, which is no other container's.
pub(crate) fn keyrings(agent: &Agent) {
    let keyring = |out: &str, name: &str| {
        let line = out
            .lines()
            .find(|line| line.contains(&format!("_ses.{name}")));
        let serial = line.and_then(|line| line.split_whitespace().next());
        serial.unwrap_or_else(|| panic!("{out}")).to_owned()
    };
    agent.create("keys", spec("exec sleep 1000")).unwrap();
    agent.start("keys").unwrap();
    let (out, _) = agent.exec_shell("keys", "cat /proc/keys #1");
    let first = keyring(&out, "keys");
    let (out, _) = agent.exec_shell("keys", "cat /proc/keys #2");
    assert_eq!(keyring(&out, "keys"), first);
    let (out, _, _) = agent.run("other-keys", spec("cat /proc/keys"));
    assert_ne!(keyring(&out, "other-keys"), first);
    agent.remove("keys");
}

/// A container makes nodes of any device, and uses those of memory and terminals and its own.
pub(crate) fn devices(agent: &Agent) {
    let rule = |allow, access: &str| LinuxDeviceCgroup {
        allow,
        major: -1,
        minor: -1,
        access: access.into(),
        ..LinuxDeviceCgroup::default()
    };
    let container = |rules: &[LinuxDeviceCgroup]| {
        // The disk's numbers are those of virtio's first one.
        let script = "number=$(cat /sys/block/vda/dev)
            mknod /dev/disk b ${number%:*} ${number#*:} && echo made
            for device in disk null zero urandom; do
                dd if=/dev/$device of=/dev/null bs=8 count=1 2>/dev/null && echo $device; done
            true <>/dev/ptmx && echo ptmx";
        let mut spec = spec(script);
        let capabilities = &mut spec.process.as_mut().unwrap().capabilities;
        let capabilities = capabilities.as_mut().unwrap();
        for set in [
            &mut capabilities.bounding,
            &mut capabilities.effective,
            &mut capabilities.permitted,
        ] {
            set.push("CAP_MKNOD".into());
        }
        spec.linux.as_mut().unwrap().resources = Some(LinuxResources {
            devices: rules.to_vec(),
            ..LinuxResources::default()
        });
        spec
    };
    let words = |out: &str| out.split_whitespace().collect::<Vec<_>>().join(" ");
    let denied = [rule(false, "rwm")];
    let (out, err, _) = agent.run("denied", container(&denied));
    assert_eq!(words(&out), "made null zero urandom ptmx", "{err}");
    let own = CreateContainerRequest {
        devices: vec![Device {
            r#type: "mmioblk".into(),
            vm_path: "/dev/vda".into(),
            container_path: "/dev/data".into(),
            ..Device::default()
        }],
        ..CreateContainerRequest::default()
    };
    let all = "made disk null zero urandom ptmx";
    agent.create_with("own", container(&denied), own).unwrap();
    agent.start("own").unwrap();
    let (err, out, _) = agent.outcome("own", "");
    assert_eq!(words(&out), all, "{err}");
    agent.remove("own");
    let (out, err, _) = agent.run(
        "allowed",
        container(&[rule(false, "rwm"), rule(true, "rwm")]),
    );
    assert_eq!(words(&out), all, "{err}");
}

/// What the agent asks of a process's /proc is none of the container's making.
pub(crate) fn own_proc(agent: &Agent) {
    let mut without = spec("echo fine");
    without.mounts.retain(|mount| mount.destination != "/proc");
    without.process.as_mut().unwrap().oom_score_adj = 300;
    let linux = without.linux.as_mut().unwrap();
    linux.masked_paths.clear();
    linux.readonly_paths.clear();
    let (out, err, status) = agent.run("own-proc", without);
    assert_eq!((out.as_str(), status), ("fine\n", 0), "{err}");
}
