//! What a container may use, and what it is told to have used.

use protocol::agent::messages::{
    CgroupStats, CreateContainerRequest, Device, GetOomEventRequest, OomEvent,
    StatsContainerRequest, StatsContainerResponse,
};
use protocol::agent::oci::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources,
    LinuxThrottleDevice, PosixRlimit,
};
use tests::pod::{Agent, refusal, spec};
use tests::template::ON_DISK;

/// Without limits of its own a container has those of containerd's service; else what it says.
pub(crate) fn a_container_without_limits_has_containerds(agent: &Agent) {
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

fn cpus(cpus: &str) -> LinuxCpu {
    LinuxCpu {
        cpus: cpus.into(),
        ..LinuxCpu::default()
    }
}

/// A container is held to its memory, processes and CPUs, and an end for want of memory is told.
pub(crate) fn limits_hold_and_are_changed(agent: &Agent) {
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

/// A disk of the guest's is there by the name that the container has for it, with its bounds, and what is read is
/// counted.
pub(crate) fn a_disk_has_a_rate_and_is_counted(agent: &Agent) {
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
