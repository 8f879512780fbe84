//! What a process in a container tries to get at the runtime that started it, and at other containers. Each thing
//! that it gets is a line; from a container that is kept apart none comes.
//!
//! Linux on a node has the same answers for a container of runc's.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// What the runtime keeps outside of containers.
const PLACES: [&str; 4] = ["run/kata-containers", "run/containerd", "podvmm", "init"];

/// What a container's root would change for all: each runs a program or acts outside of it.
const SWITCHES: [&str; 5] = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/vm/drop_caches",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/cgroup.procs",
];

/// How long [`watch`] waits for its end: a guest's kernel may be interpreted.
const PATIENCE: Duration = Duration::from_secs(300);

/// Pids to try by number: those of a runtime are low in a guest.
const PIDS: std::ops::Range<i32> = 1..400;

/// Tries all of it once, and says what it got. `agent` is the runtime's vsock port; 0 if it has none.
pub fn attempts(agent: u32) -> Vec<String> {
    let mut got = Vec::new();
    got.extend(
        foreign_pids()
            .into_iter()
            .map(|pid| format!("reaches process {pid}")),
    );
    got.extend(
        places()
            .into_iter()
            .map(|place| format!("sees {}", place.display())),
    );
    got.extend(
        mounts()
            .into_iter()
            .map(|mount| format!("has mounted {mount}")),
    );
    let mut options = OpenOptions::new();
    let switches = SWITCHES.iter();
    let open = switches.filter(|path| options.write(true).open(path).is_ok());
    got.extend(open.map(|path| format!("may write {path}")));
    if let Ok(file) = by_handle() {
        got.push(format!("opens by its number {file}"));
    }
    if agent != 0 && VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, agent)).is_ok() {
        got.push("has the agent's port".into());
    }
    got
}

/// Processes that are not in this container's /proc, and answer to their number all the same.
fn foreign_pids() -> Vec<i32> {
    let is_foreign = |pid: &i32| !Path::new("/proc").join(pid.to_string()).exists();
    PIDS.filter(is_foreign)
        .filter(|pid| reaches(*pid))
        .collect()
}

/// Whether a signal, a trace or a look at its memory goes through.
fn reaches(pid: i32) -> bool {
    let mut byte = 0_u8;
    let here = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let there = libc::iovec {
        iov_base: 0x40_0000 as *mut libc::c_void,
        iov_len: 1,
    };
    // SAFETY: signal 0 is none.
    let is_there = unsafe { libc::kill(pid, 0) } == 0;
    // SAFETY: takes plain numbers; a process that is traced by this one goes on when this one ends.
    let is_traced = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } == 0;
    // SAFETY: `here` is a byte of this process's, and `there` is only looked at in the other one.
    let is_read =
        unsafe { libc::process_vm_readv(pid, &raw const here, 1, &raw const there, 1, 0) } > 0;
    is_there || is_traced || is_read
}

/// Ways out of the root that lead to what the runtime has.
fn places() -> Vec<PathBuf> {
    let ways = [
        "/",
        "/..",
        "/../../../..",
        "/proc/1/root",
        "/proc/1/root/..",
        "/proc/1/cwd/../..",
    ];
    let all = ways
        .iter()
        .flat_map(|way| PLACES.map(|place| Path::new(way).join(place)));
    all.filter(|place| place.exists()).collect()
}

/// Mounts of the runtime's that are mounted here, too: at a place of its, or a pod's share as a whole. What the
/// host has mounted in the share is a file system of its own in the guest, without the share's name.
fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let of_runtime = text.lines().filter(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let is_share = line.contains(" - virtiofs kataShared ") && fields.get(3) == Some(&"/");
        is_share
            || PLACES
                .iter()
                .any(|place| fields.get(4).is_some_and(|at| at.contains(place)))
    });
    of_runtime.map(String::from).collect()
}

/// Opens a file by what the kernel numbers it with, beside its root: the first of the file system that this
/// container's root is in (open_by_handle_at(2)).
fn by_handle() -> io::Result<String> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u32; 4],
    }
    // FUSE: nodeid in two halves, generation (linux/fs/fuse/inode.c); others: inode, generation.
    let handles = [(12, 0x81, [0, 1, 0, 0]), (8, 1, [2, 0, 0, 0])];
    let root = File::open("/")?;
    for (bytes, kind, data) in handles {
        let mut handle = Handle { bytes, kind, data };
        // SAFETY: `handle` begins as a file_handle and has as many bytes as it says.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                root.as_raw_fd(),
                &raw mut handle,
                libc::O_RDONLY,
            )
        };
        if fd >= 0 {
            let link = fs::read_link(format!("/proc/self/fd/{fd}"))?;
            return Ok(link.display().to_string());
        }
    }
    Err(io::Error::last_os_error())
}

/// Watches for processes that come into this container until the file `stop` is there, and says of each what
/// it gets of it before it has a program of the container's: such a one still has the runtime's memory and
/// descriptors.
pub fn watch(own: &Path, stop: &Path) -> io::Result<()> {
    let mut said: Vec<String> = Vec::new();
    let end = Instant::now() + PATIENCE;
    println!("watching");
    while !stop.exists() && Instant::now() < end {
        // The parent of a process that is traced learns of its end only after the tracer has.
        // SAFETY: a null status is allowed.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) } > 0 {
        }
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let of_process = entry.path();
            // Its program is a link that /proc shows to those who may trace it.
            let Ok(program) = fs::read_link(of_process.join("exe")) else {
                continue;
            };
            if program.starts_with(own) {
                continue;
            }
            let mut got = vec![format!("sees the program {}", program.display())];
            let mut options = OpenOptions::new();
            // While it runs that is refused for the sake of what runs; as soon as it does not, it is tried again.
            let file = options
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(of_process.join("exe"));
            if let Ok(file) = file {
                let again = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                for _ in 0..1000 {
                    // SAFETY: the path ends with NUL and outlives the call.
                    let fd =
                        unsafe { libc::open(again.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
                    if fd >= 0 {
                        got.push("may write the program".into());
                        break;
                    }
                }
            }
            if File::open(of_process.join("mem")).is_ok() {
                got.push("reads its memory".into());
            }
            let files = fs::read_dir(of_process.join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            let links = files.filter_map(|file| fs::read_link(file.path()).ok());
            got.extend(links.map(|link| format!("sees its file {}", link.display())));
            // SAFETY: takes plain numbers.
            if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } == 0 {
                got.push("traces it".into());
            }
            for line in got {
                if !said.contains(&line) {
                    println!("{line}");
                    said.push(line);
                }
            }
        }
    }
    Ok(())
}
