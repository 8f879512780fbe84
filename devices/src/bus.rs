//! Where in an address space which device answers.
//!
//! One [`Bus`] serves the ports and another the MMIO holes. It changes only when a guest moves a PCI
//! device's memory, so its lock, held while a device is looked up, is one of readers; each device
//! has its own, held for one access.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// What a read finds where no device answers: an undriven bus floats high.
const FLOATING: u8 = 0xff;

/// A device reached by loads and stores, or by port reads and writes.
///
/// `offset` counts from the start of the device's range, and the access lies wholly inside it.
/// Both run on a vCPU thread and with the device's lock held: they must not block for long.
pub trait BusDevice: Send {
    /// Fills `data`, which arrives zeroed.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("device range at {base:#x} is empty or ends outside the address space")]
    BadRange { base: u64, len: u64 },
    #[error("device range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
    Overlap {
        base: u64,
        len: u64,
        other_base: u64,
        other_len: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Address ranges that never overlap, and the device behind each.
#[derive(Default)]
pub struct Bus {
    /// The ranges and devices, by first address.
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at `base` and the `len - 1` addresses after it.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|extent| base.checked_add(extent))
            .ok_or(BusError::BadRange { base, len })?;
        // Ranges do not overlap, so of those starting at or before `last` the closest one is the
        // only one that could reach into the new range.
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other_base, other)) = entries.range(..=last).next_back()
            && base - other_base.min(base) < other.len
        {
            return Err(BusError::Overlap {
                base,
                len,
                other_base,
                other_len: other.len,
            });
        }
        entries.insert(base, Entry { len, device });
        Ok(())
    }

    /// No device answers any more in the range that begins at `base`.
    pub fn remove(&self, base: u64) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(&base);
    }

    fn entries(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from whichever device covers the whole access. Says whether there was one; if not,
    /// `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                data.fill(0);
                device.lock().expect(UNPOISONED).read(offset, data);
                true
            }
            None => {
                data.fill(FLOATING);
                false
            }
        }
    }

    /// Writes to whichever device covers the whole access. Says whether there was one.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().expect(UNPOISONED).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let entries = self.entries();
        let (&base, entry) = entries.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (end <= entry.len).then(|| (offset, entry.device.clone()))
    }
}

const UNPOISONED: &str = "a panic ends the process, so no lock is poisoned";

impl Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries();
        let ranges = entries.iter().map(|(base, entry)| (base, entry.len));
        f.debug_map().entries(ranges).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    fn bus_with(base: u64, len: u64) -> (Bus, Arc<Mutex<Recorder>>) {
        let bus = Bus::new();
        let device = device();
        bus.insert(base, len, device.clone()).unwrap();
        (bus, device)
    }

    #[test]
    fn a_device_sees_offsets_from_its_own_start() {
        let (bus, device) = bus_with(0x3f8, 8);
        assert!(bus.write(0x3fb, &[7]));
        let mut data = [0xaa; 2];
        assert!(bus.read(0x3fa, &mut data));
        assert_eq!(data, [2, 0]);
        assert_eq!(device.lock().unwrap().writes, [(3, vec![7])]);
    }

    #[test]
    fn a_read_of_nothing_is_all_ones() {
        let (bus, _) = bus_with(0x3f8, 8);
        let mut data = [0; 4];
        assert!(!bus.read(0x400, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.read(0, &mut data));
        assert!(!bus.write(0x400, &[1]));
    }

    #[test]
    fn a_range_that_is_removed_can_be_anothers() {
        let (bus, _) = bus_with(0x1000, 0x1000);
        bus.remove(0x1800);
        assert!(bus.write(0x1000, &[1]), "no range begins there");
        bus.remove(0x1000);
        assert!(!bus.write(0x1000, &[1]));
        bus.insert(0x1800, 0x1000, device()).unwrap();
        assert!(bus.write(0x27ff, &[1]));
    }

    #[test]
    fn an_access_across_a_devices_end_is_refused() {
        let (bus, device) = bus_with(0x1000, 0x1000);
        assert!(!bus.write(0x1ffe, &[0; 4]));
        assert!(!bus.read(0x1fff, &mut [0; 2]));
        assert!(bus.write(0x1ffc, &[0; 4]));
        assert_eq!(device.lock().unwrap().writes.len(), 1);
    }

    #[test]
    fn an_access_at_the_end_of_the_address_space_is_survived() {
        let (bus, _) = bus_with(u64::MAX - 7, 8);
        assert!(bus.write(u64::MAX, &[0]));
        assert!(!bus.write(u64::MAX, &[0; 8]));
    }

    #[test]
    fn ranges_never_overlap_and_the_error_names_both() {
        let (bus, _) = bus_with(0x1000, 0x1000);
        let overlap = |base, len| {
            Err(BusError::Overlap {
                base,
                len,
                other_base: 0x1000,
                other_len: 0x1000,
            })
        };
        assert_eq!(bus.insert(0x1000, 1, device()), overlap(0x1000, 1));
        assert_eq!(bus.insert(0x1fff, 1, device()), overlap(0x1fff, 1));
        assert_eq!(bus.insert(0x0fff, 2, device()), overlap(0x0fff, 2));
        assert_eq!(bus.insert(0, 0x10_0000, device()), overlap(0, 0x10_0000));
        assert_eq!(
            bus.insert(0x1800, 0x10, device()).unwrap_err().to_string(),
            "device range 0x1800+0x10 overlaps 0x1000+0x1000"
        );
        bus.insert(0x2000, 1, device()).unwrap();
        bus.insert(0x0fff, 1, device()).unwrap();
    }

    #[test]
    fn a_range_that_is_empty_or_wraps_is_refused() {
        let bus = Bus::new();
        assert_eq!(
            bus.insert(5, 0, device()),
            Err(BusError::BadRange { base: 5, len: 0 })
        );
        assert_eq!(
            bus.insert(u64::MAX, 2, device()),
            Err(BusError::BadRange {
                base: u64::MAX,
                len: 2
            })
        );
        bus.insert(u64::MAX, 1, device()).unwrap();
    }
}
