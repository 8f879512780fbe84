//! A console on a unix socket. A client that connects is shown what the guest prints from then on,
//! and types to it. There is one client at a time; others are turned away.
//!
//! A thread of its own waits for the guest's end, the socket and the client. Without a client, what
//! the guest prints goes nowhere. A client that takes nothing for half a second is dropped: it would
//! hold up the guest.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use devices::host::{ListenError, Listener};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;

use crate::host::thread::Kind;

/// Why a console has no socket.
#[derive(Debug, Error)]
pub(crate) enum SocketConsoleError {
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// What joins it to the guest.
    #[error("start the thread of a console's socket")]
    Start(#[source] io::Error),
}

/// Serves a console's socket until it is dropped, which removes the socket.
#[derive(Debug)]
pub(crate) struct SocketConsole {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl SocketConsole {
    /// Listens at `path`. The stream is what the guest's device reads and writes.
    pub(crate) fn start(path: &Path) -> Result<(UnixStream, Self), SocketConsoleError> {
        let listener = Listener::bind(path)?;
        let (guest, end) = UnixStream::pair().map_err(SocketConsoleError::Start)?;
        let (stopped, stop) = io::pipe().map_err(SocketConsoleError::Start)?;
        end.set_nonblocking(true)
            .map_err(SocketConsoleError::Start)?;
        let relay = Relay {
            listener,
            guest: end,
            client: None,
            typed: Vec::new(),
        };
        let builder = Builder::new().name("console".into()).stack_size(64 << 10);
        let thread = Kind::Console
            .spawn(builder, move || {
                if let Err(error) = relay.run(&stopped) {
                    log::error!("a console's socket: {error}");
                }
            })
            .map_err(SocketConsoleError::Start)?;
        let console = Self {
            stop: Some(stop),
            thread: Some(thread),
        };
        Ok((guest, console))
    }
}

impl Drop for SocketConsole {
    fn drop(&mut self) {
        // The other end of the pipe becomes readable.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a console's socket panicked");
        }
    }
}

/// How long a client may take nothing.
const PATIENCE: Duration = Duration::from_millis(500);
const CHUNK: usize = 4 << 10;

struct Relay {
    listener: Listener,
    guest: UnixStream,
    client: Option<UnixStream>,
    /// Bytes the guest has not yet taken. While there are any the client is not heard.
    typed: Vec<u8>,
}

impl Relay {
    fn run(mut self, stopped: &PipeReader) -> io::Result<()> {
        loop {
            let hears = self.client.is_some() && self.typed.is_empty();
            let client = self
                .client
                .as_ref()
                .map_or_else(|| stopped.as_fd(), AsFd::as_fd);
            let guest = match self.typed.is_empty() {
                true => PollFlags::IN,
                false => PollFlags::IN | PollFlags::OUT,
            };
            let mut fds = [
                watch(stopped.as_fd(), PollFlags::IN),
                watch(self.guest.as_fd(), guest),
                watch(self.listener.as_fd(), PollFlags::IN),
                watch(
                    client,
                    if hears {
                        PollFlags::IN
                    } else {
                        PollFlags::empty()
                    },
                ),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                other => drop(other?),
            }
            let [stop, guest, callers, client] = fds.map(|fd| fd.revents());
            if !stop.is_empty() {
                // The last words of a guest that has ended.
                while matches!(self.show()?, Some(1..)) {}
                return Ok(());
            }
            if guest.contains(PollFlags::OUT) {
                self.type_on();
            }
            if guest.intersects(PollFlags::IN | PollFlags::HUP) && self.show()? == Some(0) {
                return Ok(());
            }
            if !client.is_empty() {
                self.hear();
            }
            if !callers.is_empty() {
                self.accept();
            }
        }
    }

    /// Passes on what the guest has printed, and returns how many bytes that were: `None` if it has
    /// printed nothing since, 0 once the device has closed its end.
    fn show(&mut self) -> io::Result<Option<usize>> {
        let mut printed = [0; CHUNK];
        let count = match self.guest.read(&mut printed) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            read => read?,
        };
        if let Some(client) = &mut self.client
            && client.write_all(&printed[..count]).is_err()
        {
            self.dismiss();
        }
        Ok(Some(count))
    }

    /// Takes what the client types.
    fn hear(&mut self) {
        let mut bytes = [0; CHUNK];
        match self.client.as_mut().map(|client| client.read(&mut bytes)) {
            None => {}
            Some(Ok(count @ 1..)) => {
                self.typed.extend_from_slice(&bytes[..count]);
                self.type_on();
            }
            Some(_) => self.dismiss(),
        }
    }

    /// Gives the guest what it has room for.
    fn type_on(&mut self) {
        match self.guest.write(&self.typed) {
            Ok(count) => drop(self.typed.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // There is no guest any more, as the next read will tell.
            Err(_) => self.typed.clear(),
        }
    }

    fn accept(&mut self) {
        let Ok(client) = self.listener.accept() else {
            return;
        };
        if self.client.is_some() {
            let _ = (&client).write_all(b"podvmm: another client is on this console\r\n");
        } else if client.set_write_timeout(Some(PATIENCE)).is_ok() {
            self.client = Some(client);
        }
    }

    fn dismiss(&mut self) {
        self.client = None;
        self.typed.clear();
    }
}

fn watch(fd: BorrowedFd<'_>, flags: PollFlags) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, flags)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn one_client_at_a_time_sees_and_types() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("console");
        let (mut guest, console) = SocketConsole::start(&path).unwrap();
        // No client listens, and the guest is not held up.
        guest.write_all(&[b'x'; 1 << 20]).unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"ls\n").unwrap();
            let mut bytes = [0; 3];
            guest.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"ls\n");
            guest.write_all(b"a b").unwrap();
            // What was printed before may still come.
            while bytes != *b"a b" {
                client.read_exact(&mut bytes[..1]).unwrap();
                if bytes[0] == b'a' {
                    client.read_exact(&mut bytes[1..]).unwrap();
                }
            }
            let mut other = String::new();
            let mut second = UnixStream::connect(&path).unwrap();
            second.read_to_string(&mut other).unwrap();
            assert!(other.contains("another client"));
        }
        drop(console);
        assert!(!path.exists());
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_last_words_of_a_guest_are_shown() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("console");
        for _ in 0..100 {
            let (mut guest, console) = SocketConsole::start(&path).unwrap();
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"?").unwrap();
            guest.read_exact(&mut [0]).unwrap();
            guest.write_all(b"bye").unwrap();
            drop(console);
            let mut shown = String::new();
            client.read_to_string(&mut shown).unwrap();
            assert_eq!(shown, "bye");
        }
    }

    #[test]
    fn a_client_that_takes_nothing_is_dropped() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("console");
        let (mut guest, _console) = SocketConsole::start(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"?").unwrap();
        guest.read_exact(&mut [0]).unwrap();
        guest.write_all(&vec![b'x'; 8 << 20]).unwrap();
        let mut taken = Vec::new();
        client.read_to_end(&mut taken).unwrap();
        assert!(taken.len() < 8 << 20);
    }
}
