//! Guest RAM in files, and how it is mapped from them when a snapshot is restored.
//!
//! RAM is counted in *offsets*: its ranges follow one another in order of address, without the holes
//! between them. A file of RAM is sparse, and each byte of it is at its offset. What of a file counts
//! is said by its *extents*; several files make *layers*, of which a later one lies over the earlier.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::Ram;
use super::pages::{self, Pages};

pub(super) const CHUNK: usize = 256 << 10;
/// About so many are made of a file at most; the host allows a process 65,530 mappings.
pub(super) const MOST_EXTENTS: usize = 8 << 10;

/// A run of a file that is guest RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// CRC-32 (IEEE) of its bytes.
    pub(super) crc32: u32,
}

impl Extent {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// A file of RAM.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) file: Arc<File>,
    pub(crate) extents: Arc<[Extent]>,
}

/// Why a file is not the RAM it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    #[error("its extents are not within {0} bytes of RAM, in order and whole pages")]
    Extents(u64),
    #[error("it is truncated: {found} bytes instead of {expected}")]
    Truncated { expected: u64, found: u64 },
    #[error("the RAM at offset {0:#x} is damaged: its checksum is another")]
    Damaged(u64),
    #[error("read it")]
    Read(#[source] io::Error),
}

impl Layer {
    /// Whether the file can be mapped as RAM of `ram_len` bytes. Looks at no byte of RAM.
    pub(crate) fn check(&self, ram_len: u64) -> Result<(), LayerError> {
        let ranges = check_extents(&self.extents, ram_len)?;
        check_len(&self.file, ranges.last().map_or(0, |range| range.end))
    }

    /// The ranges of the file that count.
    fn ranges(&self) -> Vec<Range<u64>> {
        self.extents.iter().map(Extent::range).collect()
    }

    /// Whether every byte is as it was written. Reads all of it.
    pub(crate) fn verify(&self) -> Result<(), LayerError> {
        let mut buffer = vec![0; CHUNK];
        for extent in self.extents.iter() {
            let mut crc = crc32fast::Hasher::new();
            let mut at = extent.offset;
            while at < extent.range().end {
                let len = chunk(extent.range().end - at);
                self.file
                    .read_exact_at(&mut buffer[..len], at)
                    .map_err(LayerError::Read)?;
                crc.update(&buffer[..len]);
                at += len as u64;
            }
            if crc.finalize() != extent.crc32 {
                return Err(LayerError::Damaged(extent.offset));
            }
        }
        Ok(())
    }
}

/// The runs of RAM that the extents of a file are, of `ram_len` bytes of RAM. Another process may
/// have written them.
pub(crate) fn check_extents(
    extents: &[Extent],
    ram_len: u64,
) -> Result<Vec<Range<u64>>, LayerError> {
    let range = |extent: &Extent| {
        let end = extent.offset.checked_add(extent.len)?;
        Some(extent.offset..end)
    };
    let ranges: Option<Vec<_>> = extents.iter().map(range).collect();
    let fit =
        |ranges: &Vec<_>| ranges.len() <= 2 * MOST_EXTENTS && pages::are_pages(ranges, ram_len);
    ranges.filter(fit).ok_or(LayerError::Extents(ram_len))
}

/// Whether a file has `expected` bytes: a page beyond its end cannot be touched.
pub(crate) fn check_len(file: &File, expected: u64) -> Result<(), LayerError> {
    match file.metadata().map_err(LayerError::Read)?.len() {
        found if found < expected => Err(LayerError::Truncated { expected, found }),
        _ => Ok(()),
    }
}

fn chunk(rest: u64) -> usize {
    usize::try_from(rest).unwrap_or(CHUNK).min(CHUNK)
}

/// A piece of RAM.
pub(super) struct Part<'a> {
    pub(super) offset: u64,
    pub(super) region: &'a GuestRegionMmap,
    /// Where the piece starts in the region.
    pub(super) start: MemoryRegionAddress,
    pub(super) len: usize,
}

impl Ram {
    /// Bytes of RAM, as offsets count them.
    pub(crate) fn len(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// The ranges of RAM, each with its offset.
    pub(super) fn regions(&self) -> impl Iterator<Item = (Range<u64>, &GuestRegionMmap)> {
        let mut offset = 0;
        self.memory.iter().map(move |region| {
            let range = offset..offset + region.len();
            offset = range.end;
            (range, region)
        })
    }

    /// The offsets of `len` bytes at an address of RAM.
    pub(super) fn offsets(&self, start: GuestAddress, len: u64) -> Option<Range<u64>> {
        self.regions().find_map(|(range, region)| {
            let from = start.0.checked_sub(region.start_addr().0)?;
            let offset = range.start + from;
            (from < region.len()).then_some(offset..offset + len)
        })
    }

    /// The runs of such pages.
    pub(super) fn pages(&self, pages: Pages) -> io::Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        for (range, region) in self.regions() {
            let runs = match region.file_offset() {
                Some(file) => pages::data(file.file(), region.len())?,
                None => pages::runs(region.as_ptr(), region.len(), pages)?,
            };
            let shifted = runs
                .into_iter()
                .map(|run| range.start + run.start..range.start + run.end);
            all.extend(shifted);
        }
        Ok(all)
    }

