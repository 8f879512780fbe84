//! Guest RAM written to files when a snapshot is taken: all of it, or what has changed since.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::Bytes;

use super::image::{CHUNK, Extent, MOST_EXTENTS};
use super::pages::{self, Pages};
use super::{PAGE, Ram};

/// Zeros of so many bytes do not end an extent: each is a mapping of its own.
const GAP: u64 = 256 << 10;

impl Ram {
    /// Writes all of RAM within `allowed` to `file`, which is empty. Zeros are left out.
    pub(crate) fn write(&self, file: &File, allowed: &[Range<u64>]) -> io::Result<Vec<Extent>> {
        let mut used = self.pages(Pages::Used)?;
        used.extend_from_slice(&self.mapped);
        let used = pages::within(&pages::union(used), allowed);
        let gap = (self.len() / MOST_EXTENTS as u64).max(GAP);
        self.write_runs(file, &used, &[], gap)
    }

    /// Writes the pages within `allowed` that were written since RAM was mapped from files.
    pub(crate) fn write_changes(
        &self,
        file: &File,
        allowed: &[Range<u64>],
    ) -> io::Result<Vec<Extent>> {
        let written = pages::within(&self.pages(Pages::Written)?, allowed);
        let runs = pages::at_most(written, MOST_EXTENTS);
        // Zeros count where they lie over something else.
        self.write_runs(file, &runs, &self.mapped, 0)
    }

    fn write_runs(
        &self,
        file: &File,
        runs: &[Range<u64>],
        zeros_count: &[Range<u64>],
        gap: u64,
    ) -> io::Result<Vec<Extent>> {
        file.set_len(self.len())?;
        let counted = pages::within(runs, zeros_count);
        let others = pages::without(runs, &counted).into_iter();
        let mut runs: Vec<_> = others.map(|run| (run, false)).collect();
        runs.extend(counted.into_iter().map(|run| (run, true)));
        runs.sort_by_key(|(run, _)| run.start);
        let mut extents = Extents {
            gap,
            ..Extents::default()
        };
        let mut buffer = vec![0; CHUNK];
        for (run, zeros_count) in runs {
            for part in self.parts(run) {
                let bytes = &mut buffer[..part.len];
                let read = part.region.read_slice(bytes, part.start);
                read.map_err(io::Error::other)?;
                write_pages(file, part.offset, bytes, &mut extents, zeros_count)?;
            }
        }
        extents.close();
        Ok(extents.done)
    }
}

/// Extents in the making.
#[derive(Default)]
struct Extents {
    /// Zeros that may lie between two parts of one extent, in bytes.
    gap: u64,
    done: Vec<Extent>,
    open: Option<(Range<u64>, crc32fast::Hasher)>,
}

impl Extents {
    fn add(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        if let Some((range, crc)) = &mut self.open
            && offset - range.end <= self.gap
        {
            let zeros = (range.end..offset).step_by(PAGE.len());
            zeros.for_each(|_| crc.update(&PAGE));
            crc.update(bytes);
            range.end = end;
            return;
        }
        self.close();
        let mut crc = crc32fast::Hasher::new();
        crc.update(bytes);
        self.open = Some((offset..end, crc));
    }

    fn close(&mut self) {
        if let Some((range, crc)) = self.open.take() {
            self.done.push(Extent {
                offset: range.start,
                len: range.end - range.start,
                crc32: crc.finalize(),
            });
        }
    }
}

/// Writes the pages that are not zero to the file at `at`. Zeros count as an extent only if told so.
fn write_pages(
    file: &File,
    mut at: u64,
    bytes: &[u8],
    extents: &mut Extents,
    zeros_count: bool,
) -> io::Result<()> {
    let (pages, _) = bytes.as_chunks::<{ PAGE.len() }>();
    for run in pages.chunk_by(|page, next| (*page == PAGE) == (*next == PAGE)) {
        let run_bytes = run.as_flattened();
        let is_zero = run[0] == PAGE;
        if !is_zero {
            file.write_all_at(run_bytes, at)?;
        }
        if !is_zero || zeros_count {
            extents.add(at, run_bytes);
        }
        at += run_bytes.len() as u64;
    }
    Ok(())
}
