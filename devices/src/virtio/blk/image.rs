//! The file behind a disk: opened, locked and measured once, then read and written at offsets.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::SECTOR;
use crate::virtio::{AccessError, GuestRam, ResizeError, Segments, vectored};

/// Sector size reads as this unless direct access needs more.
const DEFAULT_BLOCK: u32 = 512;
/// The largest alignment direct access may ask for: Linux guests take blocks up to a page.
const MAX_BLOCK: u32 = 4096;
/// Bytes moved at once where guest memory is not aligned for direct access, or zeroes written.
const BOUNCE: usize = 64 << 10;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    #[error("open disk image {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} cannot be opened for direct access (O_DIRECT)", path.display())]
    NoDirect { path: PathBuf, source: io::Error },
    #[error("{} is neither a regular file nor a block device", path.display())]
    NotADisk { path: PathBuf },
    #[error("measure disk image {}", path.display())]
    Measure { path: PathBuf, source: io::Error },
    #[error("{} is {bytes} bytes long, which is not a multiple of {block}", path.display())]
    OddSize {
        path: PathBuf,
        bytes: u64,
        block: u32,
    },
    #[error("{} is in use by another process", path.display())]
    Busy { path: PathBuf },
    #[error("lock disk image {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("a disk has 1 to 16 queues, not {0}")]
    QueueCount(u16),
    #[error("a disk's queue size is a power of two from 4 to 1024, not {0}")]
    QueueSize(u16),
    #[error("disk serial {0:?} is longer than 20 bytes")]
    LongSerial(String),
}

/// A raw disk image or block device.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    sectors: AtomicU64,
    is_device: bool,
    /// The unit the guest should use: offsets and lengths of direct access are multiples of it.
    block: u32,
    /// Alignment of memory for direct access. None if the page cache is used.
    direct: Option<usize>,
}

