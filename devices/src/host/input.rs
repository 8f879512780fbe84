//! Bytes from the host for the guest.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::{can_be_watched, is_ready};
use crate::virtio::{GuestRam, Segments, vectored};

/// A descriptor that is read when it has something, and never waited for.
#[derive(Debug)]
pub struct Input {
    file: File,
    /// Whether the input can run dry. A file that cannot only ends.
    watched: bool,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    Bytes(usize),
    /// There is nothing for now; [`Input::watch`] tells when to try again.
    Nothing,
    /// The input has ended: there will never be more.
    End,
}

impl Input {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let watched = can_be_watched(&file)?;
        Ok(Self { file, watched })
    }

    /// What to watch for readability while there is nothing.
    pub fn watch(&self) -> Option<RawFd> {
        self.watched.then(|| self.file.as_raw_fd())
    }

    /// Reads at most `max` bytes into the front of `room`, which must not be empty.
    pub fn read_into(&mut self, ram: &GuestRam, room: &mut Segments, max: usize) -> Arrival {
        self.read_if_ready(|file| vectored::read(file, ram, room, max))
    }

    /// Reads into `buffer`, which must not be empty.
    pub fn read(&mut self, buffer: &mut [u8]) -> Arrival {
        self.read_if_ready(|mut file| file.read(buffer))
    }

    fn read_if_ready(&self, read: impl FnOnce(&File) -> io::Result<usize>) -> Arrival {
        if self.watched && !is_ready(&self.file, libc::POLLIN, Duration::ZERO) {
            return Arrival::Nothing;
        }
        match read(&self.file) {
            Ok(0) => Arrival::End,
            Ok(count) => Arrival::Bytes(count),
            Err(error) => match error.kind() {
                // Another reader of the same terminal or pipe was faster.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted if self.watched => {
                    Arrival::Nothing
                }
                // A terminal that hung up fails like this.
                _ => Arrival::End,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn a_pipe_has_bytes_then_nothing_then_ends() {
        let (read_end, mut write_end) = io::pipe().unwrap();
        let mut input = Input::new(read_end.into()).unwrap();
        assert!(input.watch().is_some());
        let mut buffer = [0; 8];
        assert_eq!(input.read(&mut buffer), Arrival::Nothing);
        write_end.write_all(b"abc").unwrap();
        assert_eq!(input.read(&mut buffer), Arrival::Bytes(3));
        assert_eq!(input.read(&mut buffer), Arrival::Nothing);
        drop(write_end);
        assert_eq!(input.read(&mut buffer), Arrival::End);
    }

    #[test]
    fn a_regular_file_is_read_without_watching() {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(b"abc").unwrap();
        file.rewind().unwrap();
        let mut input = Input::new(file.into()).unwrap();
        assert_eq!(input.watch(), None);
        let mut buffer = [0; 8];
        assert_eq!(input.read(&mut buffer), Arrival::Bytes(3));
        assert_eq!(input.read(&mut buffer), Arrival::End);
    }

    #[test]
    fn nothing_comes_from_dev_null() {
        let mut input = Input::new(File::open("/dev/null").unwrap().into()).unwrap();
        assert_eq!(input.read(&mut [0; 8]), Arrival::End);
    }
}
