//! Which of the host's files each kind of thread may open, remove or make (landlock(7)): all that the VM needs,
//! which the jail holds the process to; its folders, such as shares; its sockets, to remove them; or none.
//!
//! Filters say which calls a thread may make, this what for. It holds where filters are off, too.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use super::Kind;

/// What a kind of thread reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// What the process does.
    All,
    /// Folders that are read or written.
    Folders,
    /// Places of sockets, to remove those in them.
    Sockets,
    Nothing,
}

/// Rules that threads take on.
#[derive(Debug)]
pub(crate) struct Rules {
    /// By which a thread may use folders, and no files outside them.
    pub(crate) folders: OwnedFd,
    /// By which a thread may remove sockets.
    pub(crate) sockets: OwnedFd,
    /// By which it may do nothing.
    pub(crate) nothing: OwnedFd,
}

/// The process's rules, if it is in a jail.
static RULES: OnceLock<Rules> = OnceLock::new();

/// Gives threads their rules, from here on.
pub(crate) fn hold(rules: Rules) {
    // A process enters one jail.
    let _ = RULES.set(rules);
}

impl Kind {
    fn reach(self) -> Reach {
        match self {
            Self::Control | Self::Snapshot => Reach::All,
            Self::Files => Reach::Folders,
            Self::Api | Self::Io | Self::Console | Self::Signals | Self::PageServer => {
                Reach::Sockets
            }
            Self::Vcpu | Self::Disk | Self::Memory | Self::Pages => Reach::Nothing,
        }
    }

    /// Holds the calling thread to what its kind reaches.
    pub(super) fn restrict(self) -> io::Result<()> {
        let Some(rules) = RULES.get() else {
            return Ok(());
        };
        let rules = match self.reach() {
            Reach::All => return Ok(()),
            Reach::Folders => &rules.folders,
            Reach::Sockets => &rules.sockets,
            Reach::Nothing => &rules.nothing,
        };
        // SAFETY: it takes a descriptor, which is open as long as the process runs, and flags, of which there
        // are none.
        let result =
            unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
