//! From what the guest's agent says a container has used to what containerd is told.

use std::collections::BTreeMap;

use protocol::agent::messages::{BlkioStats, CgroupStats};

use protocol::containerd::figures::{
    Cpu, Hugetlb, Io, IoEntry, Memory, MemoryEvents, Metrics, Pids,
};

/// What a container cannot have used more than, whatever its guest says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// All memory that the VM has, in bytes.
    pub(crate) memory_bytes: u64,
    /// CPU time that the VM has used of the host, in microseconds.
    pub(crate) cpu_usec: u64,
}

/// Most processes that Linux can have (linux/threads.h, PID_MAX_LIMIT).
const MAX_PIDS: u64 = 4 << 20;
/// Most disks, and sizes of huge pages, that are told of.
const MAX_ENTRIES: usize = 64;
/// Longest name of a size of pages, in bytes: `1024MB`.
const MAX_PAGESIZE_LEN: usize = 16;

/// What the guest says of a container, as far as that can be. Limits are as they are: to have none is
/// to have the largest number.
pub(crate) fn of_guest(stats: &CgroupStats, bounds: Bounds) -> Metrics {
    let mut metrics = as_said(stats);
    if let Some(pids) = &mut metrics.pids {
        pids.current = pids.current.min(MAX_PIDS);
    }
    if let Some(cpu) = &mut metrics.cpu {
        for used in [
            &mut cpu.usage_usec,
            &mut cpu.user_usec,
            &mut cpu.system_usec,
        ] {
            *used = (*used).min(bounds.cpu_usec);
        }
    }
    if let Some(memory) = &mut metrics.memory {
        for used in [
            &mut memory.anon,
            &mut memory.file,
            &mut memory.kernel_stack,
            &mut memory.slab,
            &mut memory.sock,
            &mut memory.shmem,
            &mut memory.file_mapped,
            &mut memory.file_dirty,
            &mut memory.file_writeback,
            &mut memory.inactive_anon,
            &mut memory.active_anon,
            &mut memory.inactive_file,
            &mut memory.active_file,
            &mut memory.unevictable,
            &mut memory.slab_reclaimable,
            &mut memory.slab_unreclaimable,
            &mut memory.usage,
            &mut memory.swap_usage,
            &mut memory.max_usage,
        ] {
            *used = (*used).min(bounds.memory_bytes);
        }
    }
    if let Some(io) = &mut metrics.io {
        io.usage.truncate(MAX_ENTRIES);
    }
    metrics.hugetlb.retain(|pages| is_pagesize(&pages.pagesize));
    metrics.hugetlb.truncate(MAX_ENTRIES);
    for pages in &mut metrics.hugetlb {
        pages.current = pages.current.min(bounds.memory_bytes);
    }
    metrics
}

/// Whether it can be the name of a size of pages, which becomes part of names elsewhere.
fn is_pagesize(name: &str) -> bool {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_plain && (1..=MAX_PAGESIZE_LEN).contains(&name.len())
}

/// The guest's cgroups are of version 2, so nothing is lost.
fn as_said(stats: &CgroupStats) -> Metrics {
    Metrics {
        pids: stats.pids_stats.map(|pids| Pids {
            current: pids.current,
            limit: pids.limit,
        }),
        cpu: stats.cpu_stats.as_ref().map(|cpu| {
            let usage = cpu.cpu_usage.clone().unwrap_or_default();
            let throttled = cpu.throttling_data.unwrap_or_default();
            Cpu {
                usage_usec: usage.total_usage / 1000,
                user_usec: usage.usage_in_usermode / 1000,
                system_usec: usage.usage_in_kernelmode / 1000,
                nr_periods: throttled.periods,
                nr_throttled: throttled.throttled_periods,
                throttled_usec: throttled.throttled_time / 1000,
            }
        }),
        memory: stats.memory_stats.as_ref().map(|memory| {
            let value = |key: &str| memory.stats.get(key).copied().unwrap_or(0);
            let usage = memory.usage.unwrap_or_default();
            let swap = memory.swap_usage.unwrap_or_default();
            Memory {
                anon: value("anon"),
                file: value("file"),
                kernel_stack: value("kernel_stack"),
                slab: value("slab"),
                sock: value("sock"),
                shmem: value("shmem"),
                file_mapped: value("file_mapped"),
                file_dirty: value("file_dirty"),
                file_writeback: value("file_writeback"),
                inactive_anon: value("inactive_anon"),
                active_anon: value("active_anon"),
                inactive_file: value("inactive_file"),
                active_file: value("active_file"),
                unevictable: value("unevictable"),
                slab_reclaimable: value("slab_reclaimable"),
                slab_unreclaimable: value("slab_unreclaimable"),
                pgfault: value("pgfault"),
                pgmajfault: value("pgmajfault"),
                usage: usage.usage,
                usage_limit: usage.limit,
                swap_usage: swap.usage,
                swap_limit: swap.limit,
                max_usage: usage.max_usage,
            }
        }),
        io: stats.blkio_stats.as_ref().map(io),
        hugetlb: stats
            .hugetlb_stats
            .iter()
            .map(|(pagesize, stats)| Hugetlb {
                current: stats.usage,
                max: stats.max_usage,
                pagesize: pagesize.clone(),
            })
            .collect(),
        memory_events: stats.memory_stats.as_ref().map(|memory| MemoryEvents {
            max: memory.usage.map_or(0, |usage| usage.failcnt),
            oom: 0,
            oom_kill: 0,
        }),
    }
}

