//! The registers of either transport: each of them in each width, and out of turn (virtio 1.3 §4.2.2, §4.1.4
//! and §3.1.1, Device Initialization).

use crate::driver::*;
use crate::pci;
use crate::puppet::Step;
use crate::rig::{RAM_BYTES, Transport};

/// Registers of 4 bytes, those that do not exist among them, and places of the configuration space.
fn places(driver: &Driver<'_>) -> Vec<u64> {
    match driver.rig.transport {
        Transport::Mmio => {
            let config = [
                0x100, 0x104, 0x108, 0x120, 0x13c, 0x140, 0x200, 0x800, 0xff8,
            ];
            (0..0x100).step_by(4).chain(config).collect()
        }
        Transport::Pci => pci::places().collect(),
    }
}

/// What is written everywhere.
const VALUES: [u64; 4] = [0, 1, 0x8000_0000, u64::MAX];

/// Runs all cases. Returns how many there were.
pub(crate) fn run(driver: &Driver<'_>) -> usize {
    any_width(driver) + four_bytes(driver) + out_of_turn(driver) + bad_queues(driver)
}

/// All widths but that of virtio-mmio's registers, from each of four bytes on.
const WIDTHS: [(u32, u64); 10] = [
    (1, 0),
    (1, 1),
    (1, 3),
    (2, 0),
    (2, 1),
    (2, 2),
    (4, 1),
    (4, 2),
    (8, 0),
    (8, 4),
];

/// "The driver MUST only use 32 bit wide and aligned reads and writes" (§4.2.2.2) of virtio-mmio, and over PCI
/// the width that a register has (§4.1.3.1): others read as zero, and change nothing.
fn any_width(driver: &Driver<'_>) -> usize {
    driver.start();
    let end = driver.rig.transport.window_bytes();
    let mut count = 0;
    for register in places(driver) {
        for (width, shift) in WIDTHS {
            let at = driver.window + register + shift;
            let is_status = driver.place(STATUS, 0) == (at, width);
            if is_status || register + shift + u64::from(width) > end {
                continue;
            }
            let mut steps = vec![Step::read(at, width)];
            steps.extend(VALUES.map(|value| Step::write(at, width, value)));
            let came = driver.puppet().run(&steps);
            let what = format!("register {register:#x} + {shift} in {width} bytes");
            let faults: u64 = came.iter().map(|step| step.faults).sum();
            assert_eq!(faults, 0, "{what}");
            if driver.rig.transport == Transport::Mmio && register + shift < CONFIG {
                assert_eq!(came[0].value, 0, "{what}");
            }
            driver.has_status(LIVE, &what);
            count += 1;
        }
        driver
            .subject
            .good(driver, &format!("register {register:#x}"));
    }
    count
}

/// Four bytes, as virtio-mmio's registers have, that are written in vain as queues are live.
fn four_bytes(driver: &Driver<'_>) -> usize {
    let mut count = 0;
    let not = [STATUS, QUEUE_NOTIFY].map(|register| driver.place(register, 0));
    for register in places(driver) {
        let at = driver.window + register;
        if not.contains(&(at, 4)) {
            continue;
        }
        for value in VALUES {
            let value = value & 0xffff_ffff;
            driver
                .puppet()
                .run(&[Step::write(at, 4, value), Step::read(at, 4)]);
            count += 1;
        }
        let what = format!("register {register:#x} while the device is live");
        driver.has_status(LIVE, &what);
        driver.subject.good(driver, &what);
    }
    driver.start();
    count
}

/// What a driver writes, and what the status is then.
type Turn = (&'static str, fn(&Driver<'_>) -> Vec<Step>, u64);

const READY: u64 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

