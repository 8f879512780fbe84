//! The limits that all processes of a pod start with. A container's specification has the last word.
//!
//! The kernel's own follow from the memory that it boots with, which for a pod may be a fraction of
//! what it has later.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit};

/// The limit of open files of containerd's containers, and the kernel's default for the highest that
/// a process may have.
const OPEN_FILES: u64 = 1 << 20;

/// The highest limit of open files that a container may ask for, as systemd has it on a node.
const MAX_OPEN_FILES: &str = "1073741816";

/// Raises the limits of this process and of the guest. What each step came to, by its name.
pub(crate) fn raise() -> [(&'static str, io::Result<()>); 4] {
    let to = |resource, limit: Option<u64>| {
        let (current, maximum) = (limit, limit);
        rustix::process::setrlimit(resource, Rlimit { current, maximum }).map_err(io::Error::from)
    };
    [
        (
            "allow many open files",
            fs::write("/proc/sys/fs/nr_open", MAX_OPEN_FILES),
        ),
        (
            "raise the limit of open files",
            to(Resource::Nofile, Some(OPEN_FILES)),
        ),
        ("allow as many threads as pids", threads()),
        ("lift the limit of processes", to(Resource::Nproc, None)),
    ]
}

/// Allows as many threads as there are numbers for them.
fn threads() -> io::Result<()> {
    let most = fs::read("/proc/sys/kernel/pid_max")?;
    fs::write("/proc/sys/kernel/threads-max", most)
}
