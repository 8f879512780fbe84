//! Messages: which come and when, and tables of them that are written anywhere, and while they are sent.

use crate::driver::{Driver, Subject};
use crate::pci::{
    BAR, PENDING, QUEUE_SELECT, QUEUE_VECTOR, TABLE, WINDOW, boot, find, recovers, write,
};
use crate::puppet::{Op, Step};
use crate::rng::Rng;

/// The register of the MSI-X capability, and its bits for on and for all masked.
const MSIX: u32 = 0x40;
const MSIX_ON: u64 = 0x8000;
const MSIX_MASKED: u64 = 0xc000;
/// A vector of the first CPU's.
const MESSAGE: [u64; 3] = [0xfee0_0000, 0, 0x50];
/// Vectors of the entropy device, of which each has 16 bytes of the table.
const VECTORS: u64 = 2;

/// Has queue 0 send the second message, and no vector masked.
fn send_messages(driver: &Driver<'_>, device: u32) {
    let bar = driver.window;
    let mut steps = vec![Step::write(0xfee0_00f0, 4, 0x1ff)];
    steps.extend(write(device, MSIX, MSIX_ON << 16));
    for (word, value) in (0..).zip(MESSAGE.into_iter().chain([0])) {
        steps.push(Step::write(bar + TABLE + 16 + 4 * word, 4, value));
    }
    steps.push(Step::write(bar + QUEUE_SELECT, 2, 0));
    steps.push(Step::write(bar + QUEUE_VECTOR, 2, 1));
    steps.push(Step::read(bar + QUEUE_VECTOR, 2));
    let came = driver.puppet().run(&steps);
    assert_eq!(came[steps.len() - 1].value, 1, "there is such a vector");
}

/// Waits until there were so many interrupts in all, and a little for more. Returns how many there were.
fn interrupts(driver: &Driver<'_>, expected: u64) -> u64 {
    let wait = |count| Step::new(Op::AwaitInterrupts, 0).value(count);
    driver.puppet().run(&[wait(expected)]);
    driver.puppet().run(&[wait(0), wait(0)]);
    driver.puppet().interrupts()
}

fn pending(driver: &Driver<'_>) -> u64 {
    let bits = Step::read(driver.window + PENDING, 8);
    driver.puppet().run_one(bits).value
}

#[test]
fn messages_come_unless_they_are_masked() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let device = find(&rig.puppet, Rng.id());
    let control = driver.window + TABLE + 16 + 12;
    driver.start();
    send_messages(&driver, device);
    let before = rig.puppet.interrupts();
    Rng.good(&driver, "messages");
    assert_eq!(interrupts(&driver, before + 1), before + 1);

    rig.puppet.run_one(Step::write(control, 4, 1));
    Rng.good(&driver, "a masked message");
    assert_eq!(interrupts(&driver, 0), before + 1, "it is masked");
    assert_eq!(pending(&driver), 0b10);
    rig.puppet.run_one(Step::write(control, 4, 0));
    assert_eq!(interrupts(&driver, before + 2), before + 2);
    assert_eq!(pending(&driver), 0);

    rig.puppet.run(&write(device, MSIX, MSIX_MASKED << 16));
    Rng.good(&driver, "all messages masked");
    assert_eq!(interrupts(&driver, 0), before + 2, "all are masked");
    rig.puppet.run(&write(device, MSIX, MSIX_ON << 16));
    assert_eq!(interrupts(&driver, before + 3), before + 3);
    rig.finish();
}

#[test]
fn messages_and_notifications_go_on_after_a_restore() {
    let Some(rig) = boot() else { return };
    let device = find(&rig.puppet, Rng.id());
    // Elsewhere than podvmm has placed it.
    let moved = WINDOW + 0x20_0000;
    rig.puppet.run(&write(device, BAR, moved));
    let driver = Driver::new(&rig, &Rng);
    driver.start();
    send_messages(&driver, device);
    assert_eq!(driver.window, moved);
    let control = moved + TABLE + 16 + 12;
    let before = rig.puppet.interrupts();
    rig.puppet.run_one(Step::write(control, 4, 1));
    Rng.good(&driver, "a masked message");
    assert_eq!(pending(&driver), 0b10);

    let rig = rig.restored();
    let driver = Driver::new(&rig, &Rng);
    assert_eq!(driver.window, moved);
    assert_eq!(pending(&driver), 0b10, "it is pending still");
    assert_eq!(interrupts(&driver, 0), before);
    rig.puppet.run_one(Step::write(control, 4, 0));
    assert_eq!(interrupts(&driver, before + 1), before + 1);
    driver.follow(0);
    Rng.good(&driver, "a restore");
    assert_eq!(interrupts(&driver, before + 2), before + 2);
}

