//! The host's side of a stream: a terminal, pipe, socket or file that podvmm was given.
//!
//! Such descriptors are shared with the process that started podvmm. Setting O_NONBLOCK would
//! change them for a parent shell too, so they stay as they are: a descriptor is read or written
//! only when it says it is ready, and then by no more than it is sure to take.

mod input;
mod listener;
mod output;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use self::input::{Arrival, Input};
pub use self::listener::{ListenError, Listener};
pub use self::output::{Output, Progress};

/// The user and the group that this thread's files get, and which it asks for files as (setfsuid(2)).
pub fn user_of_files() -> (u32, u32) {
    // SAFETY: a number that no user has changes nothing. What is returned is the one that is so.
    let user = unsafe { libc::setfsuid(libc::uid_t::MAX) };
    // SAFETY: as above, for groups.
    let group = unsafe { libc::setfsgid(libc::gid_t::MAX) };
    (user.cast_unsigned(), group.cast_unsigned())
}

/// Whether epoll can tell when the file is ready. Regular files and /dev/null always are.
fn can_be_watched(file: &File) -> io::Result<bool> {
    let epoll = Epoll::new()?;
    let event = EpollEvent::new(EventSet::IN, 0);
    match epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the file is ready for `events` within `timeout`, or has failed and will say so.
fn is_ready(file: impl AsFd, events: libc::c_short, timeout: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `poll` is one pollfd and lives during the call.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
}
