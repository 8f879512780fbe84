//! The end of a podvmm that has made a system call which no thread of its kind makes: a fault of ours, or a
//! guest that has taken the thread over. Nothing of the process can be trusted then, so it ends in the signal's
//! handler.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

/// podvmm's exit code then.
const EXIT_VIOLATION: libc::c_int = 118;
/// `si_code` of a signal that a filter sent (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;

/// `siginfo_t` as far as a signal of a filter fills it (asm-generic/siginfo.h, `_sigsys`).
#[repr(C)]
struct Info {
    /// The signal, an error, `si_code`, and where the call was made.
    head: [i32; 6],
    /// The call's number.
    syscall: i32,
}

/// Where it is said.
static LOG: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    /// The thread's name, filled up with zeros. A handler may read nothing that is made when it is read.
    static NAME: Cell<[u8; 16]> = const { Cell::new([0; 16]) };
}

/// Notes the name of the calling thread.
pub(super) fn name_thread() {
    let thread = std::thread::current();
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(thread.name().unwrap_or("?").bytes()) {
        *to = from;
    }
    NAME.set(name);
}

/// Has the process end when a filter refuses a call.
pub(super) fn watch(log: Option<&File>) -> io::Result<()> {
    if let Some(log) = log {
        // Its copy is never closed.
        let log = rustix::io::fcntl_dupfd_cloexec(log, 0)?;
        LOG.store(log.into_raw_fd(), Ordering::Relaxed);
    }
    Ok(register_signal_handler(libc::SIGSYS, on_violation)?)
}

extern "C" fn on_violation(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a handler that is registered with SA_SIGINFO a valid `siginfo_t`.
    let code = unsafe { (*info).si_code };
    let status = if code == SYS_SECCOMP {
        // SAFETY: as above; a `siginfo_t` has 128 bytes, and `si_code` says that it is filled like this.
        say(unsafe { (*info.cast::<Info>()).syscall });
        EXIT_VIOLATION
    } else {
        128 + signal
    };
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe { libc::_exit(status) }
}

/// Writes what happened, without memory of its own: the thread may hold the allocator's lock.
fn say(number: i32) {
    let name = NAME.get();
    let len = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    let name = str::from_utf8(&name[..len]).unwrap_or("?");
    let call = usize::try_from(number).ok().and_then(Sysno::new);
    let call = call.map_or("unknown", |call| call.name());
    let mut text = [0; 256];
    let mut rest = &mut text[..];
    // There is room.
    let _ = writeln!(
        rest,
        "podvmm: thread {name} made the system call {call} ({number}), which it has no need of: the VM is \
         ended (docs/security.md)"
    );
    let left = rest.len();
    let written = &text[..text.len() - left];
    // SAFETY: standard error or a descriptor that is never closed; if a caller has closed standard error, the
    // write fails or goes to what took its number, as every message of the process would.
    let log = unsafe { BorrowedFd::borrow_raw(LOG.load(Ordering::Relaxed)) };
    let _ = rustix::io::write(log, written);
}
