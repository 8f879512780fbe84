//! What a guest does while the device is at work: resets in the middle, two CPUs at one device, memory
//! that changes while it is read, and storms of notifications.

use std::thread;
use std::time::{Duration, Instant};

use crate::driver::*;
use crate::puppet::Step;
use crate::rig::RAM_BYTES;

/// How often each case is repeated, as it depends on who is first.
const ROUNDS: usize = 8;

/// Runs all cases. Returns how many there were.
pub(crate) fn run(driver: &Driver<'_>) -> usize {
    resets(driver) + storms(driver) + two_cpus(driver) + races(driver)
}

/// The steps of a whole start, from the reset on.
fn start_steps(driver: &Driver<'_>) -> Vec<Step> {
    let mut steps = driver.negotiation(driver.subject.features());
    for queue in 0..driver.subject.queues() {
        steps.extend(driver.queue_setup(queue, SIZE));
    }
    steps.push(driver.register(STATUS, LIVE));
    steps
}

/// Makes the same request available in all slots.
fn fill_queue(driver: &Driver<'_>) -> u16 {
    let (queue, request) = driver.subject.request();
    driver.lay(queue, &request);
    (0..SIZE).for_each(|_| driver.publish(queue, 0));
    queue
}

type Reset = (&'static str, fn(&Driver<'_>, Step) -> Vec<Step>);

const RESETS: [Reset; 6] = [
    ("a reset right after the notification", |driver, kick| {
        vec![kick, driver.register(STATUS, 0)]
    }),
    ("a reset right before the notification", |driver, kick| {
        vec![driver.register(STATUS, 0), kick]
    }),
    ("a reset between notifications", |driver, kick| {
        vec![
            kick.times(20, 0),
            driver.register(STATUS, 0),
            kick.times(20, 0),
        ]
    }),
    ("resets between notifications", |driver, kick| {
        [kick, driver.register(STATUS, 0)].repeat(20)
    }),
    ("a reset, a start and a reset", |driver, kick| {
        let mut steps = vec![kick, driver.register(STATUS, 0)];
        steps.extend(start_steps(driver));
        steps.extend([kick, driver.register(STATUS, 0)]);
        steps
    }),
    ("FAILED and a reset", |driver, kick| {
        vec![
            kick,
            driver.register(STATUS, LIVE | FAILED),
            kick,
            driver.register(STATUS, 0),
        ]
    }),
];

/// When the status reads 0, the device is done with guest memory (§2.4, Device Reset).
fn resets(driver: &Driver<'_>) -> usize {
    for (name, steps) in RESETS {
        for _ in 0..ROUNDS {
            driver.start();
            let queue = fill_queue(driver);
            let kick = driver.register(QUEUE_NOTIFY, queue.into());
            driver.puppet().run(&steps(driver, kick));
            driver.has_status(0, name);
            driver.clear();
            let [.., area] = Driver::areas(queue);
            driver.puppet().ram.write(area, &[0x5a; 256]);
            thread::sleep(Duration::from_millis(1));
            let area = driver.puppet().ram.bytes(area, 256);
            let name = format!("{}: {name}", driver.subject.name());
            assert!(area.iter().all(|byte| *byte == 0x5a), "{name}: it goes on");
            let buffers = driver.puppet().ram.bytes(BUFFERS, BUFFERS_BYTES);
            let pattern = buffers[BUFFERS_BYTES - 1];
            assert!(
                buffers.iter().all(|byte| *byte == pattern),
                "{name}: it goes on"
            );
        }
        driver.start();
        driver.subject.good(driver, name);
    }
    RESETS.len()
}

type Storm = (&'static str, fn(&Driver<'_>) -> Vec<Step>);

const STORMS: [Storm; 9] = [
    ("notifications of each queue", |driver| {
        let queues = (0..driver.subject.queues()).map(u64::from);
        let kick = |queue| driver.register(QUEUE_NOTIFY, queue).times(1000, 0);
        queues.map(kick).collect()
    }),
    ("notifications of queues that do not exist", |driver| {
        vec![driver.register(QUEUE_NOTIFY, 200).times(500, 0)]
    }),
    ("notifications in a byte", |driver| {
        vec![driver.register(QUEUE_NOTIFY, 0).width(1).times(500, 0)]
    }),
    ("reads of the status", |driver| {
        vec![driver.read(STATUS).times(500, 0)]
    }),
    ("reads of the configuration space", |driver| {
        vec![driver.read(CONFIG).width(8).times(480, 8)]
    }),
    ("writes of the configuration space", |driver| {
        let write = driver.register(CONFIG, u64::MAX);
        vec![write.width(8).times(480, 8)]
    }),
    ("acknowledgements of interrupts", |driver| {
        vec![driver.register(INTERRUPT_ACK, 0xffff_ffff).times(500, 0)]
    }),
    ("selections of queues", |driver| {
        let select = |queue| driver.register(QUEUE_SEL, queue);
        [select(0xffff), select(0xffff_ffff), select(0)].repeat(100)
    }),
    ("starts", |driver| start_steps(driver).repeat(10)),
];

fn storms(driver: &Driver<'_>) -> usize {
    for (name, steps) in STORMS {
        driver.start();
        let _ = fill_queue(driver);
        driver.puppet().run(&steps(driver));
        driver.rig.client();
        driver.start();
        driver.subject.good(driver, name);
    }
    STORMS.len()
}