impl Image {
    /// Opens `path` and locks it until the image is dropped: for others' reading too if it is to
    /// be written, else only against others' writing.
    pub(super) fn open(path: &Path, readonly: bool, direct: bool) -> Result<Self, BlkError> {
        let path_buf = || path.to_path_buf();
        let mut options = OpenOptions::new();
        options.read(true).write(!readonly);
        // A FIFO must not make us wait; it is refused below.
        options.custom_flags(libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 });
        let file = options
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) if direct => BlkError::NoDirect {
                    path: path_buf(),
                    source,
                },
                _ => BlkError::Open {
                    path: path_buf(),
                    source,
                },
            })?;
        let measure = |source| BlkError::Measure {
            path: path_buf(),
            source,
        };
        let metadata = file.metadata().map_err(measure)?;
        let (bytes, device_block) = if metadata.file_type().is_block_device() {
            (
                ioctl::<u64>(&file, BLKGETSIZE64),
                ioctl::<i32>(&file, BLKSSZGET),
            )
        } else if metadata.is_file() {
            (Ok(metadata.len()), Ok(0))
        } else {
            return Err(BlkError::NotADisk { path: path_buf() });
        };
        let bytes = bytes.map_err(measure)?;
        let device_block = u32::try_from(device_block.map_err(measure)?).unwrap_or(0);
        lock(&file, readonly).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => BlkError::Busy { path: path_buf() },
            _ => BlkError::Lock {
                path: path_buf(),
                source,
            },
        })?;
        let alignment = if direct {
            Some(direct_alignment(&file, device_block))
        } else {
            None
        };
        let block = alignment.map_or(DEFAULT_BLOCK, |(_, offset)| offset);
        if !bytes.is_multiple_of(block.into()) {
            return Err(BlkError::OddSize {
                path: path_buf(),
                bytes,
                block,
            });
        }
        let direct = alignment.map(|(memory, _)| memory);
        Ok(Self {
            file,
            sectors: AtomicU64::new(bytes / SECTOR),
            is_device: metadata.file_type().is_block_device(),
            block,
            direct,
        })
    }

    /// Capacity in sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Makes a file `bytes` long. A block device is as long as the host has made it, which `bytes` is to be.
    /// For while no request is under way.
    pub(super) fn resize(&self, bytes: u64) -> Result<(), ResizeError> {
        let block = self.block;
        if !bytes.is_multiple_of(block.into()) {
            return Err(ResizeError::Odd { bytes, block });
        }
        if self.is_device {
            let has = ioctl::<u64>(&self.file, BLKGETSIZE64).map_err(ResizeError::File)?;
            if has != bytes {
                return Err(ResizeError::BlockDevice(has));
            }
        } else {
            self.file.set_len(bytes).map_err(ResizeError::File)?;
        }
        self.sectors.store(bytes / SECTOR, Ordering::Release);
        Ok(())
    }

    /// Bytes of a logical block: 512 to 4096.
    pub(super) fn block(&self) -> u32 {
        self.block
    }

    /// Fills `into` from `offset`.
    pub(super) fn read(&self, ram: &GuestRam, into: &mut Segments, offset: u64) -> io::Result<()> {
        let len = into.len();
        if self.takes(ram, into)? {
            return vectored::read_exact_at(&self.file, ram, into, len, offset);
        }
        let mut bounce = Bounce::new();
        let mut offset = offset;
        while !into.is_empty() {
            let part = &mut bounce.0[..into.len().min(BOUNCE)];
            self.file.read_exact_at(part, offset)?;
            into.write(ram, part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Writes all of `from` to `offset`.
    pub(super) fn write(&self, ram: &GuestRam, from: &mut Segments, offset: u64) -> io::Result<()> {
        let len = from.len();
        if self.takes(ram, from)? {
            return vectored::write_all_at(&self.file, ram, from, len, offset);
        }
        let mut bounce = Bounce::new();
        let mut offset = offset;
        while !from.is_empty() {
            let part = &mut bounce.0[..from.len().min(BOUNCE)];
            from.read(ram, part)?;
            self.file.write_all_at(part, offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything written so far survive a crash of the host.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the range's storage back where the host can. Advice: what it reads as is unsaid.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len) {
            Err(error) if cannot(&error) => Ok(()),
            done => done,
        }
    }

    /// Makes the range read as zeroes. With `unmap` its storage may go.
    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        match self.fallocate(mode, offset, len) {
            Err(error) if cannot(&error) => self.write_zeroes(offset, len),
            done => done,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = Bounce::new();
        let mut done = 0;
        while done < len {
            let step = (len - done).min(BOUNCE as u64);
            let step_len = usize::try_from(step).expect("at most BOUNCE");
            self.file
                .write_all_at(&zeroes.0[..step_len], offset + done)?;
            done += step;
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes no pointers, and the descriptor is ours.
        check(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) })
    }

    /// Whether the file takes this memory as it lies.
    fn takes(&self, ram: &GuestRam, segments: &Segments) -> Result<bool, AccessError> {
        let Some(alignment) = self.direct else {
            return Ok(true);
        };
        let block = usize::try_from(self.block).expect("at most 4096");
        for slice in segments.slices(ram, usize::MAX) {
            let slice = slice?;
            let start = slice.ptr_guard().as_ptr().addr();
            if !start.is_multiple_of(alignment) || !slice.len().is_multiple_of(block) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Memory aligned for any direct access, holding zeroes at first.
#[repr(align(4096))]
struct Bounce([u8; BOUNCE]);

impl Bounce {
    fn new() -> Box<Self> {
        Box::new(Self([0; BOUNCE]))
    }
}

// The ioctl numbers of <linux/fs.h>, the same on every architecture this builds for.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKSSZGET: libc::c_ulong = 0x1268;

/// A block device's answer to an ioctl that fills one number.
fn ioctl<T: Default>(file: &File, request: libc::c_ulong) -> io::Result<T> {
    let mut answer = T::default();
    // SAFETY: both requests made here fill a number of exactly the size of `T`: 64 bits for
    // BLKGETSIZE64, an int for BLKSSZGET.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw mut answer) })?;
    Ok(answer)
}

/// An open-file-description lock on the whole file, which ends with the description and which a
/// second open in this process respects as well.
fn lock(file: &File, shared: bool) -> io::Result<()> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let whole = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("a small constant"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("a small constant"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: `whole` lives during the call, which only reads it.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) })
}

/// What direct access to `file` needs of memory and of offsets, in bytes. A host that does not
/// say gets what all but the rarest devices are content with.
fn direct_alignment(file: &File, device_block: u32) -> (usize, u32) {
    // SAFETY: statx is plain numbers, for which zero is a value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: the path is a C string, empty as AT_EMPTY_PATH wants, and `answer` is filled at most.
    let status = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            mask,
            &raw mut answer,
        )
    };
    let told = check(status).is_ok()
        && answer.stx_mask & mask != 0
        && answer.stx_dio_mem_align.is_power_of_two()
        && answer.stx_dio_offset_align.is_power_of_two();
    let fallback = device_block.max(DEFAULT_BLOCK);
    let (memory, offset) = if told {
        (answer.stx_dio_mem_align, answer.stx_dio_offset_align)
    } else {
        (fallback, fallback)
    };
    let offset = offset.clamp(DEFAULT_BLOCK, MAX_BLOCK);
    (usize::try_from(memory).unwrap_or(BOUNCE), offset)
}

/// Whether the host refused because it has no such operation.
fn cannot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

fn check(status: libc::c_int) -> io::Result<()> {
    if status < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
