//! Gives pages of guest RAM back to the host.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use super::PAGE_BYTES;
use crate::virtio::GuestRam;

/// How RAM is given back depends on what backs it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Discard {
    advice: libc::c_int,
}

impl Discard {
    /// RAM is either all anonymous or all of files.
    pub(super) fn new(ram: &GuestRam) -> Self {
        let shared = ram.iter().any(|region| region.file_offset().is_some());
        Self {
            // The pages of a file stay in it, unless a hole is made.
            advice: if shared {
                libc::MADV_REMOVE
            } else {
                libc::MADV_DONTNEED
            },
        }
    }

    /// Gives back the pages of these numbers, in as few calls as their order allows once sorted.
    /// Returns how many of them lie in RAM.
    pub(super) fn pages(self, ram: &GuestRam, numbers: &mut [u32]) -> usize {
        numbers.sort_unstable();
        let runs = numbers.chunk_by(|a, b| a == b || a.checked_add(1) == Some(*b));
        runs.map(|run| {
            let pages = u64::from(run[run.len() - 1] - run[0]) + 1;
            let start = GuestAddress(u64::from(run[0]) * PAGE_BYTES);
            let len = usize::try_from(pages * PAGE_BYTES).unwrap_or(usize::MAX);
            let slices = ram.get_slices(start, len).map_while(Result::ok);
            let done: usize = slices.map(|slice| self.slice(&slice).unwrap_or(0)).sum();
            done >> PAGE_BYTES.trailing_zeros()
        })
        .sum()
    }

    /// Gives back the whole pages of `slice`. Returns their bytes.
    pub(super) fn slice(self, slice: &VolatileSlice<'_>) -> io::Result<usize> {
        let guard = slice.ptr_guard_mut();
        let start = guard.as_ptr();
        let skip = start.align_offset(PAGE);
        let len = slice.len().saturating_sub(skip) & !(PAGE - 1);
        if len == 0 {
            return Ok(0);
        }
        // SAFETY: the pages lie within a mapping of guest RAM that the slice keeps alive. Nothing
        // relies on what guest RAM holds, and Rust has no references into it.
        let result = unsafe { libc::madvise(start.wrapping_add(skip).cast(), len, self.advice) };
        if result == 0 {
            Ok(len)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);
