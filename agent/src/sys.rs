//! The system calls std has no name for, each behind a safe function. Nothing here decides.

mod spawn;

use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::time::Duration;

pub(crate) use libc::{
    MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT, POLLERR, POLLHUP, POLLIN,
    POLLOUT, pid_t, pollfd,
};

pub(crate) use self::spawn::{Program, Spawned, spawn};

fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes a mount read-only, by a descriptor of its root, with all that is mounted below it.
pub(crate) fn make_all_readonly(root: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: path and attributes outlive the call, and the size is that of what is pointed to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn mount(
    source: &CStr,
    target: &CStr,
    fstype: &CStr,
    flags: c_ulong,
    options: &CStr,
) -> io::Result<()> {
    // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            flags,
            options.as_ptr().cast::<c_void>(),
        )
    };
    check(result).map(drop)
}

pub(crate) fn unmount(target: &CStr) -> io::Result<()> {
    // SAFETY: `target` is NUL-terminated and outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), 0) }).map(drop)
}

pub(crate) fn sync() {
    // SAFETY: takes and returns nothing.
    unsafe { libc::sync() }
}

pub(crate) fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`.
    check(unsafe { libc::sethostname(name.as_ptr().cast::<c_char>(), name.len()) }).map(drop)
}

/// The variable that the monitor sets, by the kernel's command line, where programs' C library is not
/// to use all that the processor has.
pub(crate) const C_LIBRARY: &str = "GLIBC_TUNABLES";

/// The variable [`C_LIBRARY`] for a program's environment, if it is set.
pub(crate) fn c_library() -> Vec<CString> {
    let tunables = std::env::var(C_LIBRARY).ok();
    let variable = tunables.and_then(|value| CString::new(format!("{C_LIBRARY}={value}")).ok());
    variable.into_iter().collect()
}

/// Brings the loopback interface up; the kernel then gives it its addresses.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: plain integers in, a new descriptor out.
    let socket =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: `socket` is open, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: ifreq is integers and unions of them, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = c_char::from_ne_bytes([*from]);
    }
    #[expect(clippy::cast_possible_truncation, reason = "both flags are below 2^15")]
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .map(drop)
}

/// Starts the machine again, which ends the VM. Returns only when it may not.
pub(crate) fn reboot() -> io::Error {
    // SAFETY: plain integers in.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    io::Error::last_os_error()
}

/// Makes sure that descriptors 0 to `last` are open, or the next files opened would take their
/// place: a kernel without a console leaves the first three closed.
pub(crate) fn fill_descriptors(last: c_int) {
    // SAFETY: asks about a number.
    while unsafe { libc::fcntl(last, libc::F_GETFD) } == -1 {
        // SAFETY: the path is NUL-terminated; the descriptor is left open on purpose.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } == -1 {
            return;
        }
    }
}

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain integers in; pipes and terminals have no other status flag worth keeping.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }).map(drop)
}

/// Reads at most `limit` bytes behind what `buffer` holds, and tells how many. The memory is not
/// cleared first: what no data reaches stays untouched and costs no page fault.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>, limit: usize) -> io::Result<usize> {
    buffer.reserve(limit);
    let spare = buffer.spare_capacity_mut();
    // SAFETY: `spare` has room for at least `limit` bytes.
    let count = unsafe { libc::read(fd.as_raw_fd(), spare.as_mut_ptr().cast::<c_void>(), limit) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written `count` bytes there.
    unsafe { buffer.set_len(buffer.len() + count) };
    Ok(count)
}

/// A file's bytes. std asks for its size first, which the files of /proc do not have, and then
/// reads them in many small pieces.
pub(crate) fn read_file(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    const SMALL: usize = 4096;
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    loop {
        let limit = bytes.len().max(SMALL);
        if read(file.as_fd(), &mut bytes, limit)? == 0 {
            return Ok(bytes);
        }
    }
}

pub(crate) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe `bytes`.
    let count =
        unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast::<c_void>(), bytes.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Waits for one of `fds`, at most `timeout` (for ever without one), and tells how many are ready.
/// A negative descriptor is passed over.
pub(crate) fn poll(fds: &mut [pollfd], timeout: Option<Duration>) -> io::Result<c_int> {
    let timeout = timeout.map_or(-1, |t| c_int::try_from(t.as_millis()).unwrap_or(c_int::MAX));
    loop {
        // SAFETY: pointer and length describe `fds`.
        let result =
            check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) });
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            _ => return result,
        }
    }
}

/// Blocks SIGCHLD, and gives a descriptor that is readable while one is pending. SIGPIPE is
/// blocked too: writing to a closed pipe is then an error and no more.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: a sigset_t is an array of integers.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a sigset_t, and zero is its empty value.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    // SAFETY: `set` is a sigset_t that outlives the call.
    let fd = check(unsafe {
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    })?;
    // SAFETY: `fd` is open, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: as above.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGPIPE) };
    // SAFETY: `set` outlives the call, and the old mask is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) })?;
    Ok(fd)
}

/// What waiting for any child found.
pub(crate) enum Waited {
    /// This child has ended, with this status as shells tell it.
    Ended(pid_t, u8),
    /// There are children, and all are alive.
    Alive,
    /// There are no children.
    Childless,
}

pub(crate) fn wait_any() -> io::Result<Waited> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    match check(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) }) {
        Ok(0) => Ok(Waited::Alive),
        Ok(pid) => Ok(Waited::Ended(pid, shell_status(status))),
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(Waited::Childless),
        Err(error) => Err(error),
    }
}

/// A wait status as shells tell it: 0 to 255 of the process's own, or 128 + the signal's number.
fn shell_status(status: c_int) -> u8 {
    let status = if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    };
    u8::try_from(status).unwrap_or(u8::MAX)
}

/// A process like this one, as a child of this one's parent. Zero in the new one.
///
/// This process must have no other threads: those would not be there in the new one, and what they
/// held would be held for ever.
pub(crate) fn fork_sibling() -> io::Result<pid_t> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without a stack of its own the child goes on where this process is, in memory of its
    // own; there is one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid_t::try_from(pid) {
        Ok(pid) if pid >= 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Which child has ended, without taking note of it. Waits until one has.
pub(crate) fn next_ended() -> io::Result<pid_t> {
    // SAFETY: a siginfo_t is integers and unions of them, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOWAIT;
    // SAFETY: `info` outlives the call.
    check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) })?;
    // SAFETY: waitid has filled it for a child.
    Ok(unsafe { info.si_pid() })
}

/// Takes note of the end of this child, if it has ended: its status as shells tell it.
pub(crate) fn reap(child: pid_t) -> Option<u8> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let reaped = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
    (reaped == child).then(|| shell_status(status))
}

pub(crate) fn kill(pid: pid_t, signal: c_int) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match check(unsafe { libc::kill(pid, signal) }) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}

/// Sends a signal to the process that a pidfd is of, and to no other that has its number since. Signal
/// 0 asks whether it is there. Tells whether it is.
pub(crate) fn signal(process: BorrowedFd<'_>, signal: c_int) -> io::Result<bool> {
    // SAFETY: plain integers in, and no information to go with the signal.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match result {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            error => Err(error),
        },
    }
}

/// Makes the keyring of this name this process's session keyring, a new one if there is none
/// (keyctl(2)). A new one can be found by name by processes of its user.
pub(crate) fn join_session_keyring(name: &CStr, is_new: bool) -> io::Result<()> {
    // From linux/keyctl.h.
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    const KEYCTL_SETPERM: c_int = 5;
    // All to who possesses it, and to its user what a keyring starts with (view, read, link) and search.
    const PERMISSIONS: c_ulong = 0x3f1b_0000;
    // SAFETY: the name is NUL-terminated and outlives the call.
    let keyring =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    if keyring == -1 {
        return Err(io::Error::last_os_error());
    }
    if !is_new {
        return Ok(());
    }
    // SAFETY: plain integers in.
    match unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring, PERMISSIONS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the kernel entropy, and has all that is random from now on follow from it: what CPUs and
/// programs have drawn ahead is thrown away with the old seed (Linux 4.14).
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    // From linux/random.h.
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let device = File::options().write(true).open("/dev/urandom")?;
    let info = pool_info(bytes).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: RNDADDENTROPY reads as many bytes behind the two numbers as the second says, which
    // `info` has.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// A `rand_pool_info`: how many bits of entropy, how many bytes, and these.
fn pool_info(bytes: &[u8]) -> Option<Vec<u8>> {
    let len = c_int::try_from(bytes.len()).ok()?;
    let bits = len.checked_mul(8)?;
    Some([&bits.to_ne_bytes(), &len.to_ne_bytes(), bytes].concat())
}

/// Holds this process, which has one thread, to a seccomp filter.
pub(crate) fn load_seccomp(filter: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    let len = filter.len().try_into();
    let program = libc::sock_fprog {
        len: len.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        // The kernel reads it only.
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` describes `filter`; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!(
            "thread {thread} is not held to it"
        ))),
    }
}

