//! A guest that follows no rules, step by step: for property tests and fuzzers of any device.

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Guest, LIVE};
use crate::bus::BusDevice;
use crate::virtio::VirtioDevice;

/// Events a device may handle after each step. Rings laid over one another can make it find work
/// for ever, a little at a time.
const EVENTS: usize = 50;
/// No device here has more queues.
pub const QUEUES: u32 = 8;

/// Where this driver puts queues.
const IN_RAM: &str = "the ring lies in RAM";

/// One thing a guest does that follows no rules.
#[derive(Clone, Debug)]
pub enum Step {
    Read {
        offset: u64,
        width: usize,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Register {
        register: u32,
        value: u32,
    },
    Ram {
        start: u64,
        bytes: Vec<u8>,
    },
    Describe {
        queue: u32,
        index: u16,
        start: u64,
        len: u32,
        flags: u32,
        next: u16,
    },
    Publish {
        queue: u32,
        head: u16,
    },
    Index {
        queue: u32,
        value: u16,
    },
    Kick {
        queue: u32,
    },
    Start {
        features: u64,
        size: u16,
    },
    /// Moves one area of a queue onto anything, before DRIVER_OK.
    Relocate {
        queue: u32,
        area: u32,
        start: u32,
        size: u32,
    },
    Pause,
    Resume,
    Drain,
}

/// Where the test driver puts the areas of a queue, whether or not it did.
fn areas(queue: u32) -> [u64; 3] {
    let base = 0x1_0000 * (u64::from(queue) + 1);
    [base, base + 0x8000, base + 0xa000]
}

fn take(guest: &mut Guest, step: Step) {
    match step {
        Step::Read { offset, width } => guest.transport.read(offset, &mut vec![0; width]),
        Step::Write { offset, data } => guest.transport.write(offset, &data),
        Step::Register { register, value } => guest.write(register, value),
        Step::Ram { start, bytes } => {
            // Outside RAM is as good as not at all.
            let _ = guest.ram().write(&bytes, GuestAddress(start));
        }
        Step::Describe {
            queue,
            index,
            start,
            len,
            flags,
            next,
        } => {
            guest.write_descriptor(areas(queue)[0], index, start, len, flags, next);
        }
        Step::Publish { queue, head } => {
            let [_, driver, _] = areas(queue);
            let ram = guest.ram();
            let index: u16 = ram.read_obj(GuestAddress(driver + 2)).expect(IN_RAM);
            let slot = GuestAddress(driver + 4 + 2 * u64::from(index % 16));
            ram.write_obj(head, slot).expect(IN_RAM);
            ram.write_obj(index.wrapping_add(1), GuestAddress(driver + 2))
                .expect(IN_RAM);
        }
        Step::Index { queue, value } => {
            guest
                .ram()
                .write_obj(value, GuestAddress(areas(queue)[1] + 2))
                .expect(IN_RAM);
        }
        Step::Kick { queue } => guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue),
        Step::Start { features, size } => guest.start(features, size),
        Step::Relocate {
            queue,
            area,
            start,
            size,
        } => {
            guest.negotiate(u64::MAX);
            guest.set_up_queues(16);
            guest.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
            // Descriptor, driver and device area are 16 bytes apart, from 0x80.
            guest.write(0x80 + area * 16, (start % 0x100_0000) & !0xf);
            guest.write(0x38, size);
            guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
            guest.write(VIRTIO_MMIO_STATUS, LIVE);
        }
        Step::Pause => guest.transport.pause(),
        Step::Resume => guest.transport.resume().expect("resume"),
        Step::Drain => guest.transport.drain(),
    }
}

/// Takes all steps, then finds a device that a good driver can still use.
pub fn survive(device: impl VirtioDevice + 'static, steps: impl IntoIterator<Item = Step>) {
    let mut guest = Guest::live(device);
    for step in steps {
        take(&mut guest, step);
        guest.runner.settle(EVENTS);
    }
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE);
    guest.settle();
}

/// Where and how much a fuzzer may choose: mostly what means something.
#[cfg(feature = "test-utils")]
mod fuzzing {
    use arbitrary::{Arbitrary, Result, Unstructured};

    use super::{QUEUES, Step};
    use crate::virtio::testing::RAM_LEN;

    impl<'a> Arbitrary<'a> for Step {
        fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
            Ok(match u.int_in_range(0..=15)? {
                0 => Self::Read {
                    offset: u.int_in_range(0..=0x1ff)?,
                    width: u.int_in_range(0..=8)?,
                },
                1 => Self::Write {
                    offset: u.int_in_range(0..=0x1ff)?,
                    data: bytes(u, 8)?,
                },
                2 => Self::Register {
                    register: u.int_in_range(0..=0x4f)? * 4,
                    value: u.arbitrary()?,
                },
                3 | 4 => Self::Ram {
                    start: address(u)?,
                    bytes: bytes(u, 512)?,
                },
                5..=7 => Self::Describe {
                    queue: queue(u)?,
                    index: u.int_in_range(0..=17)?,
                    start: address(u)?,
                    len: length(u)?,
                    flags: u.int_in_range(0..=7)?,
                    next: u.int_in_range(0..=17)?,
                },
                8 | 9 => Self::Publish {
                    queue: queue(u)?,
                    head: u.int_in_range(0..=17)?,
                },
                10 => Self::Index {
                    queue: queue(u)?,
                    value: u.arbitrary()?,
                },
                11 | 12 => Self::Kick { queue: queue(u)? },
                13 => Self::Start {
                    features: u.arbitrary::<u64>()? | 1 << 32,
                    size: 1 << u.int_in_range(0..=6)?,
                },
                14 => Self::Relocate {
                    queue: queue(u)?,
                    area: u.int_in_range(0..=2)?,
                    start: u.arbitrary()?,
                    size: u.int_in_range(0..=39)?,
                },
                _ => [Self::Pause, Self::Resume, Self::Drain][u.choose_index(3)?].clone(),
            })
        }
    }

    fn queue(u: &mut Unstructured<'_>) -> Result<u32> {
        u.int_in_range(0..=QUEUES - 1)
    }

    fn address(u: &mut Unstructured<'_>) -> Result<u64> {
        if u.ratio(15, 16)? {
            u.int_in_range(0..=RAM_LEN)
        } else {
            u.arbitrary()
        }
    }

    fn length(u: &mut Unstructured<'_>) -> Result<u32> {
        if u.ratio(15, 16)? {
            u.int_in_range(0..=0xffff)
        } else {
            u.arbitrary()
        }
    }

    fn bytes(u: &mut Unstructured<'_>, most: usize) -> Result<Vec<u8>> {
        let len = u.int_in_range(0..=most)?.min(u.len());
        Ok(u.bytes(len)?.to_vec())
    }
}
