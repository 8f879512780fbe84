//! One request of the driver: a chain of descriptors, checked as a whole before a device sees it.
//!
//! virtio-queue walks the table and refuses loops, indices and tables outside their bounds by
//! ending the walk early. Here an early end is told from a proper one, the order of readable and
//! writable parts is enforced, every buffer is known to lie in RAM, and all of them together are no
//! longer than the device can take.

use virtio_queue::DescriptorChain;

use super::{GuestRam, Segments};

/// The longest chain accepted. A driver that keeps to "a descriptor chain longer than the Queue
/// Size" being forbidden (virtio 1.3 §2.7.5.3.1) never meets it; Linux makes longer ones of
/// indirect descriptors, but none near this.
const MAX_DESCRIPTORS: usize = 1024;

/// The driver's request: what the device may read, then what it may write.
#[derive(Debug)]
#[must_use = "a chain that is neither completed nor put back is lost to the driver"]
pub struct Chain {
    pub(super) head: u16,
    pub readable: Segments,
    pub writable: Segments,
    /// Bytes the driver let the device write.
    pub(super) writable_len: usize,
}

/// The room of a chain that is done with, for the next one.
#[derive(Debug, Default)]
pub(super) struct Spare {
    readable: Segments,
    writable: Segments,
}

impl Chain {
    /// Checks the whole chain, which may have `max_len` bytes. One that is not well formed returns
    /// its room.
    pub(super) fn parse(
        ram: &GuestRam,
        descriptors: DescriptorChain<&GuestRam>,
        max_len: usize,
        spare: Spare,
    ) -> Result<Self, Spare> {
        let Spare {
            mut readable,
            mut writable,
        } = spare;
        readable.clear();
        writable.clear();
        let head = descriptors.head_index();
        match Self::collect(ram, descriptors, &mut readable, &mut writable) {
            Some(()) if readable.len().saturating_add(writable.len()) <= max_len => {
                let writable_len = writable.len();
                Ok(Self {
                    head,
                    readable,
                    writable,
                    writable_len,
                })
            }
            Some(()) | None => Err(Spare { readable, writable }),
        }
    }

    fn collect(
        ram: &GuestRam,
        descriptors: DescriptorChain<&GuestRam>,
        readable: &mut Segments,
        writable: &mut Segments,
    ) -> Option<()> {
        let mut ended = false;
        let mut seen_writable = false;
        for (count, descriptor) in descriptors.enumerate() {
            if count == MAX_DESCRIPTORS {
                return None;
            }
            ended = !descriptor.has_next();
            let segments = if descriptor.is_write_only() {
                seen_writable = true;
                &mut *writable
            } else if seen_writable {
                // "The driver MUST place any device-writable descriptor elements after any
                // device-readable descriptor elements" (virtio 1.3 §2.7.4.2).
                return None;
            } else {
                &mut *readable
            };
            segments
                .push(ram, descriptor.addr(), descriptor.len())
                .ok()?;
        }
        ended.then_some(())
    }

    pub(super) fn into_spare(self) -> Spare {
        Spare {
            readable: self.readable,
            writable: self.writable,
        }
    }
}