/// Has the next program that this process becomes have no descriptor from `first` on (close_range(2)).
pub(crate) fn close_on_exec_from(first: c_int) -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: takes plain integers, and closes nothing as long as this program runs.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, c_int::MAX, flags) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a program (bpf(2)) say which devices the processes of a cgroup may use. It goes with the cgroup.
pub(crate) fn attach_device_filter(cgroup: &Path, program: &[u64]) -> io::Result<()> {
    /// A `bpf_attr` as BPF_PROG_LOAD has it.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        program: *const u64,
        license: *const c_char,
        log: [u64; 2],
        version: u32,
        flags: u32,
    }
    /// A `bpf_attr` as BPF_PROG_ATTACH has it.
    #[repr(C)]
    struct Attach {
        target: c_int,
        program: c_int,
        kind: u32,
        flags: u32,
    }
    // From linux/bpf.h.
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_CGROUP_DEVICE: u32 = 6;
    // A container may restrict the cgroups that it makes itself further.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let count = u32::try_from(program.len());
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: count.map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        program: program.as_ptr(),
        license: c"Apache-2.0".as_ptr(),
        log: [0; 2],
        version: 0,
        flags: 0,
    };
    // SAFETY: `load` describes `program` and outlives the call, as its strings do; the size is its own.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<Load>(),
        )
    };
    let loaded = c_int::try_from(loaded).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor, or there is none.
    let loaded = unsafe { OwnedFd::from_raw_fd(check(loaded)?) };
    let cgroup = File::open(cgroup)?;
    let attach = Attach {
        target: cgroup.as_raw_fd(),
        program: loaded.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` outlives the call, and the size is its own.
    let attached = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    };
    match attached {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks a child to end. A child that has ended keeps its number until it is waited for, so the
/// signal reaches no other process.
pub(crate) fn terminate(child: pid_t) {
    // SAFETY: takes no pointers.
    unsafe { libc::kill(child, libc::SIGTERM) };
}

/// Kills every process but this one. Only PID 1 is obeyed: it alone owns them all.
pub(crate) fn kill_all() -> bool {
    // SAFETY: plain integers in.
    std::process::id() == 1 && unsafe { libc::kill(-1, libc::SIGKILL) } == 0
}

/// A terminal pair of the given size: the master, not blocking, and the slave.
pub(crate) fn open_terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated.
    let master = check(unsafe { libc::open(c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK) })?;
    // SAFETY: `master` is open, and nothing else owns it.
    let master = unsafe { OwnedFd::from_raw_fd(master) };
    let locked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) })?;
    // SAFETY: TIOCGPTPEER takes open flags as its argument.
    let slave = check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: `slave` is open, and nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize.
    check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok((master, slave))
}

/// A process has one set of children: one test at a time makes some, or waits for any of them.
#[cfg(test)]
pub(crate) fn turn_with_children() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_status_reads_as_in_shells() {
        assert_eq!(shell_status(0), 0);
        assert_eq!(shell_status(7 << 8), 7);
        assert_eq!(shell_status(255 << 8), 255);
        assert_eq!(shell_status(libc::SIGKILL), 137);
        assert_eq!(shell_status(libc::SIGSEGV | 0x80), 139);
    }

    #[test]
    fn entropy_is_given_all_its_worth() {
        let info = [24_i32.to_ne_bytes(), 3_i32.to_ne_bytes()].concat();
        assert_eq!(pool_info(b"abc").unwrap(), [&info, &b"abc"[..]].concat());
    }

    #[test]
    fn a_file_is_read_whole_whatever_its_size() {
        let file = std::env::temp_dir().join(format!("podvmm-agent-{}", std::process::id()));
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&file, &bytes).unwrap();
        let read = read_file(&file);
        std::fs::remove_file(&file).unwrap();
        assert!(read.unwrap() == bytes);
    }

    #[test]
    fn reading_keeps_what_the_buffer_held() {
        use std::io::Write;
        use std::os::fd::AsFd;
        let (from, mut to) = io::pipe().unwrap();
        to.write_all(b"def").unwrap();
        let mut buffer = b"abc".to_vec();
        assert_eq!(read(from.as_fd(), &mut buffer, 2).unwrap(), 2);
        assert_eq!(buffer, b"abcde");
    }

    #[test]
    fn what_is_mounted_below_is_read_only_too() {
        let outer = std::env::temp_dir().join(format!("podvmm-agent-rro-{}", std::process::id()));
        let inner = outer.join("inner");
        std::fs::create_dir(&outer).unwrap();
        let at = |path: &Path| CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        mount(c"tmpfs", &at(&outer), c"tmpfs", 0, c"").expect("this test needs root");
        std::fs::create_dir(&inner).unwrap();
        mount(c"tmpfs", &at(&inner), c"tmpfs", 0, c"").unwrap();
        let root = rustix::fs::open(&outer, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
        let made = make_all_readonly(root.unwrap().as_fd());
        let written = [&outer, &inner].map(|folder| std::fs::write(folder.join("file"), "x"));
        for place in [&inner, &outer] {
            rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
        std::fs::remove_dir(&outer).unwrap();
        made.unwrap();
        for result in written {
            assert_eq!(
                result.unwrap_err().kind(),
                io::ErrorKind::ReadOnlyFilesystem
            );
        }
    }
}
