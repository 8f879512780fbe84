//! RAM that another process gives a VM, page by page, as the VM comes to need it.
//!
//! ```text
//!        connect, userfaultfd + mappings
//! VM ──────────────────────────────────▶ handler
//!    ◀──────────────────────────────────
//!             pages, by the kernel
//! ```
//!
//! A thread that touches a page which is not there waits for the handler: a vCPU's, a device's, or
//! `control`. A thread that waits so cannot be asked to go on without the page, and must not: what
//! it would find is no RAM of its guest's, and it might write that to a disk. So a VM whose handler
//! is gone, or leaves pages out when the VM is to stop, ends with its process: in good order if
//! `control` waits for no page, and soon either way.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use crate::host::thread::Kind;
use crate::inbox::{Ending, Event, Inbox};
use crate::memory::handover::{self, Mapping};
use crate::memory::userfault::Userfault;

/// How long a handler may take to read what it is handed.
const HANDOVER: Duration = Duration::from_secs(5);
/// How long `control` has to end a VM without its handler in good order.
const GRACE: Duration = Duration::from_secs(2);
/// How long a VM may take to stop where that may need pages.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why no process gives RAM.
#[derive(Debug, Error)]
pub(crate) enum RemoteRamError {
    /// The VM has RAM of another kind.
    #[error("RAM that is shared or of huge pages cannot come from a memory_socket")]
    NotPrivate,
    /// The process at memory_socket cannot be connected to.
    #[error("memory_socket {}", .path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        source: io::Error,
    },
    /// A userfaultfd cannot be made.
    #[error("make a userfaultfd, for which podvmm must be root or able to open /dev/userfaultfd")]
    Userfault(#[source] io::Error),
    /// RAM is not as it should be.
    #[error("have RAM wait for its pages")]
    Register(#[source] io::Error),
    /// The other side does not listen.
    #[error("hand RAM over to the process at {}", .path.display())]
    HandOver {
        /// Path of the socket.
        path: PathBuf,
        source: io::Error,
    },
    /// There is no thread to watch the process that gives RAM.
    #[error("watch the process at {}", .path.display())]
    Watch {
        /// Path of the socket.
        path: PathBuf,
        source: io::Error,
    },
}

/// The connection to a handler. Dropping it tells the handler that it is done.
#[derive(Debug)]
pub(crate) struct RemoteRam {
    path: PathBuf,
    /// The userfaultfd. While it is open, no thread that waits for a page goes on without it. The
    /// handler has the other descriptor.
    _userfault: Userfault,
    /// Closing it ends the watch.
    _watched: PipeWriter,
}

impl RemoteRam {
    /// Hands the RAM that `register` names over to the process at `path`. If that is gone one day,
    /// the VM of `inbox` ends.
    pub(crate) fn hand_over(
        path: &Path,
        inbox: Inbox,
        register: impl FnOnce(&Userfault) -> io::Result<Vec<Mapping>>,
    ) -> Result<Self, RemoteRamError> {
        let stream = connect(path).map_err(|source| RemoteRamError::Connect {
            path: path.into(),
            source,
        })?;
        let userfault = Userfault::new().map_err(RemoteRamError::Userfault)?;
        let mappings = register(&userfault).map_err(RemoteRamError::Register)?;
        handover::send(&stream, &userfault, &mappings).map_err(|source| {
            RemoteRamError::HandOver {
                path: path.into(),
                source,
            }
        })?;
        let watched = watch(stream, path, inbox).map_err(|source| RemoteRamError::Watch {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            path: path.into(),
            _userfault: userfault,
            _watched: watched,
        })
    }

    /// A guard to be held while something is done that ends by itself, unless pages do not come.
    pub(crate) fn patience(&self) -> Patience {
        let (held, released) = channel();
        let ending = silent(&self.path);
        let waits = move || {
            if released.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                end(&ending);
            }
        };
        let named = Builder::new().name("patience".into());
        if let Err(error) = Kind::Pages.spawn(named, waits) {
            log::warn!("wait for pages without end: {error}");
        }
        Patience { _held: held }
    }
}

/// Ends the process if it is held for too long.
#[derive(Debug)]
pub(crate) struct Patience {
    _held: Sender<()>,
}

/// Does not wait, not even for a handler that has too many connections to accept.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(HANDOVER))?;
    Ok(stream)
}

/// Starts the thread that sees the handler go. It ends when what is returned is dropped.
fn watch(stream: UnixStream, path: &Path, inbox: Inbox) -> io::Result<PipeWriter> {
    let (released, held) = io::pipe()?;
    let ending = gone(path);
    Kind::Pages.spawn(Builder::new().name("memory".into()), move || {
        if !is_hung_up(&stream, &released) {
            return;
        }
        // `control` no longer listens when the machine is being taken down.
        let _ = inbox.send(Event::Ended(ending.clone()));
        if !is_closed_within(&released, GRACE) {
            end(&ending);
        }
    })?;
    Ok(held)
}

/// Waits until one of the two has closed its end. Whether that is the handler.
fn is_hung_up(stream: &UnixStream, released: &PipeReader) -> bool {
    let mut both = [
        PollFd::new(stream, PollFlags::RDHUP),
        PollFd::new(released, PollFlags::IN),
    ];
    while poll(&mut both, None) == Err(Errno::INTR) {}
    both[1].revents().is_empty()
}

fn is_closed_within(released: &PipeReader, time: Duration) -> bool {
    let time = Timespec::try_from(time).expect("it is some seconds");
    let mut one = [PollFd::new(released, PollFlags::IN)];
    poll(&mut one, Some(&time)).is_ok_and(|ready| ready > 0)
}

fn gone(path: &Path) -> Ending {
    let path = path.display();
    Ending::Memory(format!(
        "the process at {path} that gives it memory is gone"
    ))
}

fn silent(path: &Path) -> Ending {
    let (path, seconds) = (path.display(), PATIENCE.as_secs());
    Ending::Memory(format!(
        "the process at {path} that gives it memory has given none for {seconds} seconds"
    ))
}

/// Ends the process, and with it all threads that wait for a page.
fn end(ending: &Ending) -> ! {
    log::error!("{ending}");
    process::exit(ending.exit_code(false).into());
}
