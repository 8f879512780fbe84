//! Bytes from the guest for the host.

use std::fmt::{self, Debug};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use rustix::fs::SeekFrom;

use super::{can_be_watched, is_ready};
use crate::virtio::{GuestRam, Segments, vectored};

/// A pipe that is writable takes this much without blocking (PIPE_BUF, pipe(7)).
const PIPE_BUF: usize = 4096;
/// Written at once where nothing limits it.
const CHUNK: usize = 64 << 10;

/// Where a guest's bytes go, without waiting for it.
#[derive(Debug)]
pub struct Output {
    kind: Kind,
    room: Option<Room>,
}

/// What may still be written to a file, so that a guest does not fill the host's disk.
#[derive(Debug)]
struct Room {
    most: u64,
    left: u64,
}

/// The last line of a file that is full.
const FULL: &[u8] =
    b"\npodvmm: the guest has printed all that may be kept, and the rest is dropped\n";

enum Kind {
    File { file: File, way: Way },
    Sink(Box<dyn Write + Send>),
}

/// How a descriptor is written without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The descriptor never blocks, but for a disk.
    Always,
    /// A socket, written by a call that does not block, whatever the descriptor's flags.
    Socket,
    /// A terminal, written by an open file description of its own, which does not block.
    Reopened,
    /// Written when the descriptor is ready, and at most PIPE_BUF at once.
    WhenReady,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Moved(usize),
    /// Nothing fits now; [`Output::watch`] tells when to try again.
    Full,
    /// The bytes will not be written: no process reads any more, or the disk is full.
    Lost,
}

impl Output {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        if metadata.file_type().is_socket() {
            let way = Way::Socket;
            return Ok(Kind::File { file, way }.into());
        }
        if !can_be_watched(&file)? {
            let way = Way::Always;
            return Ok(Kind::File { file, way }.into());
        }
        if file.is_terminal()
            && can_be_reopened(metadata.rdev())
            && let Ok(file) = reopen(&file)
        {
            let way = Way::Reopened;
            return Ok(Kind::File { file, way }.into());
        }
        let way = Way::WhenReady;
        Ok(Kind::File { file, way }.into())
    }

    /// Hands everything to `sink`, which is called on the I/O loop and must not block.
    pub fn sink(sink: Box<dyn Write + Send>) -> Self {
        Kind::Sink(sink).into()
    }

    /// A regular file, to which `most` bytes are appended. What comes after them is lost until another
    /// program makes the file shorter than that.
    pub fn bounded_file(file: File, most: u64) -> Self {
        let way = Way::Always;
        Self {
            kind: Kind::File { file, way },
            room: Some(Room { most, left: most }),
        }
    }

    /// What to watch for writability while it is full.
    pub fn watch(&self) -> Option<RawFd> {
        match &self.kind {
            Kind::File {
                way: Way::Always, ..
            }
            | Kind::Sink(_) => None,
            Kind::File { file, .. } => Some(file.as_raw_fd()),
        }
    }

    /// Waits until it may take more. False if it does not within `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        match &self.kind {
            Kind::File { file, .. } => is_ready(file, libc::POLLOUT, timeout),
            Kind::Sink(_) => true,
        }
    }

    /// Writes once from the front of `bytes`, which must not be empty, and consumes what went.
    pub fn write_from(&mut self, ram: &GuestRam, bytes: &mut Segments) -> Progress {
        let most = self.room();
        match &mut self.kind {
            Kind::File {
                file,
                way: Way::Socket,
            } => progress(vectored::send(&*file, ram, bytes, CHUNK)),
            Kind::File { file, way } => {
                let written = way.write(file, most, |file, max| {
                    vectored::write(file, ram, bytes, max)
                });
                self.take(written)
            }
            Kind::Sink(sink) => {
                let mut buffer = [0; PIPE_BUF];
                let part = &mut buffer[..bytes.len().min(PIPE_BUF)];
                if bytes.read(ram, part).is_err() || sink.write_all(part).is_err() {
                    return Progress::Lost;
                }
                Progress::Moved(part.len())
            }
        }
    }

    /// Writes once from the front of `bytes`, which must not be empty.
    pub fn write(&mut self, bytes: &[u8]) -> Progress {
        let most = self.room();
        match &mut self.kind {
            Kind::File {
                file,
                way: Way::Socket,
            } => progress(vectored::send_bytes(&*file, bytes)),
            Kind::File { file, way } => {
                let written = way.write(file, most, |mut file, max| {
                    file.write(&bytes[..bytes.len().min(max)])
                });
                self.take(written)
            }
            Kind::Sink(sink) => progress(sink.write_all(bytes).map(|()| bytes.len())),
        }
    }

    /// How many bytes may be written at once.
    fn room(&mut self) -> usize {
        let (Some(room), Kind::File { file, .. }) = (&mut self.room, &self.kind) else {
            return CHUNK;
        };
        if room.left == 0 {
            // Another program may have emptied it.
            let size = rustix::fs::seek(file, SeekFrom::End(0)).unwrap_or(u64::MAX);
            room.left = room.most.saturating_sub(size);
        }
        usize::try_from(room.left).unwrap_or(CHUNK).min(CHUNK)
    }

    /// Notes what was written.
    fn take(&mut self, written: Progress) -> Progress {
        if let (Progress::Moved(count), Some(room)) = (written, &mut self.room) {
            room.left = room.left.saturating_sub(count as u64);
            if let (0, Kind::File { file, .. }) = (room.left, &mut self.kind) {
                // On a full disk it is not said.
                let _ = file.write_all(FULL);
            }
        }
        written
    }
}

