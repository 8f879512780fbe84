//! Signals that end podvmm, as messages, and one that must not end it. Nothing runs in a signal
//! handler.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread::Builder;

use super::thread::Kind;

/// What a terminal, an init system or a person sends to end a process.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Has the ending signals wait until [`watch`] is called: those of this thread, and of threads and processes
/// that it starts.
pub(crate) fn hold() -> io::Result<()> {
    let set = ending_set();
    // SAFETY: `set` is valid for reads, and a null old set is allowed.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    Ok(())
}

/// Blocks the ending signals in this thread and those it starts, and calls
/// `received` for each that comes. To be called before any other thread starts.
pub(crate) fn watch(received: impl Fn(i32) + Send + 'static) -> io::Result<()> {
    hold()?;
    let set = ending_set();
    let builder = Builder::new().name("signals".into()).stack_size(32 << 10);
    Kind::Signals.spawn(builder, move || {
        loop {
            let mut signal = 0;
            // SAFETY: both point to valid memory of this thread.
            let result = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
            if result == 0 {
                received(signal);
            }
        }
    })?;
    Ok(())
}

/// Makes a write beyond the largest file that this process may make (RLIMIT_FSIZE, setrlimit(2)) fail
/// with EFBIG. The guest or the client gets that error. By default the process would be killed by
/// SIGXFSZ, so that one big file in a share would end the VM.
pub(crate) fn survive_file_size_limit() -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so nothing is run that must be safe in one.
    let old = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if old == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn ending_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `set` is valid for writes.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has filled it.
    let mut set = unsafe { set.assume_init() };
    for signal in ENDING {
        // SAFETY: `set` is a valid set, and `signal` a valid signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}
