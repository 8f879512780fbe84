//! Where in podvmm's address space RAM is mapped: at a multiple of 2 MiB.
//!
//! KVM maps 2 MiB of a guest by one entry only where the addresses of guest and host agree modulo
//! 2 MiB; the guest's ranges begin at multiples of that. Since 6.7 Linux aligns mappings of whole 2 MiB
//! itself, so there the first attempt does.

use std::io;
use std::ops::Range;
use std::ptr;

use vm_memory::MmapRegion;

use super::HUGE_PAGE_BYTES;

/// How often to try. Once does, unless another thread maps something at the same moment or the address
/// space has a gap that just happens to fit.
const ATTEMPTS: usize = 4;

/// The mapping of `len` bytes that `map` makes, at a multiple of 2 MiB. Elsewhere if that cannot be had:
/// the guest is slower then, but it runs.
pub(super) fn aligned<E>(
    len: usize,
    map: impl Fn() -> Result<MmapRegion, E>,
) -> Result<MmapRegion, E> {
    let first = map()?;
    if len < alignment() || is_aligned(&first) {
        return Ok(first);
    }
    // They are kept until one fits, so that the next one lies elsewhere.
    let mut misplaced = vec![first];
    for _ in 0..ATTEMPTS {
        let gap = match Gap::open(len) {
            Ok(gap) => gap,
            Err(error) => {
                log::debug!("align guest RAM: {error}");
                break;
            }
        };
        let region = map()?;
        drop(gap);
        if is_aligned(&region) {
            return Ok(region);
        }
        misplaced.push(region);
    }
    log::warn!("guest RAM is not aligned to 2 MiB, so the guest gets no huge pages");
    Ok(misplaced.swap_remove(0))
}

fn alignment() -> usize {
    usize::try_from(HUGE_PAGE_BYTES).expect("2 MiB fit into an address")
}

fn is_aligned(region: &MmapRegion) -> bool {
    region.as_ptr().addr().is_multiple_of(alignment())
}

/// Free addresses of a given length, the first one aligned, between two mappings that keep others away:
/// Linux puts a mapping into the highest gap that it fits into, which this most likely is. Dropping it
/// removes the two.
struct Gap {
    below: Range<usize>,
    above: Range<usize>,
}

impl Gap {
    fn open(len: usize) -> io::Result<Self> {
        let all = len.saturating_add(alignment());
        let (access, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let flags = flags | libc::MAP_NORESERVE;
        // SAFETY: without an address Linux picks a free one, so no other mapping is touched.
        let start = unsafe { libc::mmap(ptr::null_mut(), all, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.addr();
        let aligned = start.next_multiple_of(alignment());
        // Linux maps whole pages.
        let end = (aligned + len).next_multiple_of(super::PAGE.len());
        let gap = Self {
            below: start..aligned,
            above: end..start + all.next_multiple_of(super::PAGE.len()),
        };
        unmap(aligned..end);
        Ok(gap)
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        unmap(self.below.clone());
        unmap(self.above.clone());
    }
}

/// Unmaps a part of what [`Gap::open`] mapped.
fn unmap(part: Range<usize>) {
    if part.is_empty() {
        return;
    }
    let start = ptr::without_provenance_mut(part.start);
    // SAFETY: `Gap::open` mapped these pages without access, so there are no references into them, and
    // each part is unmapped once: by `open` or by `drop`.
    let result = unsafe { libc::munmap(start, part.len()) };
    debug_assert_eq!(result, 0, "these are whole pages of one mapping");
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LEN: usize = (6 << 20) + 0x3000;

    fn map(len: usize) -> MmapRegion {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        MmapRegion::build(None, len, libc::PROT_READ, flags).unwrap()
    }

    // Of these lengths Linux 6.7 and later align the first and the third: the others are like RAM on an
    // older kernel.
    #[test]
    fn mappings_of_any_length_are_aligned() {
        for len in [2 << 20, LEN, 64 << 20, (64 << 20) + 0x1000] {
            let region = aligned(len, || Ok::<_, ()>(map(len))).unwrap();
            assert!(
                is_aligned(&region),
                "{len:#x} bytes at {:p}",
                region.as_ptr()
            );
            assert_eq!(region.size(), len);
        }
    }

    #[test]
    fn what_cannot_be_aligned_is_mapped_all_the_same() {
        let tried = Cell::new(0);
        // Two pages too many, so that it does not fit into the gap.
        let region = aligned(LEN, || {
            tried.set(tried.get() + 1);
            let mut region = map(LEN + 0x2000);
            while is_aligned(&region) {
                let filler = map(0x1000);
                region = map(LEN + 0x2000);
                drop(filler);
            }
            Ok::<_, ()>(region)
        });
        assert!(!is_aligned(&region.unwrap()));
        assert_eq!(tried.get(), 1 + ATTEMPTS);
    }

    #[test]
    fn an_error_is_passed_on() {
        assert_eq!(aligned(LEN, || Err::<MmapRegion, _>(7)).unwrap_err(), 7);
    }
}