/// What the first CPU does, and what the second does meanwhile.
type Pair = (&'static str, fn(&Driver<'_>) -> [Vec<Step>; 2]);

const PAIRS: [Pair; 6] = [
    ("notifications against resets", |driver| {
        let (queue, _) = driver.subject.request();
        let kick = driver.register(QUEUE_NOTIFY, queue.into()).times(20, 0);
        let reset = driver.register(STATUS, 0);
        let mut again = start_steps(driver);
        again.push(reset);
        [vec![kick; 40], again.repeat(8)]
    }),
    ("starts against starts", |driver| {
        [start_steps(driver).repeat(8), start_steps(driver).repeat(8)]
    }),
    ("starts against resets", |driver| {
        let reset = driver.register(STATUS, 0).times(100, 0);
        [start_steps(driver).repeat(8), vec![reset]]
    }),
    ("DRIVER_OK against DRIVER_OK", |driver| {
        let mut start = start_steps(driver);
        let live = start.pop().expect("it ends with DRIVER_OK").times(50, 0);
        start.push(live);
        [start.repeat(2), vec![live; 2]]
    }),
    ("setups against notifications", |driver| {
        let kick = driver.register(QUEUE_NOTIFY, 0).times(50, 0);
        [start_steps(driver).repeat(6), vec![kick; 20]]
    }),
    ("registers against the configuration space", |driver| {
        let sweep = Step::read(driver.window, 4).times(64, 4);
        let writes = driver.register(CONFIG, 7).times(64, 4);
        [vec![sweep; 6], vec![writes; 6]]
    }),
];

fn two_cpus(driver: &Driver<'_>) -> usize {
    driver.puppet().start_second();
    for (name, scripts) in PAIRS {
        driver.start();
        let _ = fill_queue(driver);
        let scripts = scripts(driver);
        for (cpu, script) in (0..).zip(&scripts) {
            driver.puppet().begin(cpu, script);
        }
        for (cpu, script) in (0..).zip(&scripts) {
            let ended = driver.puppet().finish(cpu, script.len());
            assert!(
                ended.is_some(),
                "{}: {name}: CPU {cpu} hangs",
                driver.subject.name()
            );
        }
        driver.start();
        driver.subject.good(driver, name);
    }
    driver.puppet().stop_second();
    PAIRS.len()
}

/// A place in memory, and what is written there in turn.
type Race = (&'static str, fn(u16) -> u64, &'static [&'static [u8]]);

const RACES: [Race; 11] = [
    (
        "a descriptor's address",
        |queue| table(queue),
        &[&[0, 0, 0x60, 0], &[0xf8, 0xff, 0xff, 0x03]],
    ),
    (
        "a descriptor's address, its upper half",
        |queue| table(queue) + 4,
        &[&[0; 4], &[0xff; 4]],
    ),
    (
        "a descriptor's length",
        |queue| table(queue) + 8,
        &[&[16, 0, 0, 0], &[0xff; 4], &[0; 4]],
    ),
    (
        "a descriptor's flags",
        |queue| table(queue) + 12,
        &[&[1, 0], &[2, 0], &[4, 0], &[7, 0], &[0, 0]],
    ),
    (
        "a descriptor's next",
        |queue| table(queue) + 14,
        &[&[1, 0], &[0, 0], &[0xff, 0xff]],
    ),
    (
        "the second descriptor",
        |queue| table(queue) + 16,
        &[&[0; 8], &[0xff; 8], &[0, 0, 0x61, 0, 0, 0, 0, 0]],
    ),
    (
        "the index of the driver area",
        |queue| areas(queue)[1] + 2,
        &[&[1, 0], &[5, 0], &[0, 0x80], &[9, 0]],
    ),
    (
        "a head",
        |queue| areas(queue)[1] + 4,
        &[&[0, 0], &[7, 0], &[0xff, 0xff]],
    ),
    (
        "the flags of the driver area",
        |queue| areas(queue)[1],
        &[&[0, 0], &[1, 0], &[0xff, 0xff]],
    ),
    (
        "the index of the device area",
        |queue| areas(queue)[2] + 2,
        &[&[0, 0], &[0xff, 0xff]],
    ),
    (
        "the request itself",
        |_| BUFFERS,
        &[&[0; 16], &[0xff; 16], &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]],
    ),
];

fn areas(queue: u16) -> [u64; 3] {
    Driver::areas(queue)
}

fn table(queue: u16) -> u64 {
    areas(queue)[0]
}

/// Memory changes while the device reads it. Whatever comes of that, a well-formed request is answered
/// afterwards.
fn races(driver: &Driver<'_>) -> usize {
    assert_eq!(
        (BUFFERS, RAM_BYTES),
        (0x60_0000, 0x400_0000),
        "as the races name them"
    );
    let ram = &driver.puppet().ram;
    for (name, place, values) in RACES {
        let end = Instant::now() + Duration::from_millis(20);
        while Instant::now() < end {
            driver.start_with(driver.subject.features() | F_EVENT_IDX | F_INDIRECT);
            let queue = fill_queue(driver);
            let kick = driver.register(QUEUE_NOTIFY, queue.into());
            driver.puppet().begin(0, &[kick.times(20, 0)]);
            while !driver.puppet().is_done(0) {
                values
                    .iter()
                    .for_each(|value| ram.write(place(queue), value));
            }
        }
        driver.start();
        driver.subject.good(driver, name);
    }
    RACES.len()
}
