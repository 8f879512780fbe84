//! Where RAM lies in the guest's physical address space: from 0 up to the MMIO
//! hole, and what does not fit there from 4 GiB on.

use vm_memory::{Address, GuestAddress};

use crate::layout::{HIGH_RAM_START, MMIO_HOLE_START};

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address.
    pub start: GuestAddress,
    /// Length in bytes, never 0.
    pub len_bytes: u64,
}

impl RamRange {
    /// The first address past the range.
    pub fn end(&self) -> GuestAddress {
        self.start.unchecked_add(self.len_bytes)
    }
}

/// Splits `size_bytes` of RAM around the MMIO hole, in address order.
pub fn ranges(size_bytes: u64) -> Vec<RamRange> {
    let low = size_bytes.min(MMIO_HOLE_START.raw_value());
    let mut ranges = vec![RamRange {
        start: GuestAddress(0),
        len_bytes: low,
    }];
    if size_bytes > low {
        ranges.push(RamRange {
            start: HIGH_RAM_START,
            len_bytes: size_bytes - low,
        });
    }
    ranges
}

/// Linux handles memory in blocks of at most this, and plugs only whole ones.
const HOTPLUG_ALIGNMENT: u64 = 2 << 30;

/// Where memory can be plugged, beside `size_bytes` of RAM: past all of it, and never below 4 GiB.
pub fn hotplug_start(size_bytes: u64) -> GuestAddress {
    let end = ranges(size_bytes)
        .last()
        .map_or(HIGH_RAM_START, RamRange::end)
        .max(HIGH_RAM_START);
    GuestAddress(end.raw_value().next_multiple_of(HOTPLUG_ALIGNMENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_is_plugged_past_all_ram_on_a_block_of_linux() {
        let starts = [512 << 20, 3 * GIB, 4 * GIB, 5 * GIB, 6 * GIB].map(hotplug_start);
        assert_eq!(starts, [4, 4, 6, 6, 8].map(|gib| GuestAddress(gib * GIB)));
    }

    #[test]
    fn ram_below_the_hole_is_one_range() {
        assert_eq!(
            ranges(512 << 20),
            [RamRange {
                start: GuestAddress(0),
                len_bytes: 512 << 20
            }]
        );
    }

    #[test]
    fn ram_that_just_fills_the_space_below_the_hole_is_one_range() {
        assert_eq!(
            ranges(3 * GIB),
            [RamRange {
                start: GuestAddress(0),
                len_bytes: 3 * GIB
            }]
        );
    }

    #[test]
    fn ram_past_the_hole_continues_at_4_gib() {
        assert_eq!(
            ranges(5 * GIB),
            [
                RamRange {
                    start: GuestAddress(0),
                    len_bytes: 3 * GIB
                },
                RamRange {
                    start: GuestAddress(4 * GIB),
                    len_bytes: 2 * GIB
                },
            ]
        );
        assert_eq!(ranges(5 * GIB)[1].end(), GuestAddress(6 * GIB));
    }
}
