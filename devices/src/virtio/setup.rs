//! What the driver has said about a queue, before anything of it is believed.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::GuestRam;

/// One half of an address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Low,
    High,
}

/// Which of a queue's three areas an address is for (virtio 1.3 §2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    Descriptors,
    Driver,
    Device,
}

/// The registers of one queue, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) ready: bool,
    size: u32,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            ready: false,
            size: max_size.into(),
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }

    pub(super) fn set_size(&mut self, size: u32) {
        self.size = size;
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    pub(super) fn address(&self, area: Area, half: Half) -> u32 {
        let address = match area {
            Area::Descriptors => self.descriptors,
            Area::Driver => self.driver,
            Area::Device => self.device,
        };
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        u32::from_le_bytes(match half {
            Half::Low => [a, b, c, d],
            Half::High => [e, f, g, h],
        })
    }

    pub(super) fn set_address(&mut self, area: Area, half: Half, value: u32) {
        let address = match area {
            Area::Descriptors => &mut self.descriptors,
            Area::Driver => &mut self.driver,
            Area::Device => &mut self.device,
        };
        *address = match half {
            Half::Low => *address & !0xffff_ffff | u64::from(value),
            Half::High => *address & 0xffff_ffff | u64::from(value) << 32,
        };
    }

    /// The queue, if it is what the specification allows: a power of two of descriptors that does
    /// not exceed the maximum, each area aligned and wholly in RAM.
    pub(super) fn build(&self, ram: &GuestRam, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // Sizes of virtio 1.3 §2.7, event index included. virtio-queue takes address 0 of the
        // driver area for unset.
        let size = usize::from(queue.size());
        let areas = [
            (self.descriptors, 16 * size, Permissions::Read),
            (self.driver, 6 + 2 * size, Permissions::Read),
            (self.device, 6 + 8 * size, Permissions::Write),
        ];
        let in_ram = |&(start, len, access): &_| ram.check_range(GuestAddress(start), len, access);
        (self.driver != 0 && areas.iter().all(in_ram)).then_some(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    fn setup(size: u32, descriptors: u64, driver: u64, device: u64) -> QueueSetup {
        QueueSetup {
            max_size: 256,
            ready: true,
            size,
            descriptors,
            driver,
            device,
        }
    }

    #[test]
    fn a_queue_in_ram_is_built_as_told() {
        let queue = setup(16, 0x1000, 0x2000, 0x3000)
            .build(&ram(), true)
            .unwrap();
        assert_eq!((queue.size(), queue.max_size()), (16, 256));
        assert_eq!((queue.desc_table(), queue.avail_ring()), (0x1000, 0x2000));
        assert_eq!(queue.used_ring(), 0x3000);
        assert!(queue.event_idx_enabled());
    }

    #[test]
    fn a_size_that_is_not_a_power_of_two_up_to_the_maximum_is_refused() {
        let sizes = [0, 3, 512, 0x1_0010, u32::MAX];
        let built = sizes.map(|size| setup(size, 0x1000, 0x2000, 0x3000).build(&ram(), false));
        assert_eq!(built, [const { None }; 5]);
    }

    #[test]
    fn an_area_that_is_misaligned_or_leaves_ram_is_refused() {
        let setups = [
            setup(16, 0x1008, 0x2000, 0x3000),
            setup(16, 0x1000, 0x2001, 0x3000),
            setup(16, 0x1000, 0x2000, 0x3002),
            setup(16, 0xfff0, 0x2000, 0x3000),
            setup(16, 0x1000, 0xfffe, 0x3000),
            setup(16, 0x1000, 0x2000, 0xfffc),
            setup(16, 0x1000, 0x2000, 0xffff_ffff_ffff_fffc),
            setup(16, 0x1000, 0, 0x3000),
        ];
        let built = setups.map(|setup| setup.build(&ram(), false));
        assert_eq!(built, [const { None }; 8]);
    }

    #[test]
    fn an_address_is_written_in_halves() {
        let mut setup = QueueSetup::new(8);
        setup.set_address(Area::Driver, Half::High, 0x1234_5678);
        setup.set_address(Area::Driver, Half::Low, 0x9abc_def0);
        assert_eq!(setup.driver, 0x1234_5678_9abc_def0);
        setup.set_address(Area::Driver, Half::High, 0);
        assert_eq!(setup.driver, 0x9abc_def0);
    }
}