/// One entry for each disk, of the entries for each kind of operation. They are of the guest's making.
fn io(stats: &BlkioStats) -> Io {
    let mut disks: BTreeMap<(u64, u64), IoEntry> = BTreeMap::new();
    let bytes = stats
        .io_service_bytes_recursive
        .iter()
        .map(|entry| (entry, true));
    let counts = stats
        .io_serviced_recursive
        .iter()
        .map(|entry| (entry, false));
    for (entry, is_bytes) in bytes.chain(counts) {
        let disk = disks.entry((entry.major, entry.minor)).or_default();
        (disk.major, disk.minor) = (entry.major, entry.minor);
        let sum = match (entry.op.to_ascii_lowercase().as_str(), is_bytes) {
            ("read", true) => &mut disk.rbytes,
            ("write", true) => &mut disk.wbytes,
            ("read", false) => &mut disk.rios,
            ("write", false) => &mut disk.wios,
            _ => continue,
        };
        *sum = sum.saturating_add(entry.value);
    }
    Io {
        usage: disks.into_values().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::agent::messages::{
        BlkioStatsEntry, CpuStats, HugetlbStats, MemoryStats, PidsStats,
    };

    #[test]
    fn operations_of_one_disk_are_one_entry() {
        let entry = |minor, op: &str, value| BlkioStatsEntry {
            major: 254,
            minor,
            op: op.into(),
            value,
        };
        let stats = BlkioStats {
            io_service_bytes_recursive: vec![entry(0, "Read", 5), entry(0, "Write", 6)],
            io_serviced_recursive: vec![entry(0, "read", 1), entry(16, "write", 2)],
            ..BlkioStats::default()
        };
        let usage = io(&stats).usage;
        assert_eq!(usage.len(), 2);
        assert_eq!((usage[0].rbytes, usage[0].wbytes, usage[0].rios), (5, 6, 1));
        assert_eq!((usage[1].minor, usage[1].wios), (16, 2));
    }

    #[test]
    fn a_guest_says_any_number_of_any_disks() {
        let entry = |minor: u64| BlkioStatsEntry {
            major: 254,
            minor: minor / 2,
            op: "Read".into(),
            value: u64::MAX,
        };
        let stats = BlkioStats {
            io_service_bytes_recursive: (0..200_000_u64).map(entry).collect(),
            ..BlkioStats::default()
        };
        let usage = io(&stats).usage;
        assert_eq!((usage.len(), usage[0].rbytes), (100_000, u64::MAX));
        let stats = CgroupStats {
            blkio_stats: Some(stats),
            ..CgroupStats::default()
        };
        assert_eq!(
            of_guest(&stats, BOUNDS).io.unwrap().usage.len(),
            MAX_ENTRIES
        );
    }

    const BOUNDS: Bounds = Bounds {
        memory_bytes: 512 << 20,
        cpu_usec: 3_000_000,
    };

    #[test]
    fn no_container_has_used_more_than_its_vm() {
        let said = |nanos, bytes, pids| {
            let mut cpu = CpuStats::default();
            cpu.cpu_usage.get_or_insert_default().total_usage = nanos;
            cpu.cpu_usage.get_or_insert_default().usage_in_usermode = nanos;
            let mut memory = MemoryStats::default();
            let usage = memory.usage.get_or_insert_default();
            (usage.usage, usage.max_usage, usage.limit) = (bytes, bytes, u64::MAX);
            memory.stats.insert("anon".into(), bytes);
            let pages = HugetlbStats {
                usage: bytes,
                ..HugetlbStats::default()
            };
            CgroupStats {
                cpu_stats: Some(cpu),
                memory_stats: Some(memory),
                pids_stats: Some(PidsStats {
                    current: pids,
                    ..PidsStats::default()
                }),
                hugetlb_stats: ["2MB", &"x".repeat(99), "", "../2MB", "2MB\n", "\0"]
                    .map(|name| (name.to_owned(), pages))
                    .into(),
                ..CgroupStats::default()
            }
        };
        let seen = |stats| {
            let Metrics {
                cpu,
                memory,
                pids,
                hugetlb,
                ..
            } = of_guest(&stats, BOUNDS);
            let (cpu, memory) = (cpu.unwrap(), memory.unwrap());
            assert_eq!((hugetlb.len(), memory.usage_limit), (1, u64::MAX));
            let cpu = [cpu.usage_usec, cpu.user_usec];
            let memory = [
                memory.usage,
                memory.max_usage,
                memory.anon,
                hugetlb[0].current,
            ];
            (cpu, memory, pids.unwrap().current)
        };
        let mib = 1 << 20;
        assert_eq!(
            seen(said(2_000_000_000, mib, 7)),
            ([2_000_000; 2], [mib; 4], 7)
        );
        let most = said(u64::MAX, u64::MAX, u64::MAX);
        assert_eq!(seen(most), ([3_000_000; 2], [512 * mib; 4], MAX_PIDS));
    }
}
