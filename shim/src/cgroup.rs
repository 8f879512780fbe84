//! The pod's cgroup on the host: the shim moves there, and what it starts is born there. Hosts have
//! cgroups of version 2, or a hierarchy for each controller (kernel, admin-guide/cgroup-v1).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::protocol::figures::{Cpu, Memory, MemoryEvents, Metrics, Pids};

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
#[error("cgroup {}", .path.display())]
pub(crate) struct Error {
    path: PathBuf,
    source: io::Error,
}

/// One hierarchy: where it is mounted, and its controllers; none for version 2.
#[derive(Debug, PartialEq)]
struct Hierarchy {
    root: PathBuf,
    controllers: Vec<String>,
}

/// The hierarchies in the text of /proc/self/mountinfo.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let known = [
        "cpu",
        "cpuacct",
        "cpuset",
        "memory",
        "pids",
        "blkio",
        "devices",
        "freezer",
        "hugetlb",
        "net_cls",
        "net_prio",
        "perf_event",
    ];
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let root = PathBuf::from(left.split(' ').nth(4)?);
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.nth(1)?.split(',');
        let controllers: Vec<_> = options
            .filter(|option| known.contains(option))
            .map(String::from)
            .collect();
        match kind {
            "cgroup2" => Some(Hierarchy {
                root,
                controllers: Vec::new(),
            }),
            "cgroup" if !controllers.is_empty() => Some(Hierarchy { root, controllers }),
            _ => None,
        }
    };
    let mut found: Vec<_> = mountinfo.lines().filter_map(parse).collect();
    // Beside hierarchies of version 1 that of version 2 has nothing to limit.
    if found
        .iter()
        .any(|hierarchy| !hierarchy.controllers.is_empty())
    {
        found.retain(|hierarchy| !hierarchy.controllers.is_empty());
    }
    found
}

/// Where an OCI `cgroupsPath` is below a hierarchy's root. systemd's form is `SLICE:PREFIX:NAME`, of
/// which `a-b.slice` is below `a.slice` (systemd.slice(5)).
fn relative(cgroups_path: &str) -> Option<PathBuf> {
    let parts: Vec<_> = cgroups_path.split(':').collect();
    let path = match parts[..] {
        [slice, prefix, name] => {
            let stem = slice.strip_suffix(".slice")?;
            let mut path = PathBuf::new();
            let ends = stem.match_indices('-').map(|(at, _)| at);
            for end in ends.chain([stem.len()]).filter(|end| *end > 0) {
                path.push(format!("{}.slice", &stem[..end]));
            }
            path.join(format!("{prefix}-{name}.scope"))
        }
        _ => PathBuf::from(cgroups_path),
    };
    let names = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)));
    let path: PathBuf = names.collect();
    (!path.as_os_str().is_empty()).then_some(path)
}

/// A pod's cgroup in each hierarchy.
#[derive(Debug)]
pub(crate) struct Cgroup {
    places: Vec<(Hierarchy, PathBuf)>,
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the cgroup that `cgroups_path` names, if it is not there. None if it names none.
    pub(crate) fn make(cgroups_path: &str) -> Result<Option<Self>, Error> {
        let Some(relative) = relative(cgroups_path) else {
            return Ok(None);
        };
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut cgroup = Self {
            places: Vec::new(),
            made: Vec::new(),
        };
        for hierarchy in hierarchies(&mountinfo) {
            let path = hierarchy.root.join(&relative);
            if let Err(error) = cgroup.make_path(&hierarchy, &relative) {
                remove(&cgroup.made);
                return Err(error);
            }
            cgroup.places.push((hierarchy, path));
        }
        Ok(Some(cgroup))
    }

    fn make_path(&mut self, hierarchy: &Hierarchy, relative: &Path) -> Result<(), Error> {
        let mut path = hierarchy.root.clone();
        for name in relative {
            let parent = path.clone();
            path.push(name);
            match fs::create_dir(&path) {
                Ok(()) => self.made.push(path.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(Error { path, source }),
            }
            if hierarchy.controllers.iter().any(|name| name == "cpuset") {
                // A new one of version 1 takes nobody before it is told where they may run.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    inherit(&parent.join(file), &path.join(file));
                }
            }
        }
        Ok(())
    }

    /// Moves this process there. What it starts from now on begins there.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        self.take(0)
    }

    /// Moves a process there; 0 is this one. What it has used so far stays where it was.
    pub(crate) fn take(&self, pid: u32) -> Result<(), Error> {
        let mut places = self.places.iter();
        places.try_for_each(|(_, path)| move_to(path, pid))
    }

    /// Moves it to the root of each hierarchy, so that the cgroup can go.
    pub(crate) fn leave(&self) -> Result<(), Error> {
        self.places
            .iter()
            .try_for_each(|(hierarchy, _)| move_to(&hierarchy.root, 0))
    }

    /// What was made for it, to be removed in the opposite order.
    pub(crate) fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// What the pod has used of the host: the VM with its guest, and the shim.
    pub(crate) fn figures(&self) -> Metrics {
        let place = |controller: &str| {
            let has =
                |names: &[String]| names.is_empty() || names.iter().any(|name| name == controller);
            let found = self
                .places
                .iter()
                .find(|(hierarchy, _)| has(&hierarchy.controllers));
            found.map(|(hierarchy, path)| (path.as_path(), hierarchy.controllers.is_empty()))
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
            io: None,
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
}

/// Removes cgroups, the last made first, as far as nobody is in them.
pub(crate) fn remove(made: &[PathBuf]) {
    for path in made.iter().rev() {
        if let Err(error) = fs::remove_dir(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::debug!("remove cgroup {}: {error}", path.display());
        }
    }
}

fn move_to(path: &Path, pid: u32) -> Result<(), Error> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, pid.to_string()).map_err(|source| Error {
        path: procs,
        source,
    })
}

fn inherit(from: &Path, to: &Path) {
    let is_empty = fs::read_to_string(to).is_ok_and(|text| text.trim().is_empty());
    if is_empty && let Ok(value) = fs::read(from) {
        // If it cannot be, entering the cgroup says so.
        let _ = fs::write(to, value);
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

/// Nanoseconds, and without the quota, which another hierarchy has.
fn cpu_v1(path: &Path) -> Cpu {
    Cpu {
        usage_usec: number(path, "cpuacct.usage") / 1000,
        user_usec: number(path, "cpuacct.usage_user") / 1000,
        system_usec: number(path, "cpuacct.usage_sys") / 1000,
        ..Cpu::default()
    }
}

/// The two versions have other names for the same things, but for swap, which the first has not apart.
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
    fn a_path_of_systemds_is_slices_within_slices() {
        let path = |text| relative(text).map(|path| path.display().to_string());
        let slice = "kubepods-burstable-podA_B.slice:cri-containerd:xyz";
        let expected = "kubepods.slice/kubepods-burstable.slice/\
            kubepods-burstable-podA_B.slice/cri-containerd-xyz.scope";
        assert_eq!(path(slice).as_deref(), Some(expected));
        assert_eq!(path("/default/../demo").as_deref(), Some("default/demo"));
        assert_eq!((path(""), path("/"), path("a:b:c")), (None, None, None));
    }

    #[test]
    fn hierarchies_of_version_1_come_before_that_of_version_2() {
        let v1 = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let v2 = "32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let roots = |text: &str| {
            let found = hierarchies(text);
            found
                .iter()
                .map(|one| one.root.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(roots(&format!("{v1}{v2}")), ["/sys/fs/cgroup/memory"]);
        assert_eq!(roots(v2), ["/sys/fs/cgroup/unified"]);
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
