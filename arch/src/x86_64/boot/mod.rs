//! Starting a kernel: find out what an image is, where it wants to lie, and
//! tell it about RAM, its command line and its initramfs.
//!
//! | image | protocol | description it reads |
//! |---|---|---|
//! | ELF with a PVH note | PVH, 32-bit protected mode | `hvm_start_info` |
//! | ELF without | Linux 64-bit | `boot_params` |
//! | bzImage | Linux 64-bit | `boot_params` with the image's own setup header |

mod bzimage;
mod elf;
mod linux64;
mod pvh;

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{
    ACPI_START, CMDLINE_MAX_BYTES, CMDLINE_START, HIGH_RAM_START, KERNEL_RAM_START, LOW_RAM_END,
    MMIO_HOLE_START, MPTABLE_END, MPTABLE_START, PCI_WINDOW,
};
use super::regs;
use crate::ram::RamRange;

/// Where and how the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, paging off.
    Pvh(GuestAddress),
    /// 64-bit long mode, the first GiB identity-mapped.
    Linux64(GuestAddress),
}

/// A run of bytes of the image file and where they belong in guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the bytes start in the file.
    pub file_offset: u64,
    /// How many bytes come from the file.
    pub file_bytes: u64,
    /// Where the segment goes in guest RAM.
    pub start: GuestAddress,
    /// How much RAM the segment takes; past `file_bytes` it is zero.
    pub memory_bytes: u64,
}

/// What an image file says of itself. Nothing has been loaded yet, and every
/// segment lies within the file.
#[derive(Clone, Debug)]
pub struct KernelImage {
    /// What to load.
    pub segments: Vec<Segment>,
    /// Where and how the kernel is entered.
    pub entry: Entry,
    /// First address past what the kernel needs for itself.
    pub end: GuestAddress,
    /// A bzImage's setup header, which becomes part of `boot_params`.
    setup_header: Option<Box<setup_header>>,
}

/// Why an image cannot be started.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file could not be read.
    #[error("read the image")]
    Read(#[source] std::io::Error),
    /// Neither ELF nor bzImage.
    #[error("not a kernel: neither an ELF image (vmlinux) nor a bzImage")]
    NotAKernel,
    /// An ELF file for something else.
    #[error("not an x86-64 executable ELF image")]
    WrongElf,
    /// Headers point past the end of the file.
    #[error("truncated: {what} ends at byte {end} of a file of {file_bytes} bytes")]
    Truncated {
        /// The part that is missing.
        what: &'static str,
        /// Where the part should end, as an offset in the file.
        end: u64,
        /// Length of the file, in bytes.
        file_bytes: u64,
    },
    /// Numbers in the headers contradict each other.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// A segment that would overwrite the boot data below 1 MiB.
    #[error("a segment is linked at {0:#x}, below {lowest:#x}", lowest = KERNEL_RAM_START.raw_value())]
    TooLow(u64),
    /// bzImage of a boot protocol older than 2.12 or without 64-bit entry.
    #[error("the bzImage has no 64-bit entry point (boot protocol 2.12 with XLF_KERNEL_64)")]
    No64BitEntry,
}

impl KernelImage {
    /// Reads the headers of `file`.
    pub fn read(file: &File) -> Result<Self, ImageError> {
        let file_bytes = file.metadata().map_err(ImageError::Read)?.len();
        let mut magic = [0; 4];
        if file_bytes >= 4 {
            file.read_exact_at(&mut magic, 0)
                .map_err(ImageError::Read)?;
        }
        let image = if &magic == b"\x7fELF" {
            elf::read(file, file_bytes)?
        } else {
            bzimage::read(file, file_bytes)?
        };
        match image.segments.iter().map(|segment| segment.start).min() {
            None => Err(ImageError::Malformed("nothing to load")),
            Some(lowest) if lowest < KERNEL_RAM_START => {
                Err(ImageError::TooLow(lowest.raw_value()))
            }
            Some(_) => Ok(image),
        }
    }
}

/// What the kernel is told.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo<'a> {
    /// Guest RAM.
    pub ram: &'a [RamRange],
    /// Command line, without a NUL.
    pub cmdline: &'a str,
    /// Where the initramfs lies, and its length in bytes.
    pub initramfs: Option<(GuestAddress, u64)>,
    /// Whether there is a PCI bus. The kernel places what comes to it later in the largest hole of its memory
    /// map, which is made [`PCI_WINDOW`].
    pub pci: bool,
}

