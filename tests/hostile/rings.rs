//! Rings and chains that are not as the driver must make them (virtio 1.3 §2.7, Split Virtqueues), on
//! each queue that a device looks at.

use std::thread;
use std::time::{Duration, Instant};

use crate::driver::{
    BUFFERS, Driver, F_EVENT_IDX, F_INDIRECT, INDIRECT, LIVE, NEEDS_RESET, NEXT, QUEUE_NOTIFY,
    SIZE, TABLES, WRITE, descriptor_bytes,
};
use crate::puppet::Step;
use crate::rig::RAM_BYTES;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

/// What a guest does to a queue.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Makes a chain available that begins with the first of these.
    Chain(&'static [Descriptor]),
    /// The same, with these in a table that an indirect descriptor of this length in bytes names.
    Table(&'static [Descriptor], u32),
    Do(fn(&Driver<'_>, u16)),
}

/// What is to come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// So many chains come back, the last one with nothing written.
    Returned(u16),
    Reset,
    /// The device takes it for nothing.
    Silent,
    /// It may come back, or be taken for nothing, or the device asks for a reset.
    Any,
}

use Act::{Chain, Do, Table};
use Expect::{Any, Reset, Returned, Silent};

type Case = (&'static str, Act, Expect);

const B: u64 = BUFFERS;
/// Behind all RAM, plugged memory included.
const BEYOND: u64 = 1 << 40;

const CHAINS: [Case; 30] = [
    (
        "a descriptor follows itself",
        Chain(&[(B, 16, NEXT, 0)]),
        Returned(1),
    ),
    (
        "two descriptors follow each other",
        Chain(&[(B, 16, NEXT, 1), (B, 16, NEXT, 0)]),
        Returned(1),
    ),
    (
        "a loop behind a proper start",
        Chain(&[(B, 16, NEXT, 1), (B, 16, NEXT, 2), (B, 16, NEXT, 1)]),
        Returned(1),
    ),
    (
        "a writable loop",
        Chain(&[(B, 16, NEXT | WRITE, 1), (B, 16, NEXT | WRITE, 0)]),
        Returned(1),
    ),
    ("a loop of all descriptors", Do(loop_of_all), Returned(1)),
    (
        "a loop of empty buffers",
        Chain(&[(B, 0, NEXT, 1), (B, 0, NEXT, 0)]),
        Returned(1),
    ),
    (
        "next is the queue's size",
        Chain(&[(B, 16, NEXT, SIZE)]),
        Returned(1),
    ),
    (
        "next is the largest number",
        Chain(&[(B, 16, NEXT, u16::MAX)]),
        Returned(1),
    ),
    (
        "the second's next is too large",
        Chain(&[(B, 16, NEXT, 1), (B, 16, NEXT, 0x100)]),
        Returned(1),
    ),
    (
        "a buffer right behind RAM",
        Chain(&[(RAM_BYTES, 1, 0, 0)]),
        Returned(1),
    ),
    (
        "a writable buffer right behind RAM",
        Chain(&[(RAM_BYTES, 1, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer across the end of RAM",
        Chain(&[(RAM_BYTES - 8, 16, 0, 0)]),
        Returned(1),
    ),
    (
        "a writable buffer across the end of RAM",
        Chain(&[(RAM_BYTES - 8, 16, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer in the device's window",
        Do(|driver, queue| chained(driver, queue, &[(driver.window, 4, 0, 0)])),
        Returned(1),
    ),
    (
        "a writable buffer in the device's window",
        Do(|driver, queue| chained(driver, queue, &[(driver.window + 16, 4, WRITE, 0)])),
        Returned(1),
    ),
    (
        "a buffer in the IOAPIC",
        Chain(&[(0xfec0_0000, 4, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer in the local APIC",
        Chain(&[(0xfee0_0300, 4, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer at the end of 32 bits",
        Chain(&[(0xffff_ffff, 1, 0, 0)]),
        Returned(1),
    ),
    (
        "a buffer far beyond RAM",
        Chain(&[(BEYOND, 4096, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer at the last address",
        Chain(&[(u64::MAX, 1, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer that wraps to address 0",
        Chain(&[(u64::MAX - 7, 16, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer with the top bit set",
        Chain(&[(1 << 63 | B, 16, 0, 0)]),
        Returned(1),
    ),
    (
        "a buffer of all lengths",
        Chain(&[(B, u32::MAX, 0, 0)]),
        Returned(1),
    ),
    (
        "a writable buffer of all lengths",
        Chain(&[(0, u32::MAX, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a buffer of 2 GiB",
        Chain(&[(B, 1 << 31, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a second buffer outside RAM",
        Chain(&[(B, 16, NEXT, 1), (RAM_BYTES, 16, WRITE, 0)]),
        Returned(1),
    ),
    (
        "a third buffer outside RAM",
        Chain(&[
            (B, 16, NEXT, 1),
            (B, 16, NEXT | WRITE, 2),
            (BEYOND, 1, WRITE, 0),
        ]),
        Returned(1),
    ),
    (
        "a readable buffer behind a writable one",
        Chain(&[(B, 16, NEXT | WRITE, 1), (B + 64, 16, 0, 0)]),
        Returned(1),
    ),
    (
        "flags that do not exist, outside RAM",
        Chain(&[(BEYOND, 16, 0xfff8, 3)]),
        Returned(1),
    ),
    ("buffers without a byte", Do(empty_buffers), Returned(1)),
];

const TABLE: u32 = 16;
const INDIRECTS: [Case; 20] = [
    (
        "an indirect table without a byte",
        Table(&[], 0),
        Returned(1),
    ),
    (
        "a table of 15 bytes",
        Table(&[(B, 16, 0, 0)], TABLE - 1),
        Returned(1),
    ),
    (
        "a table of 17 bytes",
        Table(&[(B, 16, 0, 0)], TABLE + 1),
        Returned(1),
    ),
    (
        "a table that follows itself",
        Table(&[(B, 16, NEXT, 0)], TABLE),
        Returned(1),
    ),
    (
        "a table whose next is behind it",
        Table(&[(B, 16, NEXT, 1)], TABLE),
        Returned(1),
    ),
    (
        "a table whose next is the largest number",
        Table(&[(B, 16, NEXT, u16::MAX)], TABLE),
        Returned(1),
    ),
    (
        "a table that loops",
        Table(&[(B, 16, NEXT, 1), (B, 16, NEXT, 0)], 2 * TABLE),
        Returned(1),
    ),
    (
        "a table in a table",
        Table(&[(TABLES, TABLE, INDIRECT, 0)], TABLE),
        Returned(1),
    ),
    (
        "a table in a table, with next",
        Table(&[(TABLES, TABLE, INDIRECT | NEXT, 0)], TABLE),
        Returned(1),
    ),
    (
        "a table with a buffer outside RAM",
        Table(&[(RAM_BYTES, 1, 0, 0)], TABLE),
        Returned(1),
    ),
    (
        "a table with its parts in disorder",
        Table(&[(B, 16, NEXT | WRITE, 1), (B, 16, 0, 0)], 2 * TABLE),
        Returned(1),
    ),
    (
        "a table outside RAM",
        Chain(&[(RAM_BYTES, TABLE, INDIRECT, 0)]),
        Returned(1),
    ),
    (
        "a table across the end of RAM",
        Chain(&[(RAM_BYTES - 16, 2 * TABLE, INDIRECT, 0)]),
        Any,
    ),
    (
        "a table in the device's window",
        Do(|driver, queue| chained(driver, queue, &[(driver.window, TABLE, INDIRECT, 0)])),
        Returned(1),
    ),
    (
        "a table at the last address",
        Chain(&[(u64::MAX - 15, TABLE, INDIRECT, 0)]),
        Returned(1),
    ),
    (
        "a table of all lengths",
        Chain(&[(TABLES, 0xffff_fff0, INDIRECT, 0)]),
        Returned(1),
    ),
    (
        "a table of 131072 descriptors",
        Chain(&[(TABLES, 2 << 20, INDIRECT, 0)]),
        Returned(1),
    ),
    (
        "a table of 65535 that never ends",
        Do(endless_table),
        Returned(1),
    ),
    ("a table of 1025 empty buffers", Do(long_table), Returned(1)),
    ("a table that is the descriptor table", Do(own_table), Any),
];

const INDICES: [Case; 24] = [
    (
        "a head that is the queue's size",
        Do(|driver, queue| driver.publish(queue, SIZE)),
        Reset,
    ),
    (
        "a head that is the largest number",
        Do(|driver, queue| driver.publish(queue, u16::MAX)),
        Reset,
    ),
    (
        "a good head, and one that does not exist",
        Do(good_and_bad_head),
        Reset,
    ),
    (
        "an index beyond the queue's size",
        Do(|driver, queue| advance(driver, queue, SIZE + 1)),
        Reset,
    ),
    (
        "an index half way round",
        Do(|driver, queue| advance(driver, queue, 0x8000)),
        Reset,
    ),
    (
        "an index that goes back",
        Do(|driver, queue| advance(driver, queue, u16::MAX)),
        Reset,
    ),
    (
        "one head in all slots",
        Do(one_head_in_all_slots),
        Returned(SIZE),
    ),
    ("one head twice", Do(one_head_twice), Returned(2)),
    (
        "flags of the driver area that do not exist",
        Do(flags_of_driver_area),
        Returned(1),
    ),
    (
        "an event index far away",
        Do(|driver, queue| event_index(driver, queue, 0x8000)),
        Returned(1),
    ),
    (
        "an event index one behind",
        Do(|driver, queue| event_index(driver, queue, u16::MAX)),
        Returned(1),
    ),
    (
        "an event index behind the queue",
        Do(|driver, queue| event_index(driver, queue, SIZE + 1)),
        Returned(1),
    ),
    (
        "the device area's index written by the driver",
        Do(index_of_device_area),
        Any,
    ),
    (
        "the device area's elements written by the driver",
        Do(elements_of_device_area),
        Returned(1),
    ),
    (
        "the descriptor table as the buffer",
        Do(|driver, queue| area_as_buffer(driver, queue, 0)),
        Any,
    ),
    (
        "the driver area as the buffer",
        Do(|driver, queue| area_as_buffer(driver, queue, 1)),
        Any,
    ),
    (
        "the device area as the buffer",
        Do(|driver, queue| area_as_buffer(driver, queue, 2)),
        Any,
    ),
    ("a notification of nothing", Do(|_, _| {}), Silent),
    (
        "a thousand notifications of nothing",
        Do(notify_often),
        Silent,
    ),
    (
        "a notification of a queue that does not exist",
        Do(|driver, _| driver.set(QUEUE_NOTIFY, 255)),
        Silent,
    ),
    (
        "a notification of the largest number",
        Do(|driver, _| driver.set(QUEUE_NOTIFY, 0xffff_ffff)),
        Silent,
    ),
    (
        "a notification with more than a queue's number",
        Do(|driver, queue| driver.set(QUEUE_NOTIFY, 0x1_0000 | u64::from(queue))),
        Silent,
    ),
    (
        "notifications of other widths",
        Do(notify_in_other_widths),
        Silent,
    ),
    ("notifications of all queues", Do(notify_all), Any),
];

/// Runs all cases on each queue that the device looks at, and on the first with the features of rings, too.
/// Returns how many there were.
pub(crate) fn run(driver: &Driver<'_>) -> usize {
    let mut count = 0;
    for (index, queue) in driver.subject.looked_at().into_iter().enumerate() {
        let sets: &[u64] = match index {
            0 => &[0, F_EVENT_IDX | F_INDIRECT],
            _ => &[0],
        };
        for ring_features in sets {
            let cases = CHAINS.iter().chain(&INDIRECTS).chain(&INDICES);
            for (name, act, expect) in cases {
                let name = format!("queue {queue}, {ring_features:#x}: {name}");
                one(driver, queue, *ring_features, (&name, *act, *expect));
                count += 1;
            }
        }
    }
    count
}

fn one(driver: &Driver<'_>, queue: u16, ring_features: u64, case: (&str, Act, Expect)) {
    let (name, act, expect) = case;
    driver.start_with(driver.subject.features() | ring_features);
    driver.follow(queue);
    match act {
        Chain(chain) => chained(driver, queue, chain),
        Table(table, len) => {
            let bytes: Vec<u8> = table.iter().flat_map(|it| descriptor_bytes(*it)).collect();
            driver.puppet().ram.write(TABLES, &bytes);
            chained(driver, queue, &[(TABLES, len, INDIRECT, 0)]);
        }
        Do(act) => act(driver, queue),
    }
    let buffers = driver.puppet().ram.bytes(B, 4096);
    driver.subject.provoke(driver, queue);
    match expect {
        Returned(count) => {
            let came = driver.wait(queue, count, name);
            assert!(came, "{name}: the device asks for a reset");
            let (_, written) = driver.last_used(queue);
            assert_eq!(written, 0, "{name}: bytes are said to be written");
            let now = driver.puppet().ram.bytes(B, 4096);
            assert!(now == buffers, "{name}: bytes are written");
            driver.has_status(LIVE, name);
            driver.follow(queue);
            driver.subject.good(driver, name);
        }
        Reset => {
            assert!(!driver.wait(queue, 0x4000, name), "{name}: it came back");
            driver.has_status(LIVE | NEEDS_RESET, name);
            driver.start();
            driver.subject.good(driver, name);
        }
        Silent => {
            driver.has_status(LIVE, name);
            driver.subject.good(driver, name);
        }
        Any => {
            settle(driver, queue);
            // What it has written into its own areas makes no sense any more.
            driver.start();
            driver.subject.good(driver, name);
        }
    }
}

/// Gives the device time for what it may do or not.
fn settle(driver: &Driver<'_>, queue: u16) {
    let start = Instant::now();
    let before = driver.used(queue);
    while start.elapsed() < Duration::from_millis(10) && driver.used(queue) == before {
        thread::sleep(Duration::from_micros(200));
    }
}

fn chained(driver: &Driver<'_>, queue: u16, chain: &[Descriptor]) {
    for (index, descriptor) in (0..).zip(chain) {
        driver.describe(queue, index, *descriptor);
    }
    driver.publish(queue, 0);
}

/// A chain that is not well formed, of one descriptor.
const BAD: Descriptor = (RAM_BYTES, 1, 0, 0);

fn loop_of_all(driver: &Driver<'_>, queue: u16) {
    for index in 0..SIZE {
        driver.describe(queue, index, (B, 16, NEXT, (index + 1) % SIZE));
    }
    driver.publish(queue, 0);
}

fn empty_buffers(driver: &Driver<'_>, queue: u16) {
    for index in 0..SIZE {
        let next = if index + 1 < SIZE { NEXT } else { 0 };
        driver.describe(queue, index, (B, 0, next, index + 1));
    }
    driver.publish(queue, 0);
}

fn table_of(driver: &Driver<'_>, queue: u16, count: u16, descriptor: impl Fn(u16) -> Descriptor) {
    let bytes: Vec<u8> = (0..count)
        .flat_map(|index| descriptor_bytes(descriptor(index)))
        .collect();
    driver.puppet().ram.write(TABLES, &bytes);
    chained(
        driver,
        queue,
        &[(TABLES, u32::from(count) * 16, INDIRECT, 0)],
    );
}

fn endless_table(driver: &Driver<'_>, queue: u16) {
    table_of(driver, queue, u16::MAX, |index| {
        (B, 1, NEXT, index.wrapping_add(1) % u16::MAX)
    });
}

fn long_table(driver: &Driver<'_>, queue: u16) {
    table_of(driver, queue, 1025, |index| {
        (B, 0, if index < 1024 { NEXT } else { 0 }, index + 1)
    });
}

fn own_table(driver: &Driver<'_>, queue: u16) {
    let [table, ..] = Driver::areas(queue);
    chained(driver, queue, &[(table, 16 * u32::from(SIZE), INDIRECT, 0)]);
}

/// Moves the index of the driver area, beyond chains that were never made.
fn advance(driver: &Driver<'_>, queue: u16, by: u16) {
    driver.set_available(queue, driver.available(queue).wrapping_add(by));
}

fn good_and_bad_head(driver: &Driver<'_>, queue: u16) {
    chained(driver, queue, &[BAD]);
    driver.publish(queue, SIZE);
}

fn one_head_in_all_slots(driver: &Driver<'_>, queue: u16) {
    chained(driver, queue, &[BAD]);
    (1..SIZE).for_each(|_| driver.publish(queue, 0));
}

fn one_head_twice(driver: &Driver<'_>, queue: u16) {
    chained(driver, queue, &[BAD]);
    driver.publish(queue, 0);
}

fn flags_of_driver_area(driver: &Driver<'_>, queue: u16) {
    let [_, area, _] = Driver::areas(queue);
    driver.puppet().ram.write(area, &[0xff; 2]);
    chained(driver, queue, &[BAD]);
}

fn event_index(driver: &Driver<'_>, queue: u16, index: u16) {
    let [_, area, _] = Driver::areas(queue);
    let at = area + 4 + 2 * u64::from(SIZE);
    driver.puppet().ram.write(at, &index.to_le_bytes());
    chained(driver, queue, &[BAD]);
}

fn index_of_device_area(driver: &Driver<'_>, queue: u16) {
    let [.., area] = Driver::areas(queue);
    driver.puppet().ram.write(area, &[0xff; 4]);
    chained(driver, queue, &[BAD]);
}

fn elements_of_device_area(driver: &Driver<'_>, queue: u16) {
    let [.., area] = Driver::areas(queue);
    driver.puppet().ram.write(area + 4, &[0xff; 64]);
    chained(driver, queue, &[BAD]);
}

fn area_as_buffer(driver: &Driver<'_>, queue: u16, area: usize) {
    chained(driver, queue, &[(Driver::areas(queue)[area], 64, WRITE, 0)]);
}

fn notify_often(driver: &Driver<'_>, queue: u16) {
    let notify = driver.register(QUEUE_NOTIFY, queue.into());
    driver.puppet().run_one(notify.times(1000, 0));
}

fn notify_in_other_widths(driver: &Driver<'_>, queue: u16) {
    let notify = driver.register(QUEUE_NOTIFY, queue.into());
    let steps = [1, 2, 8].map(|width| notify.width(width));
    driver.puppet().run(&steps);
}

fn notify_all(driver: &Driver<'_>, _: u16) {
    let queues = 0..driver.subject.queues();
    let steps: Vec<Step> = queues
        .map(|queue| driver.register(QUEUE_NOTIFY, queue.into()))
        .collect();
    driver.puppet().run(&steps);
}
