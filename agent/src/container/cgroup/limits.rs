//! What a container may use. Limits are those of cgroups of version 1, as the OCI specification has
//! them, and are said as runc says them to version 2.

use std::io;

use protocol::agent::oci::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

use super::{Cgroup, Error, entry};

impl Cgroup {
    /// Sets limits; what is not said stays as it is.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        if let Some(memory) = &resources.memory {
            self.limit_memory(memory)?;
        }
        if let Some(cpu) = &resources.cpu {
            self.limit_cpu(cpu)?;
        }
        if let Some(pids) = &resources.pids
            && pids.limit != 0
        {
            self.write("pids.max", bytes_or_max(pids.limit))?;
        }
        if let Some(io) = &resources.block_io {
            self.limit_io(io)?;
        }
        resources
            .hugepage_limits
            .iter()
            .try_for_each(|limit| self.limit_huge_pages(limit))?;
        // After the others, so that it has the last word.
        let unified = &mut resources.unified.iter();
        unified.try_for_each(|(file, value)| self.limit_by_file(file, value))
    }

    /// Writes to a file of the cgroup as the specification's `unified` says.
    fn limit_by_file(&self, file: &str, value: &str) -> Result<(), Error> {
        let (controller, _) = file.split_once('.').unwrap_or_default();
        // Those of cgroups as such move and kill processes.
        if matches!(controller, "" | "cgroup") || file.contains('/') {
            return Err(Error::Unified(file.into()));
        }
        for line in value.lines() {
            match self.write(file, line) {
                Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    // There may be no swap to limit.
                    let is_no_swap = file == "memory.swap.max" && matches!(line, "0" | "max");
                    if !is_no_swap {
                        return Err(Error::Unknown(file.into()));
                    }
                }
                written => written?,
            }
        }
        Ok(())
    }

    fn limit_memory(&self, memory: &LinuxMemory) -> Result<(), Error> {
        let swap = swap(memory)?;
        if let Ok(limit) = u64::try_from(memory.limit)
            && limit != 0
        {
            // The kernel would kill until it is kept to.
            let used = self.needed_memory();
            if used > limit {
                return Err(Error::InUse { limit, used });
            }
        }
        // Each limits something of its own here, so the order is of no matter: but what cannot be
        // set is to leave the rest as it was. There may be no swap to limit.
        if let Some(swap) = swap {
            match self.write("memory.swap.max", bytes_or_max(swap)) {
                Err(Error::Write { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && swap <= 0 => {}
                written => written?,
            }
        }
        if memory.limit != 0 {
            self.write("memory.max", bytes_or_max(memory.limit))?;
        }
        if memory.reservation != 0 {
            self.write("memory.low", bytes_or_max(memory.reservation))?;
        }
        Ok(())
    }

    /// What cannot be had back from it but by killing: its caches can.
    fn needed_memory(&self) -> u64 {
        let used = self.read("memory.current").trim().parse().unwrap_or(0_u64);
        let stat = self.read("memory.stat");
        let caches = ["inactive_file", "active_file", "slab_reclaimable"];
        let caches = caches.iter().map(|key| entry(&stat, key)).sum();
        used.saturating_sub(caches)
    }

    fn limit_cpu(&self, cpu: &LinuxCpu) -> Result<(), Error> {
        if cpu.shares != 0 {
            self.write("cpu.weight", weight(cpu.shares))?;
        }
        if cpu.quota != 0 || cpu.period != 0 {
            let quota = match cpu.quota {
                quota @ 1.. => quota.to_string(),
                _ => "max".into(),
            };
            let period = if cpu.period == 0 { 100_000 } else { cpu.period };
            self.write("cpu.max", format!("{quota} {period}"))?;
        }
        if !cpu.cpus.is_empty() {
            self.write("cpuset.cpus", &cpu.cpus)?;
        }
        if !cpu.mems.is_empty() {
            self.write("cpuset.mems", &cpu.mems)?;
        }
        Ok(())
    }

    fn limit_io(&self, io: &LinuxBlockIo) -> Result<(), Error> {
        let weights = io.weight_device.iter();
        let mut lines: Vec<_> = weights
            .filter(|device| device.weight != 0)
            .map(|device| {
                let weight = io_weight(device.weight);
                format!("{}:{} {weight}", device.major, device.minor)
            })
            .collect();
        if io.weight != 0 {
            lines.push(format!("default {}", io_weight(io.weight)));
        }
        for line in lines {
            match self.write("io.weight", line) {
                // Weights order what waits, and a kernel without them does so by other means.
                Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
        }
        let rates = [
            ("rbps", &io.throttle_read_bps_device),
            ("wbps", &io.throttle_write_bps_device),
            ("riops", &io.throttle_read_iops_device),
            ("wiops", &io.throttle_write_iops_device),
        ];
        for (key, devices) in rates {
            for device in devices {
                self.write("io.max", throttle(key, device))?;
            }
        }
        Ok(())
    }

    fn limit_huge_pages(&self, limit: &LinuxHugepageLimit) -> Result<(), Error> {
        let size = &limit.pagesize;
        let unknown = || Error::PageSize(size.clone());
        if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(unknown());
        }
        for file in ["max", "rsvd.max"] {
            match self.write(&format!("hugetlb.{size}.{file}"), limit.limit) {
                Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    // Old kernels do not count what is reserved.
                    if file == "max" {
                        return Err(unknown());
                    }
                }
                written => written?,
            }
        }
        Ok(())
    }
}