/// Why the boot data could not be written.
#[derive(Debug, Error)]
pub enum BootError {
    /// A command line that is so long that Linux would cut it.
    #[error(
        "the kernel command line has {0} bytes, Linux reads at most {max}",
        max = CMDLINE_MAX_BYTES - 1
    )]
    CmdlineTooLong(usize),
    /// A command line with a NUL, which would end it early.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineHasNul,
    /// Guest RAM does not reach that far.
    #[error("write {what} to guest RAM")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why it failed.
        source: GuestMemoryError,
    },
    /// A structure that linux-loader writes did not fit.
    #[error("write the boot parameters")]
    Configure(#[source] linux_loader::configurator::Error),
}

/// Writes everything `image`'s boot protocol wants to find in guest RAM:
/// command line, boot parameters, descriptor and page tables.
pub fn write(
    memory: &GuestMemoryMmap,
    image: &KernelImage,
    info: BootInfo,
) -> Result<(), BootError> {
    write_cmdline(memory, info.cmdline)?;
    match image.entry {
        Entry::Pvh(_) => pvh::write(memory, info)?,
        Entry::Linux64(_) => linux64::write(memory, image.setup_header.as_deref(), info)?,
    }
    regs::write_tables(image.entry, memory).map_err(|source| BootError::Write {
        what: "descriptor and page tables",
        source,
    })
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX_BYTES {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::CmdlineHasNul);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, CMDLINE_START)
        .map_err(|source| BootError::Write {
            what: "the kernel command line",
            source,
        })
}

/// Kinds of memory in a map handed to the kernel; PVH took over the numbers of
/// the BIOS call E820h.
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// The memory map: start, length in bytes, kind. Conventional RAM ends where
/// firmware keeps its data on a real machine, and what is read of the MP and ACPI tables is reserved.
fn memory_map(ram: &[RamRange], pci: bool) -> Vec<(u64, u64, u32)> {
    let firmware = if pci { ACPI_START } else { MPTABLE_START };
    let mut map = vec![
        (0, LOW_RAM_END.raw_value(), MAP_RAM),
        (
            firmware.raw_value(),
            MPTABLE_END.unchecked_offset_from(firmware),
            MAP_RESERVED,
        ),
    ];
    for range in ram {
        let start = range.start.max(KERNEL_RAM_START);
        map.push((
            start.raw_value(),
            range.end().unchecked_offset_from(start),
            MAP_RAM,
        ));
        if pci && range.end() <= MMIO_HOLE_START {
            let (below, above) = (range.end().raw_value(), PCI_WINDOW.end);
            map.push((below, PCI_WINDOW.start - below, MAP_RESERVED));
            map.push((above, HIGH_RAM_START.raw_value() - above, MAP_RESERVED));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
    }

    #[test]
    fn the_memory_map_covers_ram_but_for_the_firmware_area() {
        assert_eq!(
            memory_map(&crate::ram::ranges(5 << 30), false),
            [
                (0, 0x9_fc00, MAP_RAM),
                (0xf_0000, 0x1_0000, MAP_RESERVED),
                (0x10_0000, 0xc000_0000 - 0x10_0000, MAP_RAM),
                (0x1_0000_0000, 2 << 30, MAP_RAM),
            ]
        );
    }

    #[test]
    fn the_largest_hole_of_the_memory_map_is_where_bars_may_be() {
        for size in [256 << 20, 3 << 30, 5 << 30] {
            let mut map = memory_map(&crate::ram::ranges(size), true);
            map.sort_unstable();
            let ends = map.iter().map(|(start, len, _)| start + len);
            let holes = ends.zip(map.iter().skip(1)).map(|(end, next)| end..next.0);
            let below = holes.filter(|hole| hole.start < 1 << 32);
            let largest = below.max_by_key(|hole| hole.end - hole.start);
            assert_eq!(largest, Some(PCI_WINDOW), "{size:#x}");
        }
    }

    #[test]
    fn a_command_line_of_2047_bytes_is_the_longest() {
        assert!(write_cmdline(&memory(), &"x".repeat(2047)).is_ok());
        assert!(matches!(
            write_cmdline(&memory(), &"x".repeat(2048)),
            Err(BootError::CmdlineTooLong(2048))
        ));
    }

    #[test]
    fn a_nul_in_the_command_line_is_refused() {
        assert!(matches!(
            write_cmdline(&memory(), "a\0b"),
            Err(BootError::CmdlineHasNul)
        ));
    }
}
