//! What a container has used.

use std::collections::BTreeMap;
use std::fs;

use protocol::agent::messages::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, PidsStats, ThrottlingData,
};

use super::{Cgroup, entry};

impl Cgroup {
    pub(crate) fn stats(&self) -> CgroupStats {
        CgroupStats {
            cpu_stats: Some(self.cpu()),
            memory_stats: Some(self.memory()),
            pids_stats: Some(PidsStats {
                current: self.number("pids.current"),
                limit: self.number("pids.max"),
            }),
            blkio_stats: Some(io(&self.read("io.stat"))),
            hugetlb_stats: self.huge_pages(),
        }
    }

    /// The number in a file; 0 if it says something else, such as `max`.
    fn number(&self, file: &str) -> u64 {
        self.read(file).trim().parse().unwrap_or_default()
    }

    fn cpu(&self) -> CpuStats {
        let stat = self.read("cpu.stat");
        let nanoseconds = |key| entry(&stat, key).saturating_mul(1000);
        CpuStats {
            cpu_usage: Some(CpuUsage {
                total_usage: nanoseconds("usage_usec"),
                percpu_usage: Vec::new(),
                usage_in_kernelmode: nanoseconds("system_usec"),
                usage_in_usermode: nanoseconds("user_usec"),
            }),
            throttling_data: Some(ThrottlingData {
                periods: entry(&stat, "nr_periods"),
                throttled_periods: entry(&stat, "nr_throttled"),
                throttled_time: nanoseconds("throttled_usec"),
            }),
        }
    }

    fn memory(&self) -> MemoryStats {
        let stat = self.read("memory.stat");
        let limit = |file: &str| self.read(file).trim().parse().unwrap_or(u64::MAX);
        let all = stat.lines().filter_map(|line| line.split_once(' '));
        let all = all.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
        MemoryStats {
            cache: entry(&stat, "file"),
            usage: Some(MemoryData {
                usage: self.number("memory.current"),
                max_usage: self.number("memory.peak"),
                failcnt: entry(&self.read("memory.events"), "max"),
                limit: limit("memory.max"),
            }),
            swap_usage: Some(MemoryData {
                usage: self.number("memory.swap.current"),
                limit: limit("memory.swap.max"),
                ..MemoryData::default()
            }),
            kernel_usage: None,
            use_hierarchy: true,
            stats: all.collect(),
        }
    }

    /// Huge pages that the container has used, by their size, as `2MB`.
    fn huge_pages(&self) -> BTreeMap<String, HugetlbStats> {
        let files = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let sizes = files.filter_map(|file| {
            let name = file.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            (!size.contains('.')).then(|| size.to_owned())
        });
        let stats = sizes.map(|size| {
            let stats = HugetlbStats {
                usage: self.number(&format!("hugetlb.{size}.current")),
                max_usage: 0,
                failcnt: entry(&self.read(&format!("hugetlb.{size}.events")), "max"),
            };
            (size, stats)
        });
        stats.collect()
    }
}

/// Reads io.stat, which has a line for each device, as `254:0 rbytes=4096 wbytes=0 rios=1 ..`.
fn io(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((Ok(major), Ok(minor))) =
            device.map(|(major, minor)| (major.parse(), minor.parse()))
        else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "dbytes" => (&mut stats.io_service_bytes_recursive, "Discard"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                "dios" => (&mut stats.io_serviced_recursive, "Discard"),
                _ => continue,
            };
            if let Ok(value) = value.parse() {
                list.push(BlkioStatsEntry {
                    major,
                    minor,
                    op: op.into(),
                    value,
                });
            }
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::mem::ManuallyDrop;

    #[test]
    fn a_device_has_its_entries() {
        let stats = io("254:16 rbytes=4096 wbytes=8 rios=1 wios=2 dbytes=0 cost.usage=3\nx y\n");
        let entry = |op: &str, value| BlkioStatsEntry {
            major: 254,
            minor: 16,
            op: op.into(),
            value,
        };
        let bytes = [entry("Read", 4096), entry("Write", 8), entry("Discard", 0)];
        assert_eq!(stats.io_service_bytes_recursive, bytes);
        assert_eq!(
            stats.io_serviced_recursive,
            [entry("Read", 1), entry("Write", 2)]
        );
    }

    #[test]
    fn huge_pages_are_told_by_size() {
        let path = std::env::temp_dir().join(format!("podvmm-cgroup-huge-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for (file, text) in [
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.events", "max 3\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("pids.max", "max\n"),
        ] {
            fs::write(path.join(file), text).unwrap();
        }
        let stats = ManuallyDrop::new(Cgroup { path: path.clone() }).stats();
        fs::remove_dir_all(&path).unwrap();
        let expected = HugetlbStats {
            usage: 2 << 20,
            max_usage: 0,
            failcnt: 3,
        };
        assert_eq!(
            stats.hugetlb_stats,
            BTreeMap::from([("2MB".into(), expected)])
        );
        assert_eq!(stats.pids_stats.unwrap().limit, 0);
    }

    proptest! {
        #[test]
        fn any_text_has_entries_or_none(text in "([0-9:]|rbytes=|\\PC| |\\n){0,30}") {
            let _ = (io(&text), entry(&text, "rbytes"));
        }
    }
}