    /// A run in pieces of at most [`CHUNK`] bytes, each in one range of RAM.
    pub(super) fn parts(&self, run: Range<u64>) -> impl Iterator<Item = Part<'_>> {
        self.regions().flat_map(move |(range, region)| {
            let (from, to) = (run.start.max(range.start), run.end.min(range.end));
            (from..to).step_by(CHUNK).map(move |offset| Part {
                offset,
                region,
                start: MemoryRegionAddress(offset - range.start),
                len: chunk(to - offset),
            })
        })
    }

    /// Makes RAM within `allowed` what `layers` say, and zero where they say nothing. RAM that was
    /// `touched` is replaced all over; otherwise it must be as new. Where that fails half-way, RAM
    /// that held what the layers say still does, and is mapped from no known layers.
    pub(crate) fn lay(
        &mut self,
        layers: &[Layer],
        allowed: &[Range<u64>],
        touched: bool,
    ) -> io::Result<()> {
        let ranges = layers.iter().map(Layer::ranges);
        let covered = pages::union(ranges.flatten().collect());
        if !self.private {
            return layers.iter().try_for_each(|layer| {
                let mut runs = pages::within(&layer.ranges(), allowed).into_iter();
                runs.try_for_each(|run| self.copy(&layer.file, run))
            });
        }
        // From here on what was written since is known of neither the old layers nor the new.
        self.layers.clear();
        let before = self.mapped.iter().chain(&covered);
        self.mapped = pages::union(before.cloned().collect());
        if touched {
            for hole in pages::without(allowed, &covered) {
                self.replace(None, hole)?;
            }
        }
        for layer in layers {
            for run in pages::within(&layer.ranges(), allowed) {
                self.replace(Some(&layer.file), run)?;
            }
        }
        self.mapped = covered;
        self.layers = layers.to_vec();
        Ok(())
    }

    /// The files that RAM is mapped from but for what was written since.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// What was touched of RAM since it was mapped from files, and a little around it: the host maps
    /// what it has of a file by 64 KiB. None if it is not mapped from files.
    pub(crate) fn touched(&self) -> io::Result<Option<Vec<Range<u64>>>> {
        if !self.private {
            return Ok(None);
        }
        let touched = pages::within(&self.pages(Pages::Used)?, &self.mapped);
        Ok(Some(pages::at_most(touched, MOST_EXTENTS)))
    }

    /// Has the host read the files that RAM is mapped from, ahead of the guest: all of them, for which
    /// no thread waits, or the pages that are known to be needed, which then are there.
    pub(crate) fn prefetch(&self, needed: Option<&[Range<u64>]>) {
        let Some(needed) = needed else {
            return self.read_ahead(&self.mapped);
        };
        let needed = pages::within(needed, &self.mapped);
        self.read_ahead(&needed);
        if let Err(error) = self.populate(&needed) {
            log::debug!("have pages of RAM at once: {error}");
        }
    }

    fn read_ahead(&self, runs: &[Range<u64>]) {
        for layer in &self.layers {
            for run in pages::within(&layer.ranges(), runs) {
                let len = NonZeroU64::new(run.end - run.start);
                let advised = fadvise(&layer.file, run.start, len, Advice::WillNeed);
                if let Err(error) = advised {
                    log::debug!("read {} ahead: {error}", layer.name);
                }
            }
        }
    }

    /// Maps pages as if they were read. Hosts can since Linux 5.14.
    pub(super) fn populate(&self, runs: &[Range<u64>]) -> io::Result<()> {
        for (range, region) in self.regions() {
            for run in pages::within(runs, std::slice::from_ref(&range)) {
                let len = usize::try_from(run.end - run.start).map_err(io::Error::other)?;
                let start = MemoryRegionAddress(run.start - range.start);
                let slice = region.get_slice(start, len).map_err(io::Error::other)?;
                let host = slice.ptr_guard_mut().as_ptr();
                // SAFETY: the range lies within one RAM mapping of ours (`get_slice` checked it), and
                // the advice does not change what it holds.
                let done = unsafe { libc::madvise(host.cast(), len, libc::MADV_POPULATE_READ) };
                if done != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }

    fn copy(&self, file: &File, run: Range<u64>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for part in self.parts(run) {
            let bytes = &mut buffer[..part.len];
            file.read_exact_at(bytes, part.offset)?;
            let written = part.region.write_slice(bytes, part.start);
            written.map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Maps a run of RAM anew: to `file` at its offset, or to nothing but zeros.
    fn replace(&self, file: Option<&File>, run: Range<u64>) -> io::Result<()> {
        for (range, region) in self.regions() {
            for run in pages::within(std::slice::from_ref(&run), std::slice::from_ref(&range)) {
                let len = usize::try_from(run.end - run.start).map_err(io::Error::other)?;
                let start = MemoryRegionAddress(run.start - range.start);
                let slice = region.get_slice(start, len).map_err(io::Error::other)?;
                let host = slice.ptr_guard_mut().as_ptr();
                let offset = libc::off_t::try_from(run.start).map_err(io::Error::other)?;
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
                let (flags, fd, offset) = match file {
                    Some(file) => (flags, file.as_raw_fd(), offset),
                    None => (flags | libc::MAP_ANONYMOUS, -1, 0),
                };
                let access = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: `host` to `host + len` lies within one RAM mapping of ours (`get_slice`
                // checked it), which stays whole, and of which Rust holds no references.
                let mapped = unsafe { libc::mmap(host.cast(), len, access, flags, fd, offset) };
                if mapped == libc::MAP_FAILED {
                    return Err(io::Error::last_os_error());
                }
                if file.is_none() {
                    let advice = if self.thp {
                        libc::MADV_HUGEPAGE
                    } else {
                        libc::MADV_NOHUGEPAGE
                    };
                    // SAFETY: the range was just mapped, and the advice does not change what it
                    // holds. A host without transparent huge pages refuses it, which does no harm.
                    unsafe { libc::madvise(mapped, len, advice) };
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::MemoryConfig;

    const MIB: u64 = 1 << 20;

    fn ram(shared: bool) -> Ram {
        let config = MemoryConfig {
            size: "32M".parse().unwrap(),
            thp: false,
            shared,
            ..Default::default()
        };
        Ram::new(&config).unwrap()
    }

    fn put(ram: &Ram, at: u64, byte: u8) {
        ram.memory()
            .write_slice(&[byte; 4096], GuestAddress(at))
            .unwrap();
    }

    fn byte(ram: &Ram, at: u64) -> u8 {
        ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn layer(file: File, extents: Vec<Extent>) -> Layer {
        Layer {
            name: "memory".into(),
            file: Arc::new(file),
            extents: extents.into(),
        }
    }

    fn saved(ram: &Ram) -> Layer {
        let file = tempfile::tempfile().unwrap();
        let all = 0..ram.len();
        let extents = ram.write(&file, std::slice::from_ref(&all)).unwrap();
        layer(file, extents)
    }

    fn changes(ram: &Ram) -> Layer {
        let file = tempfile::tempfile().unwrap();
        let all = 0..ram.len();
        let extents = ram
            .write_changes(&file, std::slice::from_ref(&all))
            .unwrap();
        layer(file, extents)
    }

    fn restored(layers: &[Layer], shared: bool) -> Ram {
        let mut ram = ram(shared);
        let all = 0..ram.len();
        ram.lay(layers, std::slice::from_ref(&all), false).unwrap();
        ram
    }

    #[test]
    fn what_was_written_is_there_again_and_zeros_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        for (from, to) in [(false, false), (true, false), (false, true)] {
            let original = ram(from);
            put(&original, 5 * MIB, 1);
            put(&original, 5 * MIB + 0x3000, 2);
            put(&original, 20 * MIB, 3);
            put(&original, 21 * MIB, 0);
            let layer = saved(&original);
            let ranges: Vec<_> = layer.extents.iter().map(Extent::range).collect();
            assert_eq!(
                ranges,
                [5 * MIB..5 * MIB + 0x4000, 20 * MIB..20 * MIB + 0x1000]
            );
            layer.check(32 * MIB).unwrap();
            layer.verify().unwrap();
            assert_eq!(layer.file.metadata().unwrap().blocks() * 512, 3 * 4096);
            let copy = restored(&[layer], to);
            let bytes = [
                5 * MIB,
                5 * MIB + 0x1000,
                5 * MIB + 0x3000,
                20 * MIB,
                21 * MIB,
            ];
            assert_eq!(bytes.map(|at| byte(&copy, at)), [1, 0, 2, 3, 0]);
        }
    }

    #[test]
    fn changes_lie_over_what_was_there_and_the_file_stays_as_it_is() {
        let original = ram(false);
        put(&original, 5 * MIB, 1);
        put(&original, 6 * MIB, 2);
        let base = saved(&original);
        let copy = restored(std::slice::from_ref(&base), false);
        assert_eq!(byte(&copy, 6 * MIB), 2);
        put(&copy, 5 * MIB, 0);
        put(&copy, 9 * MIB, 7);
        base.verify().unwrap();
        let delta = changes(&copy);
        let ranges: Vec<_> = delta.extents.iter().map(Extent::range).collect();
        assert_eq!(
            ranges,
            [5 * MIB..5 * MIB + 0x1000, 9 * MIB..9 * MIB + 0x1000]
        );
        let again = restored(&[base, delta], false);
        let bytes = [5 * MIB, 6 * MIB, 9 * MIB];
        assert_eq!(bytes.map(|at| byte(&again, at)), [0, 2, 7]);
        // All of it, not only what was written.
        let whole = restored(&[saved(&again)], false);
        assert_eq!(bytes.map(|at| byte(&whole, at)), [0, 2, 7]);
    }

    #[test]
    fn ram_that_was_used_can_be_laid_on_its_own_snapshot() {
        let mut ram = ram(false);
        put(&ram, 5 * MIB, 1);
        put(&ram, 7 * MIB, 0);
        let base = saved(&ram);
        let all = 0..ram.len();
        ram.lay(&[base], std::slice::from_ref(&all), true).unwrap();
        assert_eq!((byte(&ram, 5 * MIB), byte(&ram, 7 * MIB)), (1, 0));
        assert_eq!(changes(&ram).extents.len(), 0);
        put(&ram, 7 * MIB, 3);
        assert_eq!(changes(&ram).extents.len(), 1);
    }

    #[test]
    fn ram_that_was_laid_by_half_is_written_whole() {
        let mut ram = ram(false);
        put(&ram, 5 * MIB, 1);
        let all = 0..ram.len();
        let base = saved(&ram);
        ram.lay(
            std::slice::from_ref(&base),
            std::slice::from_ref(&all),
            true,
        )
        .unwrap();
        put(&ram, 5 * MIB, 2);
        put(&ram, 9 * MIB, 3);
        let delta = changes(&ram);
        // A file that cannot be mapped comes after one that can.
        let closed = Layer {
            file: Arc::new(File::options().write(true).open("/dev/null").unwrap()),
            ..delta.clone()
        };
        ram.lay(&[base, delta, closed], std::slice::from_ref(&all), true)
            .unwrap_err();
        assert!(ram.layers().is_empty());
        let copy = restored(&[saved(&ram)], false);
        assert_eq!((byte(&copy, 5 * MIB), byte(&copy, 9 * MIB)), (2, 3));
    }

    #[test]
    fn only_what_is_allowed_is_written_and_mapped() {
        let original = ram(false);
        put(&original, 5 * MIB, 1);
        put(&original, 6 * MIB, 2);
        let layer = saved(&original);
        let mut copy = ram(false);
        let allowed = 0..6 * MIB;
        copy.lay(&[layer], std::slice::from_ref(&allowed), false)
            .unwrap();
        assert_eq!((byte(&copy, 5 * MIB), byte(&copy, 6 * MIB)), (1, 0));
        let file = tempfile::tempfile().unwrap();
        put(&copy, 6 * MIB, 3);
        let extents = copy.write(&file, std::slice::from_ref(&allowed)).unwrap();
        assert_eq!(extents.len(), 1);
    }

    #[test]
    fn files_that_are_not_what_they_were_are_refused() {
        let original = ram(false);
        put(&original, 5 * MIB, 1);
        let good = saved(&original);
        let refusal = |extent: (u64, u64)| {
            let (offset, len) = extent;
            let extent = Extent {
                offset,
                len,
                crc32: 0,
            };
            let bad = Layer {
                extents: [extent].into(),
                ..good.clone()
            };
            bad.check(32 * MIB).unwrap_err().to_string()
        };
        let odd = "its extents are not within 33554432 bytes of RAM, in order and whole pages";
        for extent in [
            (1, 4096),
            (0, 1),
            (0, 0),
            (32 * MIB, 4096),
            (u64::MAX - 4095, 4096),
        ] {
            assert_eq!(refusal(extent), odd, "{extent:?}");
        }
        good.file.write_all_at(&[9], 5 * MIB + 7).unwrap();
        assert_eq!(
            good.verify().unwrap_err().to_string(),
            "the RAM at offset 0x500000 is damaged: its checksum is another"
        );
        good.file.set_len(5 * MIB).unwrap();
        assert_eq!(
            good.check(32 * MIB).unwrap_err().to_string(),
            "it is truncated: 5242880 bytes instead of 5246976"
        );
    }
}
