//! What a pod's containers share: its network, pids, and files.

use std::process::Command;

use protocol::agent::messages::{
    AddArpNeighborsRequest, ArpNeighbors, CopyFileRequest, CreateContainerRequest, Empty,
    Interfaces, ListInterfacesRequest, ListRoutesRequest, Routes, Storage,
    UpdateEphemeralMountsRequest, UpdateInterfaceRequest, UpdateRoutesRequest, VolumeStatsRequest,
    VolumeStatsResponse,
};
use protocol::agent::oci::Mount;
use protocol::agent::types::{ArpNeighbor, Interface, IpAddress, IpFamily, Route};
use protocol::ttrpc::Code;
use tests::node::eventually;
use tests::pod::{Agent, refusal, spec, strings};

/// Of the guest's one interface; the host's end is 10.77.0.1.
pub(crate) const HARDWARE: &str = "02:00:00:00:00:a7";
pub(crate) const SHM: &str = "/run/kata-containers/sandbox/shm";
const COPIED: &str = "/run/kata-containers/copied";

fn interface() -> Interface {
    let address = |family: IpFamily, address: &str, mask: &str| IpAddress {
        family: family.into(),
        address: address.into(),
        mask: mask.into(),
    };
    Interface {
        device: "eth0".into(),
        name: "pod0".into(),
        addresses: vec![
            address(IpFamily::V4, "10.77.0.2", "24"),
            address(IpFamily::V6, "fd77::2", "64"),
        ],
        mtu: 1400,
        hw_addr: HARDWARE.to_uppercase(),
        ..Interface::default()
    }
}

/// As shims have it: before there is a sandbox.
pub(crate) fn the_network_is_set_up_without_a_sandbox(agent: &Agent) {
    for _ in 0..2 {
        let interface = Some(self::interface());
        let request = UpdateInterfaceRequest { interface };
        let answer: Interface = agent.ask("UpdateInterface", &request).unwrap();
        assert_eq!(answer, self::interface());
    }
    // None is left that waits for an address.
    let mut lost = interface();
    lost.hw_addr = "02:ff:00:00:00:00".into();
    let interface = Some(lost);
    let (code, why) = refusal(agent.ask("UpdateInterface", &UpdateInterfaceRequest { interface }));
    assert_eq!(code, Code::NotFound);
    assert!(why.contains("Link not found"), "{why}");
    let route = |dest: &str, gateway: &str, family: IpFamily| Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "pod0".into(),
        family: family.into(),
        ..Route::default()
    };
    let mut near = route("10.99.0.1/32", "", IpFamily::V4);
    near.scope = 253;
    let routes = vec![
        route("10.88.0.0/16", "10.99.0.1", IpFamily::V4),
        route("", "10.77.0.1", IpFamily::V4),
        route("", "fd77::1", IpFamily::V6),
        near,
    ];
    let request = UpdateRoutesRequest {
        routes: Some(Routes { routes, exact: 0 }),
        exact: None,
    };
    for _ in 0..2 {
        let _: Routes = agent.ask("UpdateRoutes", &request).unwrap();
    }
    let neighbors = vec![ArpNeighbor {
        to_ip_address: Some(IpAddress {
            address: "10.77.0.9".into(),
            ..IpAddress::default()
        }),
        device: "pod0".into(),
        lladdr: "02:00:00:00:00:09".into(),
        state: 0x80,
        ..ArpNeighbor::default()
    }];
    let request = AddArpNeighborsRequest {
        neighbors: Some(ArpNeighbors { neighbors }),
    };
    let _: Empty = agent.ask("AddARPNeighbors", &request).unwrap();

    let Interfaces { interfaces } = agent
        .ask("ListInterfaces", &ListInterfacesRequest {})
        .unwrap();
    let pod0 = interfaces.iter().find(|it| it.name == "pod0").unwrap();
    assert_eq!((pod0.mtu, pod0.hw_addr.as_str()), (1400, HARDWARE));
    for wanted in self::interface().addresses {
        assert!(pod0.addresses.contains(&wanted), "{pod0:?}");
    }
    assert!(interfaces.iter().any(|it| it.name == "lo"));
    let Routes { routes, .. } = agent.ask("ListRoutes", &ListRoutesRequest {}).unwrap();
    for (dest, gateway) in [
        ("", "10.77.0.1"),
        ("", "fd77::1"),
        ("10.88.0.0/16", "10.99.0.1"),
    ] {
        let is_there = |route: &Route| route.dest == dest && route.gateway == gateway;
        assert!(routes.iter().any(is_there), "{dest} {routes:?}");
    }
}

