//! Starts programs in a child that shares this process's memory until it is one.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{check, pid_t};

/// A program to start.
pub(crate) struct Program<'a> {
    /// Files to try in this order.
    pub(crate) paths: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    /// Standard input, output and error, and what else it is to have.
    pub(crate) descriptors: &'a [BorrowedFd<'a>],
    /// Namespaces of its own: CLONE_NEW*.
    pub(crate) namespaces: c_int,
    /// If standard input is a terminal, it is to be the controlling one.
    pub(crate) terminal: bool,
}

/// A child, which ends with 126 or 127 when its program could not be started.
pub(crate) struct Spawned {
    pub(crate) pid: pid_t,
    pub(crate) failure: Option<io::Error>,
}

/// What the child sees of its parent, whose memory it shares until it has its program.
struct Launch<'a> {
    program: &'a Program<'a>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    failure: AtomicI32,
}

/// Starts a program in a session of its own with no signal blocked.
///
/// The child borrows the parent's memory while the parent waits (CLONE_VM, CLONE_VFORK): copying
/// the page tables, as fork does, is what costs most where the guest's kernel is interpreted.
/// posix_spawn does the same but asks about each of the 64 signals first.
pub(crate) fn spawn(program: &Program<'_>) -> io::Result<Spawned> {
    const STACK: usize = 16 * 1024;
    let mut launch = Launch {
        program,
        argv: null_terminated(program.argv),
        env: null_terminated(program.env),
        failure: AtomicI32::new(0),
    };
    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    // SAFETY: `stack` and `launch` outlive the child's use of them, as CLONE_VFORK holds this
    // thread until the child has its program or has ended; `top` is aligned to 16 bytes, and
    // `child` never returns into frames that are not its own.
    let pid = check(unsafe {
        libc::clone(
            child,
            top.cast::<c_void>(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD | program.namespaces,
            (&raw mut launch).cast::<c_void>(),
        )
    })?;
    let failure = match launch.failure.load(Ordering::Relaxed) {
        0 => None,
        errno => Some(io::Error::from_raw_os_error(errno)),
    };
    Ok(Spawned { pid, failure })
}

fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// The child's life until its program's: system calls only, nothing allocated or freed.
extern "C" fn child(launch: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes a Launch, which outlives this function.
    let launch = unsafe { &*launch.cast::<Launch<'_>>() };
    let failure = match become_program(launch) {
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    };
    launch.failure.store(failure, Ordering::Relaxed);
    if matches!(failure, libc::ENOENT | libc::ENOTDIR) {
        127
    } else {
        126
    }
}

fn become_program(launch: &Launch<'_>) -> io::Result<std::convert::Infallible> {
    let Program {
        paths,
        descriptors,
        terminal,
        ..
    } = launch.program;
    // SAFETY: a sigset_t is an array of integers, and zero is its empty value.
    let no_signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set outlives the call, and the old mask is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const no_signals, ptr::null_mut()) })?;
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() })?;
    for (to, from) in (0..).zip(*descriptors) {
        // SAFETY: plain integers in; this process's table of descriptors is its own.
        check(unsafe { libc::dup2(from.as_raw_fd(), to) })?;
    }
    if *terminal {
        // A program can do without, and so need not be told.
        // SAFETY: TIOCSCTTY takes a plain integer.
        unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    }
    let mut verdict = libc::ENOENT;
    for path in *paths {
        // SAFETY: the path is NUL-terminated, and the arrays end with a null pointer.
        unsafe { libc::execve(path.as_ptr(), launch.argv.as_ptr(), launch.env.as_ptr()) };
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => (),
            Some(libc::EACCES) => verdict = libc::EACCES,
            Some(other) => return Err(io::Error::from_raw_os_error(other)),
            None => (),
        }
    }
    Err(io::Error::from_raw_os_error(verdict))
}