/// Beyond the table and the pending bits, and across words of theirs, nothing is read or changed.
#[test]
fn tables_end_where_they_are_said_to() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let device = find(&rig.puppet, Rng.id());
    driver.start();
    send_messages(&driver, device);
    let table = || {
        let word = |word| Step::read(driver.window + TABLE + 8 * word, 8);
        let words: Vec<_> = (0..2 * VECTORS).map(word).collect();
        let came = rig.puppet.run(&words);
        came.iter().map(|step| step.value).collect::<Vec<_>>()
    };
    let (before, mut count) = (table(), 0);
    // The bits are 64 in all, and no driver may write them.
    for (page, readable, writable) in [(TABLE, 16 * VECTORS, 16 * VECTORS), (PENDING, 8, 0)] {
        for width in [1, 2, 4, 8] {
            let (mut reads, mut writes) = (Vec::new(), Vec::new());
            for offset in (0..readable + 40).chain(0xfe0..=0x1000 - u64::from(width)) {
                let is_within = |end: u64| {
                    let width = u64::from(width);
                    width >= 4 && offset % width == 0 && offset + width <= end
                };
                let at = driver.window + page + offset;
                if !is_within(writable) {
                    writes.push(Step::write(at, width, u64::MAX));
                }
                if !is_within(readable) {
                    reads.push(Step::read(at, width));
                }
            }
            count += writes.len() + reads.len();
            rig.puppet.run(&writes);
            let came = rig.puppet.run(&reads);
            let is_nothing = came.iter().all(|step| step.value == 0);
            assert!(is_nothing, "{width} bytes of {page:#x}");
            Rng.good(&driver, "accesses beyond the table");
        }
    }
    println!("pci: tables: {count} cases");
    assert_eq!(table(), before);
    let before = interrupts(&driver, 0);
    Rng.good(&driver, "a table that is whole");
    assert_eq!(interrupts(&driver, before + 1), before + 1);
    rig.finish();
}

/// One CPU has messages sent, and the other changes them.
#[test]
fn tables_change_while_messages_are_sent() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let device = find(&rig.puppet, Rng.id());
    let entry = driver.window + TABLE + 16;
    rig.puppet.start_second();
    driver.start();
    send_messages(&driver, device);
    let mut changes = Vec::new();
    let controls = [MSIX_ON, MSIX_MASKED, MSIX_ON, 0].into_iter().cycle();
    for (round, control) in (0..40_u64).zip(controls) {
        changes.push(Step::write(entry + 12, 4, round & 1));
        changes.push(Step::write(entry + 8, 4, 0x50 + round % 8));
        changes.push(Step::write(entry, 4, 0xfee0_0000 | (round % 4) << 12));
        changes.extend([Step::read(driver.window + PENDING, 8), Step::read(entry, 8)]);
        changes.push(Step::write(driver.window + TABLE + 16 * 200, 4, 1));
        changes.push(Step::write(driver.window + QUEUE_VECTOR, 2, round % 3));
        changes.extend(write(device, MSIX, control << 16));
    }
    rig.puppet.begin(1, &changes);
    for _ in 0..40 {
        Rng.good(&driver, "tables that change");
    }
    assert!(rig.puppet.finish(1, changes.len()).is_some(), "it hangs");
    rig.puppet.stop_second();
    recovers(&rig, "tables that change");
    // No message is lost: the last one is sent once it is not masked.
    let driver = Driver::new(&rig, &Rng);
    driver.start();
    send_messages(&driver, device);
    let before = interrupts(&driver, 0);
    Rng.good(&driver, "a table that is whole again");
    assert_eq!(interrupts(&driver, before + 1), before + 1);
    rig.finish();
}
