//! A container's cgroup, of version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst).

mod limits;
mod stats;

use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::sys::pid_t;
use crate::wait;

const ROOT: &str = "/sys/fs/cgroup";

/// Dropping it removes it, once nobody is in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

/// How long those who were killed may take to be gone.
const GRACE: Duration = Duration::from_secs(2);

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("write {value:?} to {}", .path.display())]
    Write {
        path: PathBuf,
        value: String,
        source: io::Error,
    },
    #[error("a memory limit of {limit} bytes: {used} bytes are in use")]
    InUse { limit: u64, used: u64 },
    #[error("a limit of {swap} bytes for memory and swap is below that of {memory} for memory")]
    Swap { memory: i64, swap: i64 },
    #[error("{} is another container's", .0.display())]
    Taken(PathBuf),
    #[error("there are no huge pages of {0:?}")]
    PageSize(String),
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
                    return Err(Error::File {
                        path: here,
                        source: error,
                    });
                }
                _ => {}
            }
        }
        // Whoever shares one would be killed with the other.
        let procs = here.join("cgroup.procs");
        if fs::read(&procs).is_ok_and(|pids| !pids.is_empty()) {
            return Err(Error::Taken(here));
        }
        Ok(Self { path: here })
    }

    fn write(&self, file: &str, value: impl ToString) -> Result<(), Error> {
        let (path, value) = (self.path.join(file), value.to_string());
        // Not made if it is not there: what the kernel has not would be a matter of permission.
        let file = fs::File::options().write(true).truncate(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(value.as_bytes()));
        written.map_err(|source| Error::Write {
            path,
            value,
            source,
        })
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    pub(crate) fn add(&self, pid: pid_t) -> Result<(), Error> {
        self.write("cgroup.procs", pid)
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
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Who was killed may still be about to end.
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => None,
            _ => Some(()),
        };
        wait::until(GRACE, || gone(fs::remove_dir(&self.path)));
        // Its parents may have other children.
        for path in self
            .path
            .ancestors()
            .skip(1)
            .take_while(|path| *path != Path::new(ROOT))
        {
            if fs::remove_dir(path).is_err() {
                return;
            }
        }
    }
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
    fn entries_are_found_by_their_whole_name() {
        let text = "oom 1\noom_kill 3\nmax x\n";
        assert_eq!(
            ["oom_kill", "oom", "max", "low"].map(|key| entry(text, key)),
            [3, 1, 0, 0]
        );
    }
}
