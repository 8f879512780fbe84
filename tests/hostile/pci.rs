//! The PCI bus: configuration space, BARs anywhere, and tables of messages that change while they are sent.

use tests::podvmm::kvm_is_here;

use crate::driver::{self, Driver, Subject};
use crate::puppet::{Op, Puppet, Step};
use crate::rig::{Rig, Transport};
use crate::rng::Rng;

// Ports of configuration mechanism 1 (PCI 3.0 §3.2.2.3.2).
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
// Registers of configuration space.
const COMMAND: u32 = 0x04;
const BAR: u32 = 0x10;
const CAPABILITIES: u32 = 0x34;
/// Where podvmm has BARs, and how much of it is each device's at first.
const WINDOW: u64 = 0xe000_0000;
const PART: u64 = 0x80_0000;
// What is where behind the BAR of podvmm's devices.
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_VECTOR: u64 = 0x1a;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const NOTHING: u64 = 0x6000;
/// The register of the MSI-X capability, and its bits for on and for all masked.
const MSIX: u32 = 0x40;
const MSIX_ON: u64 = 0x8000;
const MSIX_MASKED: u64 = 0xc000;
/// A vector of the first CPU's.
const MESSAGE: [u64; 3] = [0xfee0_0000, 0, 0x50];

/// Places behind a BAR: registers of four bytes, and where each region begins and ends.
pub(crate) fn places() -> impl Iterator<Item = u64> {
    let regions = [ISR, CONFIG, NOTIFY, TABLE, PENDING, NOTHING];
    let edges = regions.map(|start| [start, start + 8, start + 0x20, start + 0xffc]);
    (0..0x40).step_by(4).chain(edges.into_iter().flatten())
}

/// Where a register of virtio-mmio's is behind a BAR, and its width (virtio 1.3 §4.1.4.3). What has no
/// counterpart goes where there is nothing.
pub(crate) fn place(register: u64, value: u64) -> (u64, u32) {
    match register {
        driver::DRIVER_FEATURES_SEL => (0x08, 4),
        driver::DRIVER_FEATURES => (0x0c, 4),
        driver::STATUS => (0x14, 1),
        driver::QUEUE_SEL => (QUEUE_SELECT, 2),
        driver::QUEUE_NUM => (0x18, 2),
        driver::QUEUE_READY => (0x1c, 2),
        // Three addresses, each in halves.
        0x80..=0xaf if register % 16 < 8 => (0x20 + (register - 0x80) / 16 * 8 + register % 16, 4),
        driver::QUEUE_NOTIFY => (NOTIFY + 4 * (value & 0x3ff), 2),
        driver::INTERRUPT_ACK => (ISR, 1),
        driver::CONFIG.. => (CONFIG + register - driver::CONFIG, 4),
        _ => (NOTHING, 4),
    }
}

fn select(device: u32, register: u32) -> Step {
    Step::output(ADDRESS, 4, (1 << 31 | device << 11 | register).into())
}

pub(crate) fn read(puppet: &Puppet, device: u32, register: u32) -> u64 {
    let steps = [select(device, register), Step::input(DATA, 4)];
    puppet.run(&steps)[1].value & 0xffff_ffff
}

pub(crate) fn write(device: u32, register: u32, value: u64) -> [Step; 2] {
    [select(device, register), Step::output(DATA, 4, value)]
}

/// The number of the virtio device of this kind on the bus.
pub(crate) fn find(puppet: &Puppet, id: u32) -> u32 {
    let wanted = u64::from(0x1040 + id) << 16 | 0x1af4;
    let found = (1..32).find(|device| read(puppet, *device, 0) == wanted);
    found.unwrap_or_else(|| panic!("there is no device {id}"))
}

/// Has a device decode memory, and says where.
pub(crate) fn switch_on(puppet: &Puppet, device: u32) -> u64 {
    puppet.run(&write(device, COMMAND, 0x6));
    read(puppet, device, BAR)
}

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

/// A guest whose entropy device is served, as whenever what podvmm holds is compared.
fn boot() -> Option<Rig> {
    if !kvm_is_here() {
        return None;
    }
    let mut rig = Rig::boot_on(Transport::Pci, |_| Vec::new());
    serve(&rig, "a start");
    rig.take_stock();
    Some(rig)
}

fn serve(rig: &Rig, after: &str) {
    let driver = Driver::new(rig, &Rng);
    driver.start();
    Rng.good(&driver, after);
}