/// The guest is reached from its host, and reaches it and itself.
pub(crate) fn the_guest_is_reached_and_reaches_its_host(agent: &Agent) {
    let mut ping = spec(
        "for to in 10.77.0.2 fd77::2 10.77.0.1; do
            ping -q -c 1 -W 60 $to >/dev/null && echo $to; done; cat /proc/net/arp",
    );
    let capabilities = &mut ping.process.as_mut().unwrap().capabilities;
    let capabilities = capabilities.as_mut().unwrap();
    for set in [
        &mut capabilities.bounding,
        &mut capabilities.effective,
        &mut capabilities.permitted,
    ] {
        set.push("CAP_NET_RAW".into());
    }
    let (out, err, _) = agent.run("ping", ping);
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines[..3],
        ["10.77.0.2", "fd77::2", "10.77.0.1"],
        "{out}{err}"
    );
    let known = lines.iter().find(|line| line.starts_with("10.77.0.9"));
    assert!(known.unwrap().contains("02:00:00:00:00:09"), "{out}");
    let status = Command::new("ping")
        .args(["-q", "-c", "1", "-W", "60", "10.77.0.2"])
        .status();
    // Not every host has the program.
    assert!(status.map_or(true, |status| status.success()));
}

/// The first container there is has pids for all that ask for them.
pub(crate) fn the_first_container_starts(agent: &Agent) {
    let more = CreateContainerRequest {
        sandbox_pidns: true,
        ..CreateContainerRequest::default()
    };
    agent
        .create_with("pause", spec("exec sleep 4321"), more)
        .unwrap();
    agent.start("pause").unwrap();
}

pub(crate) fn containers_share_the_pids_of_the_first(agent: &Agent) {
    let more = || CreateContainerRequest {
        sandbox_pidns: true,
        ..CreateContainerRequest::default()
    };
    let script = "sleep 1234 & echo $$; cat /proc/1/cmdline | tr '\\0' ' '; exec sleep 1000";
    agent.create_with("sharer", spec(script), more()).unwrap();
    agent.start("sharer").unwrap();
    let (seen, _) = agent.exec_shell(
        "sharer",
        "cat /proc/1/cmdline | tr '\\0' ' '; kill -0 1 && echo may; cat /proc/*/cmdline | grep -c 1234",
    );
    assert!(seen.starts_with("sleep 4321 may\n"), "{seen}");
    agent.signal("sharer", "", 9);
    let (_, out, status) = agent.outcome("sharer", "");
    let (pid, first) = out.split_once('\n').unwrap();
    assert_ne!(pid, "1");
    assert_eq!((first, status), ("sleep 4321 ", 137));
    agent.remove("sharer");
    // What its first process leaves behind ends with it, as the kernel has it where the first is also
    // its namespace's.
    let script = "sleep 1235 & exit 3";
    agent.create_with("leaver", spec(script), more()).unwrap();
    agent.start("leaver").unwrap();
    assert_eq!(agent.outcome("leaver", "").2, 3);
    eventually("what it left behind ends", || {
        let (seen, _) = agent.exec_shell("pause", "cat /proc/*/cmdline | tr '\\0' ' '");
        !seen.contains("1235")
    });
    agent.remove("leaver");
    // Its cgroup and no more was killed.
    let script = "cat /proc/*/cmdline | tr '\\0' ' '; echo; kill -0 1 && echo alive";
    let (seen, _) = agent.exec_shell("pause", script);
    assert!(
        !seen.contains("1234") && seen.ends_with("alive\n"),
        "{seen}"
    );

    // Without a handler it would not hear of SIGTERM, being the first.
    agent.signal("pause", "pause", 15);
    assert_eq!(agent.outcome("pause", "pause").2, 137);
    assert_eq!(agent.outcome("pause", "").2, 137);
    agent.remove("pause");
    let (code, why) = refusal(agent.create_with("late", spec("true"), more()));
    assert_eq!(code, Code::Internal);
    assert!(why.starts_with("start in the pid namespace: "), "{why}");
}

