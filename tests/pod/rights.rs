//! What a container's processes may open, use and be: as runc has it on a node.

use protocol::agent::messages::{CreateContainerRequest, Device};
use protocol::agent::oci::{LinuxDeviceCgroup, LinuxResources, PosixRlimit, Process, User};
use tests::pod::{Agent, spec, strings};

pub(crate) fn by_user(uid: u32, mut process: Process) -> Process {
    process.user = Some(User {
        uid,
        gid: 1001,
        ..User::default()
    });
    process
}

/// Ambient capabilities that are not inheritable are left out; `runc spec` writes such.
pub(crate) fn ambient_capabilities_must_be_inheritable(agent: &Agent) {
    let mut ambient = spec("grep -E 'Cap(Prm|Amb)' /proc/self/status");
    let process = ambient.process.as_mut().unwrap();
    process.capabilities.as_mut().unwrap().ambient = strings(&["CAP_KILL"]);
    let (out, err, status) = agent.run("ambient", ambient);
    let expected = "CapPrm:\t0000000000000021\nCapAmb:\t0000000000000000\n";
    assert_eq!((out.as_str(), status), (expected, 0), "{err}");
}

/// A container's processes share a session keyring, which is no other container's.
pub(crate) fn a_container_has_a_keyring_of_its_own(agent: &Agent) {
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
pub(crate) fn devices_are_used_as_the_rules_say(agent: &Agent) {
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
pub(crate) fn a_container_without_proc_starts(agent: &Agent) {
    let mut without = spec("echo fine");
    without.mounts.retain(|mount| mount.destination != "/proc");
    without.process.as_mut().unwrap().oom_score_adj = 300;
    let linux = without.linux.as_mut().unwrap();
    linux.masked_paths.clear();
    linux.readonly_paths.clear();
    let (out, err, status) = agent.run("own-proc", without);
    assert_eq!((out.as_str(), status), ("fine\n", 0), "{err}");
}

/// Its numbers, groups, capabilities, limits and score are those of its description.
pub(crate) fn a_user_has_the_rights_it_is_given(agent: &Agent) {
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

/// The agent is the host's: a container reaches its port, by the guest's own CID and by the local one,
/// and is not heard.
pub(crate) fn the_agent_does_not_hear_a_container(agent: &Agent) {
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
