//! A container's cgroup, of version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use agent::protocol::agent::{
    CgroupStats, CpuStats, CpuUsage, MemoryData, MemoryStats, PidsStats, ThrottlingData,
};
use agent::protocol::oci::LinuxResources;

use crate::sys::pid_t;

const ROOT: &str = "/sys/fs/cgroup";

/// Dropping it removes it, once nobody is in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
#[error("{}", .path.display())]
pub(crate) struct Error {
    path: PathBuf,
    source: io::Error,
}

impl Cgroup {
    /// Makes one at `path` below the root, wherever a host's path points; `id` if there is none.
    pub(crate) fn new(path: &str, id: &str) -> Result<Self, Error> {
        let plain = |text: &str| -> PathBuf {
            let parts = Path::new(text).components();
            let names = parts.filter(|part| matches!(part, Component::Normal(_)));
            names.collect()
        };
        let mut below = plain(path);
        if below.as_os_str().is_empty() {
            below = plain(id);
        }
        let mut here = PathBuf::from(ROOT);
        for name in &below {
            // What the parent has not, the child does without.
            for controller in ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"] {
                let _ = fs::write(
                    here.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
            here.push(name);
            match fs::create_dir(&here) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error {
                        path: here,
                        source: error,
                    });
                }
                _ => {}
            }
        }
        Ok(Self { path: here })
    }

    fn write(&self, file: &str, value: impl ToString) -> Result<(), Error> {
        let path = self.path.join(file);
        fs::write(&path, value.to_string()).map_err(|source| Error { path, source })
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    pub(crate) fn add(&self, pid: pid_t) -> Result<(), Error> {
        self.write("cgroup.procs", pid)
    }

    /// Sets limits; what is not said stays as it is.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        if let Some(memory) = &resources.memory {
            if memory.limit != 0 {
                self.write("memory.max", bytes_or_max(memory.limit))?;
            }
            if memory.reservation != 0 {
                self.write("memory.low", bytes_or_max(memory.reservation))?;
            }
            if memory.swap != 0 && memory.limit > 0 {
                // The host's limit is of both together. There may be no swap to limit.
                let swap = if memory.swap < 0 {
                    -1
                } else {
                    (memory.swap - memory.limit).max(0)
                };
                let _ = self.write("memory.swap.max", bytes_or_max(swap));
            }
        }
        if let Some(cpu) = &resources.cpu {
            if cpu.shares != 0 {
                self.write("cpu.weight", weight(cpu.shares))?;
            }
            if cpu.quota != 0 || cpu.period != 0 {
                let quota = if cpu.quota > 0 {
                    cpu.quota.to_string()
                } else {
                    "max".into()
                };
                let period = if cpu.period == 0 { 100_000 } else { cpu.period };
                self.write("cpu.max", format!("{quota} {period}"))?;
            }
        }
        if let Some(pids) = &resources.pids
            && pids.limit != 0
        {
            self.write("pids.max", bytes_or_max(pids.limit))?;
        }
        Ok(())
    }

    pub(crate) fn kill(&self) -> Result<(), Error> {
        self.write("cgroup.kill", 1)
    }

    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        self.write("cgroup.freeze", u8::from(frozen))
    }

    /// The file that changes when somebody in it was killed for want of memory.
    pub(crate) fn events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// How often somebody in it was killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        entry(&self.read("memory.events"), "oom_kill")
    }

    pub(crate) fn stats(&self) -> CgroupStats {
        let cpu = self.read("cpu.stat");
        let usec = |key| 1000 * entry(&cpu, key);
        let memory = self.read("memory.stat");
        let number = |file: &str| self.read(file).trim().parse().unwrap_or_default();
        let limit = |file: &str| self.read(file).trim().parse().unwrap_or(u64::MAX);
        let all = memory.lines().filter_map(|line| line.split_once(' '));
        let all = all.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
        CgroupStats {
            cpu_stats: Some(CpuStats {
                cpu_usage: Some(CpuUsage {
                    total_usage: usec("usage_usec"),
                    percpu_usage: Vec::new(),
                    usage_in_kernelmode: usec("system_usec"),
                    usage_in_usermode: usec("user_usec"),
                }),
                throttling_data: Some(ThrottlingData {
                    periods: entry(&cpu, "nr_periods"),
                    throttled_periods: entry(&cpu, "nr_throttled"),
                    throttled_time: usec("throttled_usec"),
                }),
            }),
            memory_stats: Some(MemoryStats {
                cache: entry(&memory, "file"),
                usage: Some(MemoryData {
                    usage: number("memory.current"),
                    max_usage: number("memory.peak"),
                    failcnt: entry(&self.read("memory.events"), "max"),
                    limit: limit("memory.max"),
                }),
                swap_usage: Some(MemoryData {
                    usage: number("memory.swap.current"),
                    limit: limit("memory.swap.max"),
                    ..MemoryData::default()
                }),
                kernel_usage: None,
                use_hierarchy: true,
                stats: all.collect(),
            }),
            pids_stats: Some(PidsStats {
                current: number("pids.current"),
                limit: self.read("pids.max").trim().parse().unwrap_or(0),
            }),
            blkio_stats: None,
            hugetlb_stats: Default::default(),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its parents may have other children.
        for path in self
            .path
            .ancestors()
            .take_while(|path| *path != Path::new(ROOT))
        {
            if fs::remove_dir(path).is_err() {
                return;
            }
        }
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

/// The number behind `key` in lines of keys and numbers; 0 if there is none.
fn entry(text: &str, key: &str) -> u64 {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let mut found = lines.filter(|(name, _)| *name == key);
    found
        .next()
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn entries_are_found_by_their_whole_name() {
        let text = "oom 1\noom_kill 3\nmax x\n";
        assert_eq!(
            ["oom_kill", "oom", "max", "low"].map(|key| entry(text, key)),
            [3, 1, 0, 0]
        );
    }
}
