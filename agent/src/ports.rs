//! The virtio-console ports to the host, found by their names.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use protocol::contract::{Status, port};

use crate::poll;
use crate::sys;

/// The driver makes ports from a work queue, and so perhaps after the agent has started.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "wait for the ports {}, {}, {} and {}: {missing} did not appear",
        port::STDIN,
        port::STDOUT,
        port::STDERR,
        port::STATUS
    )]
    Missing { missing: &'static str },
    #[error(
        "wait for the port {} to be open: the host did not open it",
        port::STATUS
    )]
    Closed,
    #[error("open the port {name}")]
    Open {
        name: &'static str,
        source: io::Error,
    },
}

/// The way to the host, each port open and not blocking.
#[derive(Debug)]
pub(crate) struct Ports {
    pub(crate) stdin: File,
    pub(crate) stdout: File,
    pub(crate) stderr: File,
    pub(crate) status: StatusPort,
}

/// Where the host reads how the agent fares.
#[derive(Debug)]
pub(crate) struct StatusPort(File);

impl Ports {
    /// Waits for the ports and opens them.
    pub(crate) fn open() -> Result<Self, Error> {
        let mut missing = port::STATUS;
        let found = poll::until(DEADLINE, || {
            Found::look().map_err(|name| missing = name).ok()
        });
        let found = found.ok_or(Error::Missing { missing })?;
        let ports = Self {
            stdin: open(port::STDIN, &found.stdin)?,
            stdout: open(port::STDOUT, &found.stdout)?,
            stderr: open(port::STDERR, &found.stderr)?,
            status: StatusPort(open(port::STATUS, &found.status)?),
        };
        // A port is named before its host side is open, and until then looks closed. This one is
        // the last: the driver has heard of the others by then.
        let is_open = || ports.status.is_writable(Some(Duration::ZERO)).then_some(());
        poll::until(DEADLINE, is_open).ok_or(Error::Closed)?;
        Ok(ports)
    }
}

/// The ports' names below /dev.
struct Found {
    stdin: String,
    stdout: String,
    stderr: String,
    status: String,
}

impl Found {
    /// All ports, or the name of one that is missing.
    fn look() -> Result<Self, &'static str> {
        let class = Path::new("/sys/class/virtio-ports");
        let mut devices = [const { None }; 4];
        let names = [port::STDIN, port::STDOUT, port::STDERR, port::STATUS];
        for entry in class.read_dir().into_iter().flatten().flatten() {
            let device = entry.file_name().to_string_lossy().into_owned();
            // A port has this file once the host has told its name.
            let Ok(name) = sys::read_file(class.join(&device).join("name")) else {
                continue;
            };
            let index = names
                .iter()
                .position(|known| name.trim_ascii_end() == known.as_bytes());
            if let Some(index) = index {
                devices[index] = Some(device);
            }
        }
        let [stdin, stdout, stderr, status] = devices;
        Ok(Self {
            stdin: stdin.ok_or(port::STDIN)?,
            stdout: stdout.ok_or(port::STDOUT)?,
            stderr: stderr.ok_or(port::STDERR)?,
            status: status.ok_or(port::STATUS)?,
        })
    }
}

fn open(name: &'static str, device: &str) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(Path::new("/dev").join(device))
        .map_err(|source| Error::Open { name, source })
}

impl StatusPort {
    /// Tells the host. A host that does not listen does not stop the guest.
    pub(crate) fn tell(&mut self, status: &Status) {
        let line = status.to_string();
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.0.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.is_writable(None) {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(_) => return,
            }
        }
    }

    /// Readable when the host presses the power button.
    pub(crate) fn button(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Whether it takes bytes, or does so before the time is over or the host closes it.
    fn is_writable(&self, timeout: Option<Duration>) -> bool {
        let fd = self.0.as_raw_fd();
        let mut fds = [libc::pollfd {
            fd,
            events: sys::POLLOUT,
            revents: 0,
        }];
        sys::poll(&mut fds, timeout).is_ok() && fds[0].revents & sys::POLLOUT != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::{AsFd, OwnedFd};

    #[test]
    fn a_status_is_told_as_one_line() {
        let (mut host, guest) = io::pipe().unwrap();
        let mut port = StatusPort(File::from(OwnedFd::from(guest)));
        port.tell(&Status::Ready);
        port.tell(&Status::Exit(3));
        drop(port);
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ready\nexit 3\n");
    }

    #[test]
    fn a_status_that_goes_out_in_parts_arrives_whole() {
        let (mut host, guest) = io::pipe().unwrap();
        sys::set_nonblocking(guest.as_fd()).unwrap();
        let status = Status::Error("x".repeat(1_000_000));
        let line = status.to_string();
        let guest = std::thread::spawn(move || {
            StatusPort(File::from(OwnedFd::from(guest))).tell(&status);
        });
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        guest.join().unwrap();
        assert!(text == line);
    }

    #[test]
    fn a_host_that_does_not_listen_is_not_waited_for() {
        let (host, guest) = io::pipe().unwrap();
        drop(host);
        StatusPort(File::from(OwnedFd::from(guest))).tell(&Status::Ready);
    }
}
