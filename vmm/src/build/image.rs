//! Puts a kernel and its initramfs into guest RAM.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use arch::boot::{ImageError, KernelImage};
use arch::layout::MMIO_HOLE_START;
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{Ram, RamError};

const PAGE_BYTES: u64 = 4096;
/// cpio archives that follow one another start at multiples of 4 bytes.
const CPIO_ALIGNMENT: u64 = 4;

/// Why a file did not make it into guest RAM.
#[derive(Debug, Error)]
pub(crate) enum LoadError {
    /// The file could not be opened.
    #[error("open {}", .path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        source: io::Error,
    },
    /// The file is no kernel that podvmm can start.
    #[error("kernel {}", .path.display())]
    Image {
        /// Path of the file.
        path: PathBuf,
        source: ImageError,
    },
    /// The file could not be mapped or copied into RAM.
    #[error("load {}", .path.display())]
    Place {
        /// Path of the file.
        path: PathBuf,
        source: RamError,
    },
    /// RAM above the kernel is too small for the initramfs.
    #[error(
        "an initramfs of {len_bytes} bytes does not fit into RAM above the kernel, \
         which ends at {kernel_end:#x}, and below {ram_end:#x}"
    )]
    InitramfsTooLarge {
        /// Length of the initramfs, in bytes.
        len_bytes: u64,
        /// First address past the kernel.
        kernel_end: u64,
        /// First address past RAM below the MMIO hole.
        ram_end: u64,
    },
}

/// Opens `path` as a regular file to read. A directory or device is refused
/// here, before podvmm reads from it.
pub(crate) fn open(path: &Path) -> Result<File, LoadError> {
    let failed = |source| LoadError::Open {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        Ok(file)
    } else {
        Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )))
    }
}

/// Loads the kernel at `path` where it wants to lie.
pub(crate) fn load_kernel(ram: &mut Ram, path: &Path) -> Result<KernelImage, LoadError> {
    let file = open(path)?;
    let mut image = KernelImage::read(&file).map_err(|source| LoadError::Image {
        path: path.into(),
        source,
    })?;
    // In order, for a mapped segment may end in a page where an unaligned one
    // begins.
    image.segments.sort_by_key(|segment| segment.start);
    for segment in &image.segments {
        ram.place(
            &file,
            segment.file_offset,
            segment.file_bytes,
            segment.start,
            segment.memory_bytes,
        )
        .map_err(|source| LoadError::Place {
            path: path.into(),
            source,
        })?;
    }
    Ok(image)
}

/// Loads the initramfs at `path`, followed by the archive `appended`, at the
/// upper end of RAM below the MMIO hole. Returns where it starts and how long
/// it is.
pub(crate) fn load_initramfs(
    ram: &mut Ram,
    path: &Path,
    appended: &[u8],
    kernel_end: GuestAddress,
) -> Result<(GuestAddress, u64), LoadError> {
    let file = open(path)?;
    let file_bytes = file
        .metadata()
        .map_err(|source| LoadError::Open {
            path: path.into(),
            source,
        })?
        .len();
    let appended_at = file_bytes.next_multiple_of(CPIO_ALIGNMENT);
    let len_bytes = appended_at + appended.len() as u64;
    let ram_end = ram
        .memory()
        .iter()
        .map(|region| region.start_addr().raw_value() + region.len())
        .filter(|end| *end <= MMIO_HOLE_START.raw_value())
        .max()
        .expect("RAM starts at 0");
    let start = ram_end
        .checked_sub(len_bytes.next_multiple_of(PAGE_BYTES))
        .filter(|start| *start >= kernel_end.raw_value())
        .map(GuestAddress)
        .ok_or_else(|| LoadError::InitramfsTooLarge {
            len_bytes,
            kernel_end: kernel_end.raw_value(),
            ram_end,
        })?;
    let failed = |source| LoadError::Place {
        path: path.into(),
        source,
    };
    ram.place(&file, 0, file_bytes, start, file_bytes)
        .map_err(failed)?;
    ram.memory()
        .write_slice(appended, start.unchecked_add(appended_at))
        .map_err(|source| {
            failed(RamError::Copy {
                start: start.raw_value(),
                source,
            })
        })?;
    Ok((start, len_bytes))
}