const TURNS: [Turn; 28] = [
    ("DRIVER_OK first", |d| statuses(d, &[DRIVER_OK]), 0),
    ("FEATURES_OK first", |d| statuses(d, &[FEATURES_OK]), 0),
    ("DRIVER without ACKNOWLEDGE", |d| statuses(d, &[DRIVER]), 0),
    ("all at once without features", |d| statuses(d, &[LIVE]), 3),
    (
        "all at once, after the features",
        |d| before_features_ok(d, F_VERSION_1, &[LIVE]),
        LIVE,
    ),
    ("no version", |d| before_features_ok(d, 0, &[READY]), 3),
    (
        "all features",
        |d| before_features_ok(d, u64::MAX, &[READY]),
        3,
    ),
    (
        "a feature that is not offered",
        |d| before_features_ok(d, F_VERSION_1 | 1 << 63, &[READY]),
        3,
    ),
    (
        "the ring's reset, which is not offered",
        |d| before_features_ok(d, F_VERSION_1 | 1 << 40, &[READY]),
        3,
    ),
    ("features after FEATURES_OK", late_features, READY),
    ("features of a third page", |d| paged_features(d, 2), 3),
    (
        "features of the last page",
        |d| paged_features(d, 0xffff_ffff),
        3,
    ),
    (
        "DRIVER_OK without FEATURES_OK",
        |d| statuses(d, &[1, 3, 3 | DRIVER_OK]),
        3,
    ),
    (
        "FAILED, and on",
        |d| statuses(d, &[1, 3, 3 | FAILED, LIVE | FAILED]),
        3 | FAILED,
    ),
    (
        "FAILED, and DRIVER_OK without it",
        |d| statuses(d, &[1, FAILED | 1, LIVE]),
        FAILED | 1,
    ),
    ("FAILED at first", |d| statuses(d, &[FAILED]), FAILED),
    (
        "NEEDS_RESET by the driver",
        |d| statuses(d, &[NEEDS_RESET]),
        0,
    ),
    ("all bits", |d| statuses(d, &[0xff]), FAILED),
    ("more than all bits", |d| statuses(d, &[0xffff_ff00]), 0),
    ("a bit cleared", |d| statuses(d, &[1, 3, 2]), 3),
    (
        "a live device's bits cleared",
        |d| live_and(d, &[1, 3, READY]),
        LIVE,
    ),
    (
        "a live device's NEEDS_RESET set",
        |d| live_and(d, &[LIVE | NEEDS_RESET]),
        LIVE,
    ),
    ("DRIVER_OK twice", |d| live_and(d, &[LIVE, LIVE]), LIVE),
    (
        "DRIVER_OK a hundred times",
        |d| live_and(d, &[LIVE; 100]),
        LIVE,
    ),
    (
        "FAILED when live",
        |d| live_and(d, &[LIVE | FAILED]),
        LIVE | FAILED,
    ),
    ("resets alone", |d| statuses(d, &[0; 100]), 0),
    ("a reset when live", |d| live_and(d, &[0]), 0),
    ("queues before FEATURES_OK", early_queues, 3),
];

fn statuses(driver: &Driver<'_>, values: &[u64]) -> Vec<Step> {
    let values = [0].iter().chain(values);
    values
        .map(|value| driver.register(STATUS, *value))
        .collect()
}

fn before_features_ok(driver: &Driver<'_>, features: u64, values: &[u64]) -> Vec<Step> {
    let mut steps = statuses(driver, &[1, 3]);
    for page in [0, 1] {
        steps.push(driver.register(DRIVER_FEATURES_SEL, page));
        steps.push(driver.register(DRIVER_FEATURES, features >> (32 * page) & 0xffff_ffff));
    }
    if values.contains(&LIVE) {
        // A device without its queues need not start.
        steps.push(driver.register(STATUS, READY));
        steps.extend(all_queues(driver));
    }
    steps.extend(values.iter().map(|value| driver.register(STATUS, *value)));
    steps
}

fn all_queues(driver: &Driver<'_>) -> Vec<Step> {
    let queues = 0..driver.subject.queues();
    queues
        .flat_map(|queue| driver.queue_setup(queue, SIZE))
        .collect()
}

fn late_features(driver: &Driver<'_>) -> Vec<Step> {
    let mut steps = driver.negotiation(0);
    steps.push(driver.register(DRIVER_FEATURES, 0xffff_ffff));
    steps.push(driver.register(DRIVER_FEATURES_SEL, 0));
    steps.push(driver.register(DRIVER_FEATURES, 0xffff_ffff));
    steps
}

fn paged_features(driver: &Driver<'_>, page: u64) -> Vec<Step> {
    let mut steps = statuses(driver, &[1, 3]);
    steps.push(driver.register(DRIVER_FEATURES_SEL, page));
    steps.push(driver.register(DRIVER_FEATURES, 1));
    steps.push(driver.register(STATUS, READY));
    steps
}

fn live_and(driver: &Driver<'_>, values: &[u64]) -> Vec<Step> {
    let mut steps = driver.negotiation(0);
    steps.extend(all_queues(driver));
    steps.push(driver.register(STATUS, LIVE));
    steps.extend(values.iter().map(|value| driver.register(STATUS, *value)));
    steps
}

fn early_queues(driver: &Driver<'_>) -> Vec<Step> {
    let mut steps = statuses(driver, &[1, 3]);
    steps.extend(all_queues(driver));
    steps.push(driver.read(QUEUE_READY));
    steps
}

fn out_of_turn(driver: &Driver<'_>) -> usize {
    for (name, steps, status) in TURNS {
        driver.puppet().run_one(driver.register(STATUS, 0));
        driver.clear();
        let came = driver.puppet().run(&steps(driver));
        assert!(came.iter().all(|step| step.faults == 0), "{name}: {came:?}");
        driver.has_status(status, name);
        driver.start();
        driver.subject.good(driver, name);
    }
    TURNS.len()
}

/// What a queue is set up with that the driver may not: register and value, each after the proper ones.
type Setup = (&'static str, &'static [(u64, u64)]);

