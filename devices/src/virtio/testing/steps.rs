//! A guest that follows no rules, step by step: for property tests and fuzzers of any device.

use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Buffer, Guest, LIVE, Wiring};
use crate::virtio::VirtioDevice;

/// Events a device may handle after each step. Rings laid over one another can make it find work
/// for ever, a little at a time.
pub(super) const EVENTS: usize = 50;
/// The most time of the processor that a device may take for the events due at once: a turn for each of
/// a few, and more than any request may take, also with a sanitizer.
pub(super) const MAX_WORK: Duration = Duration::from_secs(1);
/// Where a mebibyte of numbers of pages is at first.
pub const NUMBERS: u64 = 6 << 20;
/// Where a step writes a long table: where buffers may be too.
const TABLE: u64 = 14 << 20;
/// More descriptors than a chain may have.
const MAX_REPEATS: u16 = 1100;
/// The most queues of a device here.
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
    /// Makes a request that names one buffer very often: so many times for the device to read, then
    /// so many times for it to write.
    Repeat {
        queue: u32,
        start: u64,
        len: u32,
        readable: u16,
        writable: u16,
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
        Step::Repeat {
            queue,
            start,
            len,
            readable,
            writable,
        } => {
            let count = readable.saturating_add(writable).clamp(1, MAX_REPEATS);
            for index in 0..count {
                let (next, more) = match index + 1 < count {
                    true => (index + 1, VRING_DESC_F_NEXT),
                    false => (0, 0),
                };
                let write = if index < readable {
                    0
                } else {
                    VRING_DESC_F_WRITE
                };
                guest.write_descriptor(TABLE, index, start, len, write | more, next);
            }
            let [table, ..] = areas(queue);
            let bytes = u32::from(count) * 16;
            guest.write_descriptor(table, 0, TABLE, bytes, VRING_DESC_F_INDIRECT, 0);
            publish(guest, queue, 0);
            guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
        }
        Step::Publish { queue, head } => publish(guest, queue, head),
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
        Step::Pause => guest.transport.pause().expect("nothing is under way"),
        Step::Resume => guest.transport.resume().expect("resume"),
        Step::Drain => guest.transport.drain(),
    }
}

fn publish(guest: &Guest, queue: u32, head: u16) {
    let [_, driver, _] = areas(queue);
    let ram = guest.ram();
    let index: u16 = ram.read_obj(GuestAddress(driver + 2)).expect(IN_RAM);
    let slot = GuestAddress(driver + 4 + 2 * u64::from(index % 16));
    ram.write_obj(head, slot).expect(IN_RAM);
    ram.write_obj(index.wrapping_add(1), GuestAddress(driver + 2))
        .expect(IN_RAM);
}

/// Takes all steps, then finds a device that a good driver can still use, and which answers whatever
/// is in the queues `served`: those where a request waits for nothing on the host. No step may keep
/// the device busy for long.
pub fn survive(
    device: impl VirtioDevice + 'static,
    served: &[usize],
    steps: impl IntoIterator<Item = Step>,
) {
    survive_on(Wiring::Mmio, device, served, steps);
}

/// Like [`survive`], over a transport of choice.
pub fn survive_on(
    wiring: Wiring,
    device: impl VirtioDevice + 'static,
    served: &[usize],
    steps: impl IntoIterator<Item = Step>,
) {
    let mut guest = Guest::new_on(wiring, device);
    guest.start(u64::MAX, 16);
    // Pages of RAM, no two of them in a row, so that each is work.
    let page = |n: u32| (2048 + n * 2 % 1024).to_le_bytes();
    let numbers: Vec<u8> = (0..1 << 18).flat_map(page).collect();
    guest
        .ram()
        .write_slice(&numbers, GuestAddress(NUMBERS))
        .expect(IN_RAM);
    for step in steps {
        let taken = step.clone();
        take(&mut guest, step);
        guest.runner.settle(EVENTS);
        let longest = guest.runner.longest();
        assert!(longest < MAX_WORK, "{taken:?} took {longest:?}");
    }
    for features in [!(1 << VIRTIO_RING_F_EVENT_IDX), u64::MAX] {
        guest.start(features, 16);
        assert_eq!(guest.status(), LIVE);
        guest.settle();
        for &queue in served {
            is_served(&mut guest, queue);
        }
    }
}

/// Fills the queue a few times over, and notifies the device only when that asks for it.
fn is_served(guest: &mut Guest, queue: usize) {
    for _ in 0..8 {
        let mut added = 0;
        loop {
            let wanted = guest.is_to_kick(queue);
            let request = [Buffer::Out(vec![0; 64]), Buffer::In(64)];
            if guest.add(queue, &request).is_none() {
                break;
            }
            added += 1;
            if wanted {
                guest.kick(queue);
            }
        }
        assert!(added > 0, "queue {queue} has room");
        guest.settle();
        let answered = std::iter::from_fn(|| guest.take(queue)).count();
        assert_eq!(answered, added, "queue {queue} is served");
    }
}

/// Where and how much a fuzzer may choose: mostly what means something.
#[cfg(feature = "test-utils")]
mod fuzzing {
    use arbitrary::{Arbitrary, Result, Unstructured};

    use super::{MAX_REPEATS, NUMBERS, QUEUES, Step};
    use crate::virtio::testing::RAM_LEN;

    impl<'a> Arbitrary<'a> for Step {
        fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
            Ok(match u.int_in_range(0..=16)? {
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
                15 => Self::Repeat {
                    queue: queue(u)?,
                    start: match u.ratio(1, 2)? {
                        true => NUMBERS,
                        false => address(u)?,
                    },
                    len: match u.ratio(1, 2)? {
                        true => 1 << u.int_in_range(0..=24)?,
                        false => length(u)?,
                    },
                    readable: u.int_in_range(0..=MAX_REPEATS / 2)?,
                    writable: u.int_in_range(0..=MAX_REPEATS / 2)?,
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
