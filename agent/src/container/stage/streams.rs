//! The standard streams of a process of a container, before it has its program.

use std::os::fd::{AsFd, OwnedFd};

use protocol::agent::oci::Process;
use rustix::pty::OpenptFlags;

use super::super::rootfs;

type Error = Box<dyn std::error::Error>;

/// Opens a terminal in the container and makes it this process's own. Returns the agent's end.
pub(super) fn terminal(process: &Process, is_first: bool) -> Result<OwnedFd, Error> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    if let Some(size) = process.console_size {
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = rustix::termios::Winsize {
            ws_row: cells(size.height),
            ws_col: cells(size.width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size)?;
    }
    // Not by its path, at which the container may have something else.
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    if is_first {
        rootfs::mount_console(slave.as_fd())?;
    }
    rustix::process::ioctl_tiocsctty(&slave)?;
    rustix::stdio::dup2_stdin(&slave)?;
    rustix::stdio::dup2_stdout(&slave)?;
    rustix::stdio::dup2_stderr(&slave)?;
    Ok(master)
}

/// Makes the standard streams the user's. A process that opens `/dev/stdout` opens the pipe or terminal
/// anew, which needs permission, and the agent made it as root.
pub(super) fn give(uid: u32) -> Result<(), Error> {
    let uid = Some(rustix::fs::Uid::from_raw(uid));
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for stream in streams {
        rustix::fs::fchown(stream, uid, None)
            .map_err(|errno| format!("give the user its standard streams: {errno}"))?;
    }
    Ok(())
}
