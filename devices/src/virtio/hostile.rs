//! Guests that write anything anywhere: every device must survive them without a panic, and come
//! back from each turn.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::VirtioDevice;
use super::blk::{Blk, BlkConfig};
use super::console::{Console, Port};
use super::rng::Rng;
use super::testing::{Guest, LIVE, RAM_LEN};
use crate::bus::BusDevice;
use crate::host::{Input, Output};

/// Events a device may handle after each step. Rings laid over one another can make it find work
/// for ever, a little at a time.
const EVENTS: usize = 50;
/// No device here has more queues.
const QUEUES: u32 = 8;

#[derive(Clone, Debug)]
enum Step {
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

/// Addresses that are mostly somewhere, and now and then nowhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..RAM_LEN,
        // The first queues' areas and the edge between the two regions.
        4 => 0x1_0000..0x4_0000u64,
        2 => RAM_LEN / 2 - 16..RAM_LEN / 2 + 16,
        1 => RAM_LEN - 16..RAM_LEN + 16,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..64u32, 2 => Just(16), 2 => Just(512), 2 => 0..0x1_0000u32, 1 => any::<u32>()]
}

/// Few bytes, mostly as they occur in headers.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        prop::collection::vec(prop_oneof![4 => 0..16u8, 1 => any::<u8>()], 0..40),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    let describe = (0..QUEUES, 0..18u16, address(), length(), 0..8u32, 0..18u16);
    prop_oneof![
        2 => (0..0x200u64, 0..9usize).prop_map(|(offset, width)| Step::Read { offset, width }),
        2 => (0..0x200u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::Write { offset, data }),
        2 => (0..0x50u32, any::<u32>())
            .prop_map(|(index, value)| Step::Register { register: index * 4, value }),
        1 => (0..0x50u32, 0..256u32)
            .prop_map(|(index, value)| Step::Register { register: index * 4, value }),
        3 => (address(), bytes()).prop_map(|(start, bytes)| Step::Ram { start, bytes }),
        12 => describe.prop_map(|(queue, index, start, len, flags, next)| {
            Step::Describe { queue, index, start, len, flags, next }
        }),
        8 => (queue.clone(), 0..18u16).prop_map(|(queue, head)| Step::Publish { queue, head }),
        1 => (queue.clone(), any::<u16>()).prop_map(|(queue, value)| Step::Index { queue, value }),
        8 => queue.clone().prop_map(|queue| Step::Kick { queue }),
        3 => (any::<u64>(), 0..7u32)
            .prop_map(|(features, order)| Step::Start { features: features | 1 << 32, size: 1 << order }),
        2 => (queue, 0..3u32, any::<u32>(), 0..40u32)
            .prop_map(|(queue, area, start, size)| Step::Relocate { queue, area, start, size }),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => Just(Step::Drain),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..60)
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
            let index: u16 = ram.read_obj(GuestAddress(driver + 2)).unwrap();
            let slot = GuestAddress(driver + 4 + 2 * u64::from(index % 16));
            ram.write_obj(head, slot).unwrap();
            ram.write_obj(index.wrapping_add(1), GuestAddress(driver + 2))
                .unwrap();
        }
        Step::Index { queue, value } => {
            guest
                .ram()
                .write_obj(value, GuestAddress(areas(queue)[1] + 2))
                .unwrap();
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
        Step::Resume => guest.transport.resume().unwrap(),
        Step::Drain => guest.transport.drain(),
    }
}

/// Takes all steps, then finds a device that a good driver can still use.
fn survive(device: impl VirtioDevice + 'static, steps: Vec<Step>) {
    let mut guest = Guest::live(device);
    for step in steps {
        take(&mut guest, step);
        guest.runner.settle(EVENTS);
    }
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE);
    guest.settle();
}

fn disk(image: &TempFile, readonly: bool) -> Blk {
    Blk::open(BlkConfig {
        path: PathBuf::from(image.as_path()),
        readonly,
        direct: false,
        queues: 2,
        queue_size: 16,
        serial: "x".into(),
        name: "blk0".into(),
    })
    .unwrap()
}

fn console() -> Console {
    let (stdin, mut host) = io::pipe().unwrap();
    host.write_all(&[b'x'; 4096]).unwrap();
    let port = |input: Option<OwnedFd>| Port {
        name: "port".into(),
        console: input.is_some(),
        input: input.map(|fd| Input::new(fd).unwrap()),
        output: Some(Output::sink(Box::new(io::sink()))),
    };
    let console = Console::new(vec![port(Some(stdin.into())), port(None)]).unwrap();
    console.handle().resize(80, 25);
    console
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn the_entropy_device_survives_any_guest(steps in steps()) {
        survive(Rng::new(), steps);
    }

    #[test]
    fn a_disk_survives_any_guest_and_keeps_its_size(steps in steps(), readonly in any::<bool>()) {
        let image = TempFile::new().unwrap();
        image.as_file().set_len(1 << 16).unwrap();
        survive(disk(&image, readonly), steps);
        prop_assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 16);
    }

    #[test]
    fn the_console_survives_any_guest(steps in steps()) {
        survive(console(), steps);
    }
}