#[test]
fn a_driver_finds_a_device_by_its_capabilities() {
    let Some(rig) = boot() else { return };
    let device = find(&rig.puppet, Rng.id());
    assert_eq!(read(&rig.puppet, 0, 0x08) >> 16, 0x0600, "a host bridge");
    let mut found = Vec::new();
    let mut at = u32::try_from(read(&rig.puppet, device, CAPABILITIES)).expect("it is a byte");
    while at != 0 {
        let [id, next, _, kind, ..] = read(&rig.puppet, device, at).to_le_bytes();
        found.push((id, if id == 9 { kind } else { 0 }));
        at = next.into();
        assert!(found.len() < 10, "the list has an end");
    }
    assert_eq!(found, [(0x11, 0), (9, 1), (9, 3), (9, 4), (9, 2), (9, 5)]);
    rig.finish();
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

#[test]
fn configuration_space_takes_anything() {
    let Some(rig) = boot() else { return };
    let mut cases = 0;
    for address in [
        0,
        1 << 31,
        1 << 31 | 0x0100_0000,
        1 << 31 | 0x0001_0000,
        u64::from(u32::MAX),
    ] {
        for port in ADDRESS..=DATA + 3 {
            for width in [1, 2, 4] {
                let at = Step::output(ADDRESS, 4, address);
                let steps = [
                    at,
                    Step::input(port, width),
                    Step::output(port, width, u64::MAX),
                ];
                rig.puppet.run(&steps);
                cases += 1;
            }
        }
    }
    for device in 0..32 {
        let mut steps = Vec::new();
        for register in (0..0x100).step_by(4) {
            for value in [0, u64::from(u32::MAX), 0xe000_0000, 4] {
                steps.extend(write(device, register, value));
                steps.push(Step::input(DATA, 4));
            }
        }
        rig.puppet.run(&steps);
        cases += steps.len();
        rig.client();
    }
    assert!(cases > 1000);
    recovers(&rig, "any write of configuration space");
    rig.finish();
}

/// BARs over RAM, over windows, over one another, over interrupt controllers and outside of everything.
#[test]
fn bars_hide_nothing() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let (device, bar) = (find(&rig.puppet, Rng.id()), driver.window);
    let others = [
        0,
        0x10_0000,
        0x300_0000,
        0xc000_0000,
        WINDOW - 0x8000,
        0xfebf_8000,
        0xfec0_0000,
        0xfee0_0000,
        0xfffb_8000,
        0xffff_8000,
    ];
    for start in others {
        let ram = rig.puppet.ram.bytes(0x300_0000, 0x8000);
        driver.start();
        let mut steps = write(device, BAR, start).to_vec();
        // As if the device were there, whatever else may be.
        if (WINDOW..0xfec0_0000).contains(&start) {
            steps.extend([Step::write(start + NOTIFY, 2, 0), Step::read(start, 4)]);
        }
        steps.extend([Step::read(0xfee0_0030, 4), Step::read(0xfec0_0000, 4)]);
        let came = rig.puppet.run(&steps);
        let version = came[steps.len() - 2].value & 0xff;
        assert_eq!(version, 0x14, "the local APIC is where it was");
        assert!(ram == rig.puppet.ram.bytes(0x300_0000, 0x8000));
        rig.puppet.run(&write(device, BAR, bar));
        recovers(&rig, "a BAR elsewhere");
    }
    // It answers where it was moved to.
    let moved = WINDOW + 0x10_0000;
    rig.puppet.run(&write(device, BAR, moved));
    assert_eq!(rig.puppet.run_one(Step::read(bar, 4)).value, 0xffff_ffff);
    let driver = Driver::new(&rig, &Rng);
    assert_eq!(driver.window, moved);
    driver.start();
    Rng.good(&driver, "a BAR that was moved");
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
    for round in 0..40_u64 {
        changes.push(Step::write(entry + 12, 4, round & 1));
        changes.push(Step::write(entry + 8, 4, 0x50 + round % 8));
        changes.push(Step::write(entry, 4, 0xfee0_0000 | (round % 4) << 12));
        changes.extend([Step::read(driver.window + PENDING, 8), Step::read(entry, 8)]);
        changes.push(Step::write(driver.window + TABLE + 16 * 200, 4, 1));
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

/// A driver that finds the device anew is served.
fn recovers(rig: &Rig, after: &str) {
    // As podvmm placed it: each in its part of the window.
    for device in 1..4 {
        rig.puppet.run(&write(device, COMMAND, 0));
        let place = WINDOW + u64::from(device) * PART;
        rig.puppet.run(&write(device, BAR, place));
    }
    serve(rig, after);
}
