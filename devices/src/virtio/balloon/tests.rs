use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{Balloon, BalloonConfig, BalloonHandle, PAGE_BYTES};
use crate::virtio::testing::{Buffer, Guest, RAM_LEN, Table, lifecycle};

fn balloon() -> Balloon {
    Balloon::new(BalloonConfig {
        size: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    })
    .unwrap()
}

fn live() -> (Guest, BalloonHandle) {
    let balloon = balloon();
    let handle = balloon.handle();
    (Guest::live(balloon), handle)
}

fn pages(numbers: &[u32]) -> Buffer {
    Buffer::Out(numbers.iter().flat_map(|n| n.to_le_bytes()).collect())
}

/// The last pages of RAM, which nothing else uses.
fn page(index: u64) -> u32 {
    u32::try_from(RAM_LEN / PAGE_BYTES - 64 + index).unwrap()
}

fn fill(guest: &Guest) {
    let start = GuestAddress(u64::from(page(0)) * PAGE_BYTES);
    let ram = guest.memory.memory();
    ram.write_slice(&[9; 64 * 4096], start).unwrap();
}

/// Of the last 64 pages those that are zero.
fn zeros(guest: &Guest) -> Vec<u64> {
    let ram = guest.memory.memory();
    (0..64)
        .filter(|&index| {
            let start = GuestAddress(u64::from(page(index)) * PAGE_BYTES);
            ram.read_obj::<u8>(start).unwrap() == 0
        })
        .collect()
}

#[test]
fn inflated_pages_are_given_back_in_any_order() {
    let (mut guest, _) = live();
    fill(&guest);
    let given = [page(5), page(3), page(4), page(60), page(3)];
    guest.request(0, &[pages(&given)]).unwrap();
    assert_eq!(zeros(&guest), [3, 4, 5, 60]);
    guest.request(1, &[pages(&given)]).unwrap();
    assert_eq!(zeros(&guest), [3, 4, 5, 60]);
}

#[test]
fn pages_outside_ram_and_cut_numbers_do_nothing() {
    let (mut guest, _) = live();
    fill(&guest);
    let outside = u32::try_from(RAM_LEN / PAGE_BYTES).unwrap();
    guest
        .request(0, &[pages(&[outside, u32::MAX, u32::MAX - 1])])
        .unwrap();
    guest.request(0, &[Buffer::Out(vec![0; 3])]).unwrap();
    assert!(zeros(&guest).is_empty());
    assert!(guest.counters().errors.get() > 0);
}

#[test]
fn a_run_that_begins_in_ram_and_ends_outside_is_given_back_as_far_as_it_goes() {
    let (mut guest, _) = live();
    fill(&guest);
    guest.request(0, &[pages(&[page(63), page(64)])]).unwrap();
    assert_eq!(zeros(&guest), [63]);
}

#[test]
fn reported_buffers_are_given_back_by_whole_pages() {
    let (mut guest, _) = live();
    fill(&guest);
    // Chains of the test's driver lie where it likes; this one is written by hand.
    let start = u64::from(page(10)) * PAGE_BYTES - 8;
    guest.add_at(3, start, 3 * 4096).unwrap();
    guest.kick(3);
    guest.settle();
    assert_eq!(zeros(&guest), [10, 11]);
}

#[test]
fn the_driver_is_told_of_a_target_and_tells_what_it_gave() {
    let (mut guest, handle) = live();
    handle.set_target(3 * PAGE_BYTES + 1).unwrap();
    guest.settle();
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.config::<8>(0), [3, 0, 0, 0, 0, 0, 0, 0]);
    guest.write(0x104, 2);
    assert_eq!(
        (handle.target(), handle.actual()),
        (3 * PAGE_BYTES, 2 * PAGE_BYTES)
    );
}

fn statistics(free: u64) -> Buffer {
    let mut bytes = vec![4, 0];
    bytes.extend(free.to_le_bytes());
    bytes.extend([99, 0, 1, 1, 1, 1, 1, 1, 1, 1, 6]);
    Buffer::Out(bytes)
}

#[test]
fn statistics_are_asked_for_by_returning_their_buffer() {
    let (mut guest, handle) = live();
    assert_eq!(handle.statistics(), None);
    guest.settle();
    guest.add(2, &[statistics(1000)]).unwrap();
    guest.kick(2);
    guest.settle();
    assert_eq!(guest.take(2), None, "the buffer is kept");
    let first = handle.statistics().unwrap();
    assert_eq!((first.free, first.available), (Some(1000), None));
    guest.settle();
    assert_eq!(guest.take(2), Some(vec![]), "and returned when asked");
    guest.request(2, &[statistics(2000)]);
    assert_eq!(handle.statistics().unwrap().free, Some(2000));
    guest.settle();
    assert_eq!(guest.take(2), Some(vec![]));
}

#[test]
fn a_statistics_buffer_that_waits_survives_a_move() {
    let (mut guest, _) = live();
    guest.add_by(Table::Direct, 2, &[statistics(5)]).unwrap();
    guest.kick(2);
    guest.settle();
    let balloon = balloon();
    let handle = balloon.handle();
    let mut guest = guest.move_to(|| balloon);
    guest.transport.resume().unwrap();
    guest.settle();
    handle.statistics();
    guest.settle();
    assert_eq!(guest.take(2), Some(vec![]));
}

#[test]
fn the_device_lives_through_pause_and_reset() {
    lifecycle(balloon, |guest| {
        fill(guest);
        guest.request(0, &[pages(&[page(1)])]).unwrap();
        assert_eq!(zeros(guest), [1]);
    });
}

/// Writes a table of `count` descriptors that all name the same megabyte from `start`.
fn name_often(guest: &mut Guest, queue: usize, count: u16, start: u64) {
    let table = 8 << 20;
    for index in 0..count {
        let (more, next) = match index + 1 < count {
            true => (VRING_DESC_F_NEXT, index + 1),
            false => (0, 0),
        };
        guest.write_descriptor(table, index, start, 1 << 20, more, next);
    }
    let base = guest.areas(queue)[0];
    let len = u32::from(count) * 16;
    guest.write_descriptor(base, 0, table, len, VRING_DESC_F_INDIRECT, 0);
    guest.publish(queue, 0);
    guest.kick(queue);
    guest.settle();
}

#[test]
fn a_request_that_names_pages_without_end_gives_none_back() {
    let (mut guest, _) = live();
    let numbers = 9 << 20;
    // Every second page, so that each takes a call.
    let every_second = |index: u32| (1536 + index * 2 % 512).to_le_bytes();
    let bytes: Vec<u8> = (0..1 << 18).flat_map(every_second).collect();
    guest
        .ram()
        .write_slice(&bytes, GuestAddress(numbers))
        .unwrap();
    name_often(&mut guest, 0, 16, numbers);
    assert_eq!(guest.take(0), Some(vec![]));
    assert_eq!(guest.counters().bytes_out.get(), 0);
    assert_eq!(guest.counters().bad_chains.get(), 1);
    assert_eq!(guest.status(), crate::virtio::testing::LIVE);
}
