//! A pid namespace: the process in it that runs the VM, and the one outside that has its outcome.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::process;

use rustix::process::{Pid, Signal, WaitOptions, getpid, set_parent_process_death_signal, waitpid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::host::signals;

/// Returns in the first process of a pid namespace: this one if it is that already, as the shim starts it, or
/// else a child. This one waits for it then, and passes on the signals that would end it.
pub(super) fn first_of_its_namespace() -> io::Result<()> {
    if getpid().is_init() {
        return Ok(());
    }
    // One that comes before both processes watch for it would end the outer process without the VM's, or be
    // lost: the first process of a namespace gets no signal from outside that it does not expect.
    signals::hold()?;
    let own = File::open("/proc/self/ns/pid")?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe because of flags not used here"
    )]
    rustix::thread::unshare(UnshareFlags::NEWPID)?;
    // SAFETY: there is no other thread, which could hold a lock that the child needs.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // It dies with this process, of which it is the VM.
        0 => Ok(set_parent_process_death_signal(Some(Signal::KILL))?),
        child => {
            let child = Pid::from_raw(child).expect("it is a process");
            // Whose next children are of another namespace can start no thread.
            move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
            process::exit(outcome(child))
        }
    }
}

/// Waits for the end of the VM's process, as this one's exit code.
fn outcome(child: Pid) -> i32 {
    let passed_on = signals::watch(move |signal| {
        // It may have ended at this moment.
        let _ = Signal::from_named_raw(signal)
            .map(|signal| rustix::process::kill_process(child, signal));
    });
    if let Err(error) = passed_on {
        log::warn!("signals are not passed on to the VM's process: {error}");
    }
    match waitpid(Some(child), WaitOptions::empty()) {
        Ok(Some((_, status))) => {
            let signal = status.terminating_signal().map(|signal| 128 + signal);
            status.exit_status().or(signal).unwrap_or(0)
        }
        // It is no child of this process, which cannot be.
        Ok(None) | Err(_) => EXIT_UNKNOWN,
    }
}

/// The exit code where the VM's is not known: that of a failure of podvmm's.
const EXIT_UNKNOWN: i32 = 125;
