//! What podvmm's starter has opened for it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A descriptor of podvmm's that its starter names by number.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is no negative number, which would be undefined. It is borrowed for one call, which
    // fails if it is not open. The starter that names a number says what it is for, and the
    // duplicate is podvmm's own.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    inherited.try_clone_to_owned()
}
