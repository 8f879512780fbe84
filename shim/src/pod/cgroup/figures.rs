//! What a cgroup has used, by the names that either version of cgroups has for it.

use std::fs;
use std::path::Path;

use super::Place;
use protocol::containerd::figures::{Cpu, Io, IoEntry, Memory, MemoryEvents, Metrics, Pids};

/// What the pod has used of the host: the VM with its guest, and the shim.
pub(super) fn of(places: &[Place]) -> Metrics {
    let place = |controller: &str| {
        let found = places.iter().find(|place| place.has(controller));
        found.map(|place| (place.path.as_path(), place.is_unified()))
    };
    Metrics {
        pids: place("pids").map(|(path, _)| Pids {
            current: number(path, "pids.current"),
            limit: number(path, "pids.max"),
        }),
        cpu: place("cpuacct").map(|(path, unified)| match unified {
            true => cpu_v2(path),
            false => cpu_v1(path),
        }),
        memory: place("memory").map(|(path, unified)| memory(path, unified)),
        io: place("blkio").and_then(|(path, unified)| unified.then(|| io(&read(path, "io.stat")))),
        hugetlb: Vec::new(),
        memory_events: place("memory").map(|(path, unified)| {
            let file = if unified {
                "memory.events"
            } else {
                "memory.oom_control"
            };
            MemoryEvents {
                max: entry(path, file, "max"),
                oom: entry(path, file, "oom"),
                oom_kill: entry(path, file, "oom_kill"),
            }
        }),
    }
}

/// The lines of io.stat: a disk's numbers, then what was read and written (kernel,
/// admin-guide/cgroup-v2, IO Interface Files).
fn io(text: &str) -> Io {
    let disk = |line: &str| {
        let (numbers, counts) = line.split_once(' ')?;
        let (major, minor) = numbers.split_once(':')?;
        let count = |key: &str| {
            let mut counts = counts.split(' ').filter_map(|count| count.split_once('='));
            let found = counts.find(|(name, _)| *name == key);
            found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
        };
        Some(IoEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: count("rbytes"),
            wbytes: count("wbytes"),
            rios: count("rios"),
            wios: count("wios"),
        })
    };
    Io {
        usage: text.lines().filter_map(disk).collect(),
    }
}

fn read(path: &Path, file: &str) -> String {
    fs::read_to_string(path.join(file)).unwrap_or_default()
}

/// The number in a file. `max` is no limit.
fn number(path: &Path, file: &str) -> u64 {
    match read(path, file).trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// The number behind `key` in a file of keys and numbers.
fn entry(path: &Path, file: &str, key: &str) -> u64 {
    let text = read(path, file);
    let mut entries = text.lines().filter_map(|line| line.split_once(' '));
    let found = entries.find(|(name, _)| *name == key);
    found
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

fn cpu_v2(path: &Path) -> Cpu {
    let value = |key| entry(path, "cpu.stat", key);
    Cpu {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
    }
}

/// CPU time by version 1, which counts nanoseconds; without the quota, which another hierarchy has.
fn cpu_v1(path: &Path) -> Cpu {
    Cpu {
        usage_usec: number(path, "cpuacct.usage") / 1000,
        user_usec: number(path, "cpuacct.usage_user") / 1000,
        system_usec: number(path, "cpuacct.usage_sys") / 1000,
        ..Cpu::default()
    }
}

/// Memory that has been used. The two versions have other names for the same things, but for swap,
/// which the first has not apart.
fn memory(path: &Path, unified: bool) -> Memory {
    let [prefix, anon, file, current, max, peak] = if unified {
        [
            "",
            "anon",
            "file",
            "memory.current",
            "memory.max",
            "memory.peak",
        ]
    } else {
        [
            "total_",
            "rss",
            "cache",
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
            "memory.max_usage_in_bytes",
        ]
    };
    let value = |key: &str| entry(path, "memory.stat", &format!("{prefix}{key}"));
    Memory {
        anon: value(anon),
        file: value(file),
        shmem: value("shmem"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        usage: number(path, current),
        usage_limit: number(path, max),
        swap_usage: number(path, "memory.swap.current"),
        swap_limit: number(path, "memory.swap.max"),
        max_usage: number(path, peak),
        ..Memory::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_has_its_line() {
        let text = "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1 \nnonsense\n";
        let usage = io(text).usage;
        assert_eq!(usage.len(), 2, "{usage:?}");
        let first = &usage[0];
        assert_eq!((first.major, first.minor), (254, 0));
        assert_eq!((first.rbytes, first.wbytes), (1, 2));
        assert_eq!((first.rios, first.wios), (3, 4));
        assert_eq!((usage[1].major, usage[1].rbytes), (7, 0));
    }

    #[test]
    fn figures_are_found_by_either_versions_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        for (file, text) in [
            (
                "memory.stat",
                "anon 1\nrss 2\ntotal_rss 3\ntotal_shmem 4\nshmem 5\n",
            ),
            ("memory.current", "6\n"),
            ("memory.max", "max\n"),
            ("memory.usage_in_bytes", "7\n"),
        ] {
            fs::write(path.join(file), text).unwrap();
        }
        let seen = |unified| {
            let memory = memory(path, unified);
            (memory.anon, memory.shmem, memory.usage, memory.usage_limit)
        };
        assert_eq!(seen(true), (1, 5, 6, u64::MAX));
        assert_eq!(seen(false), (3, 4, 7, 0));
    }
}