const SETUPS: [Setup; 36] = [
    ("no descriptors", &[(QUEUE_NUM, 0)]),
    ("three descriptors", &[(QUEUE_NUM, 3)]),
    ("twice the most", &[(QUEUE_NUM, 0x800)]),
    ("the largest power of two", &[(QUEUE_NUM, 0x8000)]),
    ("65536 descriptors", &[(QUEUE_NUM, 0x1_0000)]),
    ("8 descriptors, and a bit more", &[(QUEUE_NUM, 0x1_0008)]),
    ("all bits of the size", &[(QUEUE_NUM, 0xffff_ffff)]),
    ("a table at 8", &[(QUEUE_DESC, 0x40_0008)]),
    ("a table at 1", &[(QUEUE_DESC, 0x40_0001)]),
    ("a table right behind RAM", &[(QUEUE_DESC, RAM_BYTES)]),
    (
        "a table across the end of RAM",
        &[(QUEUE_DESC, RAM_BYTES - 16)],
    ),
    ("a table in a window", &[(QUEUE_DESC, 0xc000_0000)]),
    ("a table behind a BAR", &[(QUEUE_DESC, 0xe000_0000)]),
    ("a table in the local APIC", &[(QUEUE_DESC, 0xfee0_0000)]),
    (
        "a table at the end of 32 bits",
        &[(QUEUE_DESC, 0xffff_fff0)],
    ),
    ("a table far beyond RAM", &[(QUEUE_DESC + 4, 0x100)]),
    (
        "a table at the last address",
        &[(QUEUE_DESC, 0xffff_fff0), (QUEUE_DESC + 4, 0xffff_ffff)],
    ),
    ("a driver area at 1", &[(QUEUE_DRIVER, 0x40_5001)]),
    ("a driver area at 0", &[(QUEUE_DRIVER, 0)]),
    (
        "a driver area right behind RAM",
        &[(QUEUE_DRIVER, RAM_BYTES)],
    ),
    (
        "a driver area across the end of RAM",
        &[(QUEUE_DRIVER, RAM_BYTES - 2)],
    ),
    (
        "a driver area with its event across the end",
        &[(QUEUE_DRIVER, RAM_BYTES - 20)],
    ),
    ("a driver area in a window", &[(QUEUE_DRIVER, 0xc000_0050)]),
    (
        "a driver area far beyond RAM",
        &[(QUEUE_DRIVER + 4, 0x8000_0000)],
    ),
    (
        "a driver area at the last address",
        &[(QUEUE_DRIVER, 0xffff_fffe), (QUEUE_DRIVER + 4, 0xffff_ffff)],
    ),
    ("a device area at 2", &[(QUEUE_DEVICE, 0x40_8002)]),
    (
        "a device area right behind RAM",
        &[(QUEUE_DEVICE, RAM_BYTES)],
    ),
    (
        "a device area across the end of RAM",
        &[(QUEUE_DEVICE, RAM_BYTES - 4)],
    ),
    (
        "a device area with its event across the end",
        &[(QUEUE_DEVICE, RAM_BYTES - 68)],
    ),
    ("a device area in a window", &[(QUEUE_DEVICE, 0xc000_0000)]),
    ("a device area behind a BAR", &[(QUEUE_DEVICE, 0xe000_3000)]),
    (
        "a device area in the IOAPIC",
        &[(QUEUE_DEVICE, 0xfec0_0000)],
    ),
    (
        "a device area far beyond RAM",
        &[(QUEUE_DEVICE + 4, 1 << 20)],
    ),
    (
        "a device area at the last address",
        &[(QUEUE_DEVICE, 0xffff_fffc), (QUEUE_DEVICE + 4, 0xffff_ffff)],
    ),
    (
        "nothing where it should",
        &[
            (QUEUE_DESC, 0xffff_ffff),
            (QUEUE_DRIVER, 0xffff_ffff),
            (QUEUE_DEVICE, 0xffff_ffff),
        ],
    ),
    (
        "a device area of odd halves",
        &[(QUEUE_DEVICE, 3), (QUEUE_DEVICE + 4, 3)],
    ),
];

/// Set up so, each queue makes the device ask for a reset; and a well-formed driver is served afterwards.
fn bad_queues(driver: &Driver<'_>) -> usize {
    let mut count = 0;
    for queue in 0..driver.subject.queues() {
        for (name, setup) in SETUPS {
            let registers = setup.iter().map(|(at, value)| driver.register(*at, *value));
            if !setup.iter().all(|(at, value)| driver.has_room(*at, *value)) {
                continue;
            }
            driver.puppet().run_one(driver.register(STATUS, 0));
            driver.clear();
            let mut steps = driver.negotiation(driver.subject.features());
            let others = (0..driver.subject.queues()).filter(|other| *other != queue);
            steps.extend(others.flat_map(|other| driver.queue_setup(other, SIZE)));
            steps.extend(driver.queue_setup(queue, SIZE));
            // While a queue is ready, its registers stand still.
            let ready = steps.pop().expect("a setup ends with that");
            steps.extend(registers);
            steps.extend([ready, driver.register(STATUS, LIVE)]);
            driver.puppet().run(&steps);
            let what = format!("queue {queue}: {name}");
            driver.has_status(LIVE | NEEDS_RESET, &what);
            notify_dead(driver, queue);
            driver.recover(&what);
            count += 1;
        }
    }
    count
}

/// Notifies a device that is not served, which it takes for nothing.
fn notify_dead(driver: &Driver<'_>, queue: u16) {
    let notify = driver.register(QUEUE_NOTIFY, queue.into());
    driver.puppet().run_one(notify.times(10, 0));
}
