//! What the driver says about the guest's memory (virtio 1.3 §5.5.6.4).

use crate::virtio::{GuestRam, Segments};

/// A tag and a value, packed.
const ENTRY_LEN: usize = 10;
/// Linux sends 16. More is not read, so that no guest keeps the thread busy.
const MAX_ENTRIES: usize = 64;

/// Memory statistics of the guest; None where the driver did not say. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub swap_in: Option<u64>,
    pub swap_out: Option<u64>,
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    pub free: Option<u64>,
    pub total: Option<u64>,
    pub available: Option<u64>,
    pub disk_caches: Option<u64>,
    pub hugetlb_allocations: Option<u64>,
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Reads a buffer of the statistics queue. Tags that are not known are skipped, as is an entry
    /// cut short.
    pub(super) fn read(ram: &GuestRam, buffer: &mut Segments) -> Self {
        let mut statistics = Self::default();
        let mut entry = [0; ENTRY_LEN];
        for _ in 0..MAX_ENTRIES {
            if buffer.read(ram, &mut entry).is_err() {
                break;
            }
            let [a, b, value @ ..] = entry;
            statistics.set(u16::from_le_bytes([a, b]), u64::from_le_bytes(value));
        }
        statistics
    }

    /// Tags of `VIRTIO_BALLOON_S_*`, in order.
    fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            _ => return,
        };
        *field = Some(value);
    }
}
