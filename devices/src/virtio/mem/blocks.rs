//! Host memory for the region's blocks.
//!
//! The region is one piece of guest RAM and one KVM slot from the start, so plugging changes
//! neither: what changes is what its addresses are mapped to. A plugged block has memory of its
//! own. All unplugged blocks are mapped, again and again, to one small file, the *sink*: a guest or
//! device that touches them finds nonsense, but neither faults nor makes the process grow beyond
//! the sink. Replacing a mapping is atomic for a guest or device that accesses it, and gives the
//! pages back at once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::plugmap::PlugMap;
use crate::virtio::Memory;

/// The smallest block, in bytes: Linux handles no less.
const LEAST_BLOCK: u64 = 2 << 20;
/// The kernel allows a process 65,530 mappings; a guest that plugs every other block makes one each.
const MOST_BLOCKS: u64 = 16 << 10;
/// Into so many sinks the unplugged region is divided: mappings made at start against memory that a
/// guest can have beyond its limit (1/256 of the region).
const SINKS: u64 = 256;

#[derive(Debug)]
pub(super) struct Blocks {
    memory: Memory,
    start: GuestAddress,
    block_len: u64,
    map: PlugMap,
    sink: File,
    sink_len: u64,
}

/// What the length of a block is in a region of `len` bytes.
pub(super) fn block_len(len: u64) -> u64 {
    len.div_ceil(MOST_BLOCKS)
        .next_power_of_two()
        .max(LEAST_BLOCK)
}

impl Blocks {
    /// Unplugs all of the region of `memory` that begins at `start`.
    pub(super) fn new(memory: Memory, start: GuestAddress, len: u64) -> io::Result<Self> {
        let block_len = block_len(len);
        let sink_len = len.div_ceil(SINKS).next_multiple_of(block_len);
        let blocks = usize::try_from(len / block_len).map_err(io::Error::other)?;
        let blocks = Self {
            memory,
            start,
            block_len,
            map: PlugMap::new(blocks),
            sink: sink(sink_len)?,
            sink_len,
        };
        let (region_len, _) = blocks.region()?;
        if region_len != len || len == 0 || !len.is_multiple_of(block_len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        blocks.detach(0..blocks.map.blocks())?;
        Ok(blocks)
    }

    pub(super) fn map(&self) -> &PlugMap {
        &self.map
    }

    pub(super) fn block_len(&self) -> u64 {
        self.block_len
    }

    /// Gives unplugged blocks memory: zeros, none of it used yet.
    pub(super) fn plug(&mut self, range: Range<usize>) -> io::Result<()> {
        let (offset, len) = self.bytes(&range);
        let (_, file) = self.region()?;
        let backing = match file {
            Some((file, at)) => Backing::Shared(file, at + offset),
            None => Backing::Private,
        };
        if let Err(error) = self.replace(offset, len, &backing) {
            // Half of it may be there.
            self.detach(range)?;
            return Err(error);
        }
        self.map.set(range, true);
        Ok(())
    }

    /// Takes blocks away, whatever they are, and gives what they held back to the host.
    pub(super) fn unplug(&mut self, range: Range<usize>) -> io::Result<()> {
        self.detach(range.clone())?;
        self.map.set(range.clone(), false);
        if let (_, Some((file, at))) = self.region()? {
            let (offset, len) = self.bytes(&range);
            punch(&file, at + offset, len)?;
        }
        Ok(())
    }

    pub(super) fn unplug_all(&mut self) -> io::Result<()> {
        self.map
            .runs()
            .into_iter()
            .try_for_each(|run| self.unplug(run))
    }

    /// Plugs what another one had plugged. None of it is plugged here.
    pub(super) fn restore(&mut self, map: &PlugMap) -> io::Result<()> {
        map.runs().into_iter().try_for_each(|run| self.plug(run))
    }

    fn bytes(&self, range: &Range<usize>) -> (u64, u64) {
        (
            range.start as u64 * self.block_len,
            range.len() as u64 * self.block_len,
        )
    }

    /// Length of the region, and the file behind it with the offset in it.
    fn region(&self) -> io::Result<(u64, Option<(File, u64)>)> {
        let ram = self.memory.memory();
        let region = ram
            .find_region(self.start)
            .filter(|region| region.start_addr() == self.start)
            .ok_or(io::ErrorKind::NotFound)?;
        let file = match region.file_offset() {
            Some(file) => Some((file.file().try_clone()?, file.start())),
            None => None,
        };
        Ok((region.len(), file))
    }

    /// Maps blocks to the sink.
    fn detach(&self, range: Range<usize>) -> io::Result<()> {
        let (mut offset, len) = self.bytes(&range);
        let end = offset + len;
        while offset < end {
            let in_sink = offset % self.sink_len;
            let step = (end - offset).min(self.sink_len - in_sink);
            self.replace(offset, step, &Backing::Sink(in_sink))?;
            offset += step;
        }
        Ok(())
    }

    fn replace(&self, offset: u64, len: u64, backing: &Backing) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let ram = self.memory.memory();
        let slice = ram
            .get_slice(GuestAddress(self.start.0 + offset), len)
            .map_err(io::Error::other)?;
        let (flags, fd, at) = match backing {
            Backing::Private => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            ),
            Backing::Shared(file, at) => (libc::MAP_SHARED, file.as_raw_fd(), *at),
            Backing::Sink(at) => (
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                self.sink.as_raw_fd(),
                *at,
            ),
        };
        let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
        let host = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `host` to `host + len` lies within the region's mapping, which `get_slice`
        // checked, and whose owner unmaps all of it whatever is mapped there. It stays readable and
        // writable, and Rust holds no references into guest RAM.
        let mapped = unsafe {
            libc::mmap(
                host.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                at,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if matches!(backing, Backing::Private) {
            // SAFETY: the range was just mapped, and the advice does not change what it holds. A
            // host without transparent huge pages refuses it, which does no harm.
            unsafe { libc::madvise(mapped, len, libc::MADV_HUGEPAGE) };
        }
        Ok(())
    }
}

enum Backing {
    Private,
    Shared(File, u64),
    Sink(u64),
}

fn sink(len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string that lives as long as the program.
    let fd = unsafe { libc::memfd_create(c"podvmm-sink".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: touches no memory of ours but guest RAM, which holds no references.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
