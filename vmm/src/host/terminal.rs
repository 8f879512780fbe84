//! The user's terminal: raw while a guest's console is on it, and restored
//! whatever happens.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};

/// Standard input in raw mode. Dropping it restores what was.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    fd: RawFd,
    before: libc::termios,
}

impl RawTerminal {
    /// Makes the terminal on standard input raw; `None` if that is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let fd = io::stdin().as_raw_fd();
        let mut before = MaybeUninit::uninit();
        // SAFETY: `before` is valid for writes.
        let result = unsafe { libc::tcgetattr(fd, before.as_mut_ptr()) };
        if result != 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ENOTTY) {
                Ok(None)
            } else {
                Err(error)
            };
        }
        // SAFETY: tcgetattr succeeded, so it has filled `before`.
        let before = unsafe { before.assume_init() };
        let mut raw = before;
        // SAFETY: `raw` is a valid termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        set(fd, &raw)?;
        Ok(Some(Self { fd, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        let _ = set(self.fd, &self.before);
    }
}

/// Rows and columns, if both standard input and output are a terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return None;
    }
    let mut size = MaybeUninit::<libc::winsize>::uninit();
    // SAFETY: TIOCGWINSZ writes a winsize, for which there is room.
    let result = unsafe {
        libc::ioctl(
            io::stdout().as_raw_fd(),
            libc::TIOCGWINSZ,
            size.as_mut_ptr(),
        )
    };
    // SAFETY: asked only if the ioctl succeeded, which has then filled `size`.
    (result == 0)
        .then(|| unsafe { size.assume_init() })
        .map(|size| (size.ws_row, size.ws_col))
}

fn set(fd: RawFd, attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: `attributes` is valid for reads.
    match unsafe { libc::tcsetattr(fd, libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