impl From<Kind> for Output {
    fn from(kind: Kind) -> Self {
        Self { kind, room: None }
    }
}

impl Way {
    /// Writes no more than `most` bytes.
    fn write(
        self,
        file: &File,
        most: usize,
        write: impl FnOnce(&File, usize) -> io::Result<usize>,
    ) -> Progress {
        match self {
            _ if most == 0 => Progress::Lost,
            Self::Always | Self::Socket | Self::Reopened => progress(write(file, most)),
            Self::WhenReady if is_ready(file, libc::POLLOUT, Duration::ZERO) => {
                progress(write(file, PIPE_BUF))
            }
            Self::WhenReady => Progress::Full,
        }
    }
}

fn progress(result: io::Result<usize>) -> Progress {
    match result {
        Ok(0) => Progress::Lost,
        Ok(count) => Progress::Moved(count),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Progress::Full,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Progress::Full,
        Err(_) => Progress::Lost,
    }
}

/// Whether opening this terminal again gives the same one: true of the consoles and serial lines
/// (major 4) and of a pseudoterminal's slave (136 to 143), and not of its master, of which each
/// open makes a new one (Linux allocated devices list).
fn can_be_reopened(device: libc::dev_t) -> bool {
    matches!(libc::major(device), 4 | 136..=143)
}

