//! Rings and chains of good and bad drivers, served by the entropy device.

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::*;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Buffer, Guest, LIVE, RAM_LEN};

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;
const NEEDS_RESET: u32 = 64;
/// RAM that no queue uses.
const SPARE: u64 = 8 << 20;

const NO_EVENT_IDX: u64 = !(1 << VIRTIO_RING_F_EVENT_IDX);

fn guest() -> Guest {
    Guest::live(Rng::new())
}

/// Writes descriptors 0, 1, ... of queue 0.
fn describe(guest: &Guest, descriptors: &[(u64, u32, u32, u16)]) {
    let table = guest.areas(0)[0];
    for (index, &(start, len, flags, next)) in (0..).zip(descriptors) {
        guest.write_descriptor(table, index, start, len, flags, next);
    }
}

/// What the device does with the chain at descriptor 0: the bytes it wrote, and whether it
/// counted the chain as bad.
fn outcome(guest: &mut Guest) -> (Option<u16>, u64) {
    guest.publish(0, 0);
    guest.kick(0);
    guest.settle();
    let head = guest.take_used(0).map(|(head, _)| head);
    (head, guest.counters().bad_chains.get())
}

#[test]
fn chains_that_are_not_well_formed_are_returned_and_counted() {
    let max = u16::MAX;
    let chains: [&[(u64, u32, u32, u16)]; 9] = [
        // It loops.
        &[(SPARE, 4, NEXT | WRITE, 1), (SPARE, 4, NEXT | WRITE, 0)],
        &[(SPARE, 4, NEXT | WRITE, 0)],
        // It goes on outside the table.
        &[(SPARE, 4, NEXT | WRITE, 16)],
        &[(SPARE, 4, NEXT | WRITE, max)],
        // It leaves RAM, at once, at the end, and by wrapping around.
        &[(RAM_LEN, 1, WRITE, 0)],
        &[(SPARE, 4, NEXT | WRITE, 1), (RAM_LEN - 1, 2, WRITE, 0)],
        &[(u64::MAX, 2, WRITE, 0)],
        // What may be read comes after what may be written.
        &[(SPARE, 4, NEXT | WRITE, 1), (SPARE, 4, 0, 0)],
        // Longer than any address space of 32 bits.
        &[(0, u32::MAX, NEXT, 1), (0, u32::MAX, WRITE, 0)],
    ];
    let outcomes = chains.map(|chain| {
        let mut guest = guest();
        describe(&guest, chain);
        outcome(&mut guest)
    });
    assert_eq!(outcomes, [(Some(0), 1); 9]);
}

#[test]
fn indirect_tables_that_are_not_well_formed_are_returned_and_counted() {
    let table = SPARE;
    let inner = SPARE + 0x10_0000;
    let outcomes = [
        // A table of no descriptors, of a fraction, of too many, and outside RAM.
        ((table, 0, INDIRECT, 0), (inner, 4, WRITE, 0)),
        ((table, 24, INDIRECT, 0), (inner, 4, NEXT | WRITE, 1)),
        ((table, 0x10_0000, INDIRECT, 0), (inner, 4, WRITE, 0)),
        ((RAM_LEN, 16, INDIRECT, 0), (inner, 4, WRITE, 0)),
        // A table in a table.
        ((table, 16, INDIRECT, 0), (table, 16, INDIRECT, 0)),
        // It loops in the table, and leaves it.
        ((table, 32, INDIRECT, 0), (inner, 4, NEXT | WRITE, 0)),
        ((table, 32, INDIRECT, 0), (inner, 4, NEXT | WRITE, 2)),
    ]
    .map(|(outer, (start, len, flags, next))| {
        let mut guest = guest();
        describe(&guest, &[outer]);
        guest.write_descriptor(table, 0, start, len, flags, next);
        outcome(&mut guest)
    });
    assert_eq!(outcomes, [(Some(0), 1); 7]);
}

#[test]
fn the_longest_chain_is_of_1024_descriptors() {
    let outcomes = [1024u16, 1025].map(|count| {
        let mut guest = guest();
        describe(&guest, &[(SPARE, u32::from(count) * 16, INDIRECT, 0)]);
        for index in 0..count {
            let flags = [WRITE | NEXT, WRITE][usize::from(index == count - 1)];
            guest.write_descriptor(SPARE, index, SPARE + 0x10_0000, 1, flags, index + 1);
        }
        outcome(&mut guest)
    });
    assert_eq!(outcomes, [(Some(0), 0), (Some(0), 1)]);
}

#[test]
fn empty_buffers_in_a_chain_are_skipped() {
    let mut guest = guest();
    let empty = (u64::MAX, 0, NEXT | WRITE, 1);
    describe(&guest, &[empty, (SPARE, 4, WRITE, 0)]);
    assert_eq!(outcome(&mut guest), (Some(0), 0));
    assert_eq!(guest.counters().bytes_in.get(), 4);
}

#[test]
fn a_head_outside_the_table_asks_for_a_reset() {
    let mut guest = guest();
    guest.publish(0, 16);
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    // There is no chain to return, so none is counted.
    assert_eq!(guest.counters().bad_chains.get(), 0);
    assert_eq!(guest.request(0, &[Buffer::In(4)]), None);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    guest.start(u64::MAX, 16);
    assert_eq!(guest.request(0, &[Buffer::In(4)]).unwrap().len(), 4);
}

