//! A container's cgroup, of version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst).

mod devices;
mod limits;
mod stats;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

use super::Process;
use crate::poll;
use crate::sys::pid_t;
pub(crate) use devices::used;

const ROOT: &str = "/sys/fs/cgroup";

/// Dropping this removes the cgroup, once no process is in it.
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
    #[error("ask where the container's first process is")]
    First(#[source] io::Error),
    #[error("the container's first process is in {}", .0.display())]
    Outside(PathBuf),
    #[error("a rule for devices: {0}")]
    Device(String),
    #[error("there are no huge pages of {0:?}")]
    PageSize(String),
    #[error("{0:?} is no limit of a cgroup of version 2")]
    Unified(String),
    #[error("the guest's kernel has no limit {0:?}")]
    Unknown(String),
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
        // If two containers shared a cgroup, killing one would kill the other, too.
        let procs = here.join("cgroup.procs");
        if fs::read(&procs).is_ok_and(|pids| !pids.is_empty()) {
            return Err(Error::Taken(here));
        }
        Ok(Self { path: here })
    }

    fn write(&self, file: &str, value: impl ToString) -> Result<(), Error> {
        write(self.path.join(file), &value.to_string())
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    pub(crate) fn add(&self, pid: pid_t) -> Result<(), Error> {
        self.write("cgroup.procs", pid)
    }

    /// Adds one more process of a container whose first is `first`. A container that has divided its
    /// cgroup, as systemd does, has processes only below it (kernel: cgroup-v2.rst, No Internal Process
    /// Constraint); the new one is then put where the first one is, as by runc.
    pub(crate) fn join(&self, pid: pid_t, first: &Process) -> Result<(), Error> {
        match self.add(pid) {
            Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {}
            added => return added,
        }
        let text = first.open("cgroup").and_then(io::read_to_string);
        let procs = self.below(&text.map_err(Error::First)?)?;
        let procs = procs.join("cgroup.procs");
        write(procs, &pid.to_string())
    }

    /// Which cgroup the text of a /proc/PID/cgroup says, if it is this one or below it.
    fn below(&self, text: &str) -> Result<PathBuf, Error> {
        let place = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let path = Path::new(ROOT).join(place.unwrap_or_default());
        let is_below = path.starts_with(&self.path);
        let is_plain = !path.components().any(|part| part == Component::ParentDir);
        match is_below && is_plain {
            true => Ok(path),
            false => Err(Error::Outside(path)),
        }
    }

    pub(crate) fn kill(&self) -> Result<(), Error> {
        self.write("cgroup.kill", 1)
    }

    /// The file that kills all who are in it once 1 is written to it.
    pub(crate) fn killer(&self) -> Result<File, Error> {
        let path = self.path.join("cgroup.kill");
        let file = File::options().write(true).open(&path);
        file.map_err(|source| Error::File { path, source })
    }

    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        self.write("cgroup.freeze", u8::from(frozen))
    }

    /// The file that changes when a process in it was killed for want of memory.
    pub(crate) fn events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// How often a process in it was killed for want of memory.
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
        poll::until(GRACE, || gone(remove(&self.path)));
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

/// Writes what a file of a cgroup is to be.
fn write(path: PathBuf, value: &str) -> Result<(), Error> {
    // Not made if it is not there: what the kernel has not would be a matter of permission.
    let file = File::options().write(true).truncate(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| Error::Write {
        path,
        value: value.to_owned(),
        source,
    })
}

/// Removes a cgroup and those that a container has made below it, the deepest first. By descriptors and
/// without recursion: a container can make paths of any length.
fn remove(path: &Path) -> io::Result<()> {
    let mut way = vec![Level::open(CWD, path)?];
    while let Some(level) = way.last_mut() {
        if let Some(name) = level.below.pop() {
            let next = Level::open(level.folder.as_fd(), &name)?;
            level.below.push(name);
            way.push(next);
            continue;
        }
        way.pop();
        if let Some(parent) = way.last_mut()
            && let Some(name) = parent.below.pop()
        {
            rustix::fs::unlinkat(&parent.folder, name, AtFlags::REMOVEDIR)?;
        }
    }
    fs::remove_dir(path)
}

/// A cgroup with those below it that are not removed yet.
struct Level {
    folder: OwnedFd,
    below: Vec<CString>,
}

impl Level {
    fn open(from: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(from, name, flags, Mode::empty())?;
        let mut below = Vec::new();
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if entry.file_type() == FileType::Directory && !matches!(name.to_bytes(), b"." | b"..")
            {
                below.push(name.to_owned());
            }
        }
        Ok(Self { folder, below })
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
    use std::mem::ManuallyDrop;

    #[test]
    fn what_a_container_left_below_its_cgroup_is_removed_with_it() {
        let top = std::env::temp_dir().join(format!("podvmm-cgroup-left-{}", std::process::id()));
        fs::create_dir_all(top.join("init.scope/deep/deeper")).unwrap();
        fs::create_dir_all(top.join("system.slice/a")).unwrap();
        fs::create_dir_all(top.join("system.slice/b")).unwrap();
        remove(&top).unwrap();
        assert!(!top.exists());
        let gone = remove(&top).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_process_is_put_nowhere_but_below_its_containers_cgroup() {
        let cgroup = ManuallyDrop::new(Cgroup {
            path: "/sys/fs/cgroup/pod/one".into(),
        });
        let below = |text| cgroup.below(text).ok();
        let init = PathBuf::from("/sys/fs/cgroup/pod/one/init");
        assert_eq!(below("1:name=x:/\n0::/pod/one/init\n"), Some(init));
        for text in ["0::/pod/one2", "0::/pod", "0::/pod/one/../two", "0::/", ""] {
            assert_eq!(below(text), None, "{text}");
        }
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