/// A second open file description of the same terminal, whose flags no other process shares.
fn reopen(file: &File) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, way } => f
                .debug_struct("File")
                .field("file", file)
                .field("way", way)
                .finish(),
            Self::Sink(_) => f.write_str("Sink"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::FromRawFd;
    use std::os::unix::net::UnixStream;
    use std::ptr;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    /// Writes until nothing fits, and says how much did. At most 64 MiB.
    fn fill(output: &mut Output) -> usize {
        let mut total = 0;
        let steps = (0..16384).map(|_| output.write(&[7; 4096]));
        let moved = steps.map_while(|step| match step {
            Progress::Moved(count) => Some(count),
            Progress::Full | Progress::Lost => None,
        });
        total += moved.sum::<usize>();
        total
    }

    fn flags(fd: RawFd) -> libc::c_int {
        // SAFETY: F_GETFL takes no pointers.
        unsafe { libc::fcntl(fd, libc::F_GETFL) }
    }

    #[test]
    fn a_full_pipe_neither_blocks_nor_becomes_nonblocking() {
        let (mut read_end, write_end) = io::pipe().unwrap();
        let mut output = Output::new(write_end.into()).unwrap();
        let written = fill(&mut output);
        assert!(written >= PIPE_BUF);
        assert_eq!(output.write(b"x"), Progress::Full);
        assert!(!output.wait(Duration::ZERO));
        assert_eq!(flags(output.watch().unwrap()) & libc::O_NONBLOCK, 0);
        read_end.read_exact(&mut vec![0; 2 * PIPE_BUF]).unwrap();
        assert!(output.wait(Duration::from_secs(1)));
        assert_eq!(output.write(b"x"), Progress::Moved(1));
    }

    #[test]
    fn a_full_socket_does_not_block() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut output = Output::new(OwnedFd::from(ours)).unwrap();
        assert!(fill(&mut output) > 0);
        assert_eq!(output.write(b"x"), Progress::Full);
        assert_eq!(flags(output.watch().unwrap()) & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn output_without_a_reader_is_lost() {
        let (read_end, write_end) = io::pipe().unwrap();
        let mut output = Output::new(write_end.into()).unwrap();
        drop(read_end);
        assert_eq!(output.write(b"x"), Progress::Lost);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(
            Output::new(ours.into()).unwrap().write(b"x"),
            Progress::Lost
        );
    }

    #[test]
    fn a_regular_file_takes_all_without_watching() {
        let file = TempFile::new().unwrap();
        let mut output = Output::new(file.as_file().try_clone().unwrap().into()).unwrap();
        assert_eq!(output.watch(), None);
        assert_eq!(output.write(b"abc"), Progress::Moved(3));
        assert_eq!(std::fs::read(file.as_path()).unwrap(), b"abc");
    }

    #[test]
    fn a_bounded_file_takes_no_more_until_it_is_emptied() {
        let file = TempFile::new().unwrap();
        let path = file.as_path();
        let open = std::fs::OpenOptions::new().append(true).open(path);
        let mut output = Output::bounded_file(open.unwrap(), 10);
        for _ in 0..2 {
            assert_eq!(output.write(b"123456"), Progress::Moved(6));
            assert_eq!(output.write(b"789abc"), Progress::Moved(4));
            assert_eq!(output.write(b"bc"), Progress::Lost);
            assert_eq!(output.write(b"bc"), Progress::Lost);
            let content = std::fs::read(path).unwrap();
            assert_eq!(content, [b"123456789a", FULL].concat());
            std::fs::write(path, b"").unwrap();
        }
    }

    #[test]
    fn a_terminal_is_written_by_a_description_of_its_own() {
        let (mut master, mut slave) = (-1, -1);
        let (name, settings, size) = (ptr::null_mut(), ptr::null(), ptr::null());
        // SAFETY: both integers live during the call; name, settings and size may be null.
        let status =
            unsafe { libc::openpty(&raw mut master, &raw mut slave, name, settings, size) };
        assert_eq!(status, 0);
        // SAFETY: openpty gave us both descriptors, and nothing else owns them.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        // SAFETY: as above.
        let master = unsafe { OwnedFd::from_raw_fd(master) };
        let shared = slave.try_clone().unwrap();
        let mut output = Output::new(slave).unwrap();
        assert_eq!(output.write(b"hi"), Progress::Moved(2));
        let mut bytes = [0; 2];
        File::from(master.try_clone().unwrap())
            .read_exact(&mut bytes)
            .unwrap();
        assert_eq!(&bytes, b"hi");
        assert!(fill(&mut output) > 0);
        assert_eq!(output.write(b"x"), Progress::Full);
        assert_eq!(flags(shared.as_raw_fd()) & libc::O_NONBLOCK, 0);
        assert_ne!(flags(output.watch().unwrap()) & libc::O_NONBLOCK, 0);
        drop(master);
    }
}