/// What is to be the limit of swap alone: the specification's is of memory and swap together.
fn swap(memory: &LinuxMemory) -> Result<Option<i64>, Error> {
    match (memory.limit, memory.swap) {
        // Without a limit of memory there is none of swap.
        (-1, 0) | (_, ..0) => Ok(Some(-1)),
        (_, 0) => Ok(None),
        (limit, swap) if limit > 0 && swap >= limit => Ok(Some(swap - limit)),
        (limit, swap) => Err(Error::Swap {
            memory: limit,
            swap,
        }),
    }
}

fn bytes_or_max(value: i64) -> String {
    match value {
        ..0 => "max".into(),
        value => value.to_string(),
    }
}

/// The weight that shares of version 1 stand for (2 to 262144, as 1 to 10000).
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// The weight that one of version 1 stands for (10 to 1000, as 1 to 10000).
fn io_weight(weight: u32) -> u32 {
    1 + (weight.clamp(10, 1000) - 10) * 9999 / 990
}

/// A line of io.max; a rate of nothing is no limit.
fn throttle(key: &str, device: &LinuxThrottleDevice) -> String {
    let rate = match device.rate {
        0 => "max".into(),
        rate => rate.to_string(),
    };
    format!("{}:{} {key}={rate}", device.major, device.minor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::agent::oci::{LinuxPids, LinuxWeightDevice};
    use std::fs;
    use std::mem::ManuallyDrop;

    #[test]
    fn shares_become_weights() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight),
            [1, 1, 39, 10_000, 10_000]
        );
        assert_eq!(
            [0, 10, 500, 1000, 2000].map(io_weight),
            [1, 1, 4950, 10_000, 10_000]
        );
    }

    /// A folder that looks like a cgroup, with these files, and is not removed as one.
    fn folder(name: &str, files: &[(&str, &str)]) -> ManuallyDrop<Cgroup> {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for (file, text) in files {
            fs::write(path.join(file), text).unwrap();
        }
        ManuallyDrop::new(Cgroup { path })
    }

    fn memory(limit: i64, swap: i64) -> LinuxResources {
        LinuxResources {
            memory: Some(LinuxMemory {
                limit,
                swap,
                ..LinuxMemory::default()
            }),
            ..LinuxResources::default()
        }
    }

    #[test]
    fn swap_is_what_both_are_without_memory() {
        let swap = |limit, swap| super::swap(&memory(limit, swap).memory.unwrap());
        let swaps = [(100, 150), (100, 100), (100, -1), (-1, 0), (100, 0), (0, 0)];
        let swaps = swaps.map(|(limit, both)| swap(limit, both).unwrap());
        assert_eq!(swaps, [Some(50), Some(0), Some(-1), Some(-1), None, None]);
        for (limit, both) in [(100, 99), (0, 50), (-1, 50)] {
            let refused = swap(limit, both).unwrap_err().to_string();
            assert!(refused.contains("below"), "{refused}");
        }
    }

    #[test]
    fn memory_in_use_is_not_limited_away() {
        let files = [
            ("memory.current", "1000\n"),
            (
                "memory.stat",
                "anon 600\ninactive_file 200\nactive_file 100\nslab_reclaimable 50\n",
            ),
            ("memory.swap.max", ""),
            ("memory.max", ""),
        ];
        let cgroup = folder("podvmm-cgroup-memory", &files);
        let refused = cgroup.limit(&memory(600, 700)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "a memory limit of 600 bytes: 650 bytes are in use"
        );
        assert_eq!(cgroup.read("memory.swap.max"), "");
        cgroup.limit(&memory(650, 700)).unwrap();
        assert_eq!(cgroup.read("memory.swap.max"), "50");
        assert_eq!(cgroup.read("memory.max"), "650");
        fs::remove_dir_all(&cgroup.path).unwrap();
    }

    #[test]
    fn each_limit_has_its_file() {
        let files = [
            "cpu.max",
            "cpuset.cpus",
            "cpuset.mems",
            "pids.max",
            "io.weight",
            "io.max",
            "hugetlb.2MB.max",
        ];
        let cgroup = folder("podvmm-cgroup-limits", &files.map(|file| (file, "")));
        let device = |rate| LinuxThrottleDevice {
            major: 254,
            minor: 16,
            rate,
        };
        let resources = LinuxResources {
            cpu: Some(LinuxCpu {
                quota: 50_000,
                cpus: "0-1".into(),
                mems: "0".into(),
                ..LinuxCpu::default()
            }),
            pids: Some(LinuxPids { limit: -1 }),
            block_io: Some(LinuxBlockIo {
                weight_device: vec![LinuxWeightDevice {
                    major: 254,
                    minor: 0,
                    weight: 1000,
                    leaf_weight: 0,
                }],
                throttle_write_iops_device: vec![device(7)],
                ..LinuxBlockIo::default()
            }),
            hugepage_limits: vec![LinuxHugepageLimit {
                pagesize: "2MB".into(),
                limit: 4 << 20,
            }],
            ..LinuxResources::default()
        };
        cgroup.limit(&resources).unwrap();
        let read = [
            "cpu.max",
            "cpuset.cpus",
            "cpuset.mems",
            "pids.max",
            "io.weight",
            "io.max",
        ]
        .map(|file| cgroup.read(file));
        let expected = [
            "50000 100000",
            "0-1",
            "0",
            "max",
            "254:0 10000",
            "254:16 wiops=7",
        ];
        assert_eq!(read, expected.map(String::from));
        assert_eq!(cgroup.read("hugetlb.2MB.max"), "4194304");
        assert_eq!(throttle("rbps", &device(0)), "254:16 rbps=max");
        let mut odd = LinuxResources::default();
        odd.hugepage_limits.push(LinuxHugepageLimit {
            pagesize: "../2MB".into(),
            limit: 1,
        });
        cgroup.limit(&odd).unwrap_err();
        odd.hugepage_limits[0].pagesize = "1GB".into();
        let refused = cgroup.limit(&odd).unwrap_err();
        assert_eq!(refused.to_string(), "there are no huge pages of \"1GB\"");
        // What a kernel need not have is not missed.
        fs::remove_file(cgroup.path.join("io.weight")).unwrap();
        cgroup.limit(&resources).unwrap();
        fs::remove_dir_all(&cgroup.path).unwrap();
    }

    #[test]
    fn a_limit_by_its_files_name_has_the_last_word() {
        let files = ["memory.max", "memory.oom.group", "io.max"].map(|file| (file, ""));
        let cgroup = folder("podvmm-cgroup-unified", &files);
        let with = |entries: &[(&str, &str)]| {
            let entries = entries.iter();
            LinuxResources {
                unified: entries
                    .map(|(file, value)| ((*file).into(), (*value).into()))
                    .collect(),
                ..memory(1000, 0)
            }
        };
        let lines = "8:0 rbps=1\n8:16 rbps=2\n";
        let resources = with(&[
            ("memory.oom.group", "1"),
            ("memory.max", "2000"),
            ("memory.swap.max", "0"),
            ("io.max", lines),
        ]);
        cgroup.limit(&resources).unwrap();
        let read = ["memory.oom.group", "memory.max", "io.max"].map(|file| cgroup.read(file));
        // Each line is a write of its own; to a cgroup's file they add up.
        assert_eq!(read, ["1", "2000", "8:16 rbps=2"]);
        let refused = |entry| cgroup.limit(&with(&[entry])).unwrap_err().to_string();
        for file in ["cgroup.kill", "../x/memory.max", "memory", ".max", ""] {
            let why = format!("{file:?} is no limit of a cgroup of version 2");
            assert_eq!(refused((file, "1")), why);
        }
        assert_eq!(
            refused(("memory.swap.max", "1")),
            "the guest's kernel has no limit \"memory.swap.max\""
        );
        fs::remove_dir_all(&cgroup.path).unwrap();
    }

    proptest! {
        #[test]
        fn any_limits_of_memory_are_said_or_refused(limit: i64, both: i64) {
            let _ = swap(&memory(limit, both).memory.unwrap());
        }
    }
}