#[test]
fn an_index_that_jumps_asks_for_a_reset() {
    let mut guest = guest();
    let driver_area = guest.areas(0)[1];
    guest
        .ram()
        .write_obj(17u16, GuestAddress(driver_area + 2))
        .unwrap();
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    assert_eq!(guest.counters().needs_reset.get(), 1);
}

#[test]
fn an_index_that_goes_back_asks_for_a_reset() {
    let mut guest = guest();
    guest.request(0, &[Buffer::In(4)]).unwrap();
    guest
        .ram()
        .write_obj(0u16, GuestAddress(guest.areas(0)[1] + 2))
        .unwrap();
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
}

#[test]
fn indices_wrap_around() {
    let mut guest = guest();
    let answers = (0..70_000).map(|_| guest.request(0, &[Buffer::In(1)]).unwrap().len());
    assert_eq!(answers.sum::<usize>(), 70_000);
}

#[test]
fn a_batch_interrupts_once() {
    for features in [u64::MAX, NO_EVENT_IDX] {
        let mut guest = Guest::new(Rng::new());
        guest.start(features, 16);
        let heads = [(); 16].map(|()| guest.add(0, &[Buffer::In(1)]).unwrap());
        guest.kick(0);
        guest.settle();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(heads.map(|_| guest.take_used(0).unwrap().0), heads);
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut guest = Guest::new(Rng::new());
    guest.start(NO_EVENT_IDX, 16);
    let flags = GuestAddress(guest.areas(0)[1]);
    guest.ram().write_obj(1u16, flags).unwrap();
    guest.request(0, &[Buffer::In(1)]).unwrap();
    assert_eq!(guest.interrupts(), 0);
    guest.ram().write_obj(0u16, flags).unwrap();
    guest.request(0, &[Buffer::In(1)]).unwrap();
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn a_driver_that_waits_for_a_later_event_is_not_interrupted_before() {
    let mut guest = guest();
    let used_event = GuestAddress(guest.areas(0)[1] + 4 + 2 * 16);
    // Wants to hear of the third chain from here.
    guest.ram().write_obj(2u16, used_event).unwrap();
    let interrupts = [(); 3].map(|()| {
        guest.add(0, &[Buffer::In(1)]).unwrap();
        guest.kick(0);
        guest.settle();
        guest.interrupts()
    });
    assert_eq!(interrupts, [0, 0, 1]);
}

#[test]
fn kicks_are_asked_for_only_while_the_device_waits() {
    let mut guest = Guest::new(Rng::new());
    guest.start(NO_EVENT_IDX, 16);
    guest.request(0, &[Buffer::In(1)]).unwrap();
    let flags: u16 = guest
        .ram()
        .read_obj(GuestAddress(guest.areas(0)[2]))
        .unwrap();
    assert_eq!(flags, 0);
    guest.start(u64::MAX, 16);
    guest.request(0, &[Buffer::In(1)]).unwrap();
    let avail_event = GuestAddress(guest.areas(0)[2] + 4 + 8 * 16);
    let asked: u16 = guest.ram().read_obj(avail_event).unwrap();
    assert_eq!(asked, 1);
}

/// A ring of four whose one descriptor is available once.
fn ring(ram: &GuestRam) -> Ring {
    let mut queue = Queue::new(4).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(0x1000))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(0x2000))
        .unwrap();
    queue.set_ready(true);
    queue.set_event_idx(true);
    ram.write_obj(0x3000u64, GuestAddress(0)).unwrap();
    make_available(ram, 1);
    let counters = Arc::new(Counters::default());
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Interrupt::new(irqfd, counters.clone());
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    Ring::new(0, queue, kick, interrupt, counters, usize::MAX)
}

fn ring_ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
}

fn make_available(ram: &GuestRam, count: u16) {
    ram.write_obj(count, GuestAddress(0x1002)).unwrap();
}

#[test]
fn a_guest_that_never_stops_does_not_hold_the_thread() {
    let ram = ring_ram();
    let mut ring = ring(&ram);
    let mut served = 0;
    let rested = ring.serve(&ram, |_| {
        served += 1;
        assert!(served < 100, "the thread is held");
        make_available(&ram, served + 1);
        0
    });
    assert_eq!((served, rested), (4, false));
    assert_eq!(
        ring.kick().read().unwrap(),
        1,
        "the ring comes back by itself"
    );
}

#[test]
fn slow_requests_do_not_hold_the_thread() {
    let ram = ring_ram();
    let mut ring = ring(&ram);
    make_available(&ram, 3);
    let mut served = 0;
    let mut turn = || {
        ring.serve(&ram, |_| {
            served += 1;
            std::thread::sleep(TURN);
            0
        })
    };
    assert_eq!([turn(), turn(), turn()], [false, false, true]);
    assert_eq!(served, 3);
}

#[test]
fn what_is_completed_does_not_wait_for_a_request_that_waits_for_a_disk() {
    let interrupts_before_each = |waits: bool| {
        let ram = ring_ram();
        let mut ring = ring(&ram);
        // The driver wants each interrupt.
        ring.queue.set_event_idx(false);
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        ring.interrupt = Interrupt::new(irq.try_clone().unwrap(), ring.counters.clone());
        make_available(&ram, 3);
        let mut before = Vec::new();
        ring.serve_within(
            &ram,
            &mut None,
            |_| waits,
            |_| {
                before.push(irq.read().is_ok());
                (0, Cost::of_bytes(0))
            },
        );
        assert!(irq.read().is_ok(), "there is one at the end");
        before
    };
    assert_eq!(interrupts_before_each(false), [false; 3]);
    assert_eq!(interrupts_before_each(true), [false, true, true]);
}