/// One container for debugging another sees its processes, and its own end is not theirs.
pub(crate) fn a_container_sees_the_pids_of_another(agent: &Agent) {
    agent.create("other", spec("exec sleep 4320")).unwrap();
    agent.start("other").unwrap();
    agent.create("target", spec("exec sleep 4322")).unwrap();
    agent.start("target").unwrap();
    let mut debugger = spec("cat /proc/1/cmdline | tr '\\0' ' '; kill -0 1 && echo may");
    let namespaces = &mut debugger.linux.as_mut().unwrap().namespaces;
    let pid = namespaces.iter_mut().find(|it| it.r#type == "pid");
    pid.unwrap().path = "target".into();
    let (out, err, status) = agent.run("debugger", debugger.clone());
    assert_eq!((out.as_str(), status), ("sleep 4322 may\n", 0), "{err}");
    let (out, _) = agent.exec_shell("target", "cat /proc/1/cmdline | tr '\\0' ' '");
    assert_eq!(out, "sleep 4322 ");
    agent.remove("other");
    agent.remove("target");
    let (code, _) = refusal(agent.create("debugger", debugger));
    assert_eq!(code, Code::NotFound);
}

pub(crate) fn copied_files_stay_in_their_folder(agent: &Agent) {
    let copy = |path: &str, mode, data: &[u8]| CopyFileRequest {
        path: path.into(),
        file_size: data.len().try_into().unwrap(),
        file_mode: mode,
        dir_mode: 0o755,
        data: data.to_vec(),
        ..CopyFileRequest::default()
    };
    let file = copy(&format!("{COPIED}/..1/key"), 0o100_640, b"copied\n");
    let link = copy(&format!("{COPIED}/key"), 0o120_777, b"..1/key");
    let out = copy(&format!("{COPIED}/out"), 0o120_777, b"/");
    for request in [file, link, out] {
        let _: Empty = agent.ask("CopyFile", &request).unwrap();
    }
    for path in [
        "/etc/escaped",
        "/run/kata-containers/../escaped",
        "out/escaped",
    ] {
        let path = match path.starts_with('/') {
            true => path.to_owned(),
            false => format!("{COPIED}/{path}"),
        };
        let refused = agent.ask::<Empty>("CopyFile", &copy(&path, 0o100_644, b"x"));
        assert!(refused.is_err(), "{path}");
    }
    let bind = |source: &str, destination: &str| Mount {
        destination: destination.into(),
        source: source.into(),
        r#type: "bind".into(),
        options: strings(&["rbind", "ro"]),
    };
    let mut reader = spec("cat /copied/key /etc/resolv.conf; ls /copied/out/escaped");
    reader.mounts.extend([
        bind(COPIED, "/copied"),
        bind(
            "/run/kata-containers/sandbox/resolv.conf",
            "/etc/resolv.conf",
        ),
    ]);
    let (out, _, _) = agent.run("reader", reader);
    assert_eq!(out, "copied\nsearch pod.local\nnameserver 10.0.0.10\n");
}

/// Storage in memory has the size it is to have.
pub(crate) fn memory_has_the_size_that_it_is_given(agent: &Agent) {
    let size = |path: &str| {
        let request = VolumeStatsRequest {
            volume_guest_path: path.into(),
        };
        let stats: VolumeStatsResponse = agent.ask("GetVolumeStats", &request).unwrap();
        stats.usage[0].total
    };
    assert_eq!(size(SHM), 65536);
    let storages = vec![Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        mount_point: SHM.into(),
        options: strings(&["noexec", "nosuid", "nodev", "mode=1777", "size=131072"]),
        ..Storage::default()
    }];
    let request = UpdateEphemeralMountsRequest { storages };
    let _: Empty = agent.ask("UpdateEphemeralMounts", &request).unwrap();
    assert_eq!(size(SHM), 131_072);

    const HUGE: &str = "/run/kata-containers/sandbox/huge";
    let storages = vec![Storage {
        driver: "ephemeral".into(),
        source: "nodev".into(),
        fstype: "hugetlbfs".into(),
        mount_point: HUGE.into(),
        options: strings(&["pagesize=2097152", "size=4194304"]),
        ..Storage::default()
    }];
    let more = CreateContainerRequest {
        storages,
        ..CreateContainerRequest::default()
    };
    agent.create_with("huge", spec("true"), more).unwrap();
    assert_eq!(size(HUGE), 4 << 20);
    agent.remove("huge");
    // It is the pod's.
    assert_eq!(size(HUGE), 4 << 20);
}
