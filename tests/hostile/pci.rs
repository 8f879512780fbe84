//! The PCI bus: configuration space, BARs anywhere, and the capability by which a BAR is reached without memory.

use std::path::Path;

use tests::podvmm::kvm_is_here;

use crate::balloon::{self, Balloon};
use crate::driver::{self, Buffer, Driver, LIVE, Subject};
use crate::legacy;
use crate::puppet::{Op, Puppet, SCRATCH_CODE, Step};
use crate::rig::{Rig, Transport};
use crate::rng::Rng;

// Ports of configuration mechanism 1 (PCI 3.0 §3.2.2.3.2).
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
// Registers of configuration space.
const COMMAND: u32 = 0x04;
pub(crate) const BAR: u32 = 0x10;
const CAPABILITIES: u32 = 0x34;
/// Where podvmm has BARs, and how much of it is each device's at first.
pub(crate) const WINDOW: u64 = 0xe000_0000;
const PART: u64 = 0x80_0000;
const WINDOW_END: u64 = 0xfec0_0000;
const BAR_BYTES: u64 = 0x8000;
// What is where behind the BAR of podvmm's devices.
const QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
pub(crate) const QUEUE_SELECT: u64 = 0x16;
pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
pub(crate) const TABLE: u64 = 0x4000;
pub(crate) const PENDING: u64 = 0x5000;
const NOTHING: u64 = 0x6000;

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
        driver::STATUS => (STATUS, 1),
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

/// A guest whose entropy device is served, as whenever what podvmm holds is compared.
pub(crate) fn boot() -> Option<Rig> {
    boot_with(|_| Vec::new())
}

fn boot_with(options: impl FnOnce(&Path) -> Vec<String>) -> Option<Rig> {
    if !kvm_is_here() {
        return None;
    }
    let mut rig = Rig::boot_on(Transport::Pci, options);
    serve(&rig, "a start");
    rig.take_stock();
    Some(rig)
}

fn serve(rig: &Rig, after: &str) {
    let driver = Driver::new(rig, &Rng);
    driver.start();
    Rng.good(&driver, after);
}

/// A driver that finds the device anew is served.
pub(crate) fn recovers(rig: &Rig, after: &str) {
    let mut steps = Vec::new();
    // As podvmm placed them: each in its part of the window.
    for device in 1..4 {
        steps.extend(write(device, COMMAND, 0));
        let place = WINDOW + u64::from(device) * PART;
        steps.extend(write(device, BAR, place));
    }
    rig.puppet.run(&steps);
    serve(rig, after);
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

/// Addresses that name no function, and each register of the bridge, of a device, and of one that is not
/// there: whatever each port is told in each width, the device is served.
#[test]
fn configuration_space_takes_any_access() {
    let Some(rig) = boot() else { return };
    let enabled = 1 << 31;
    let device = find(&rig.puppet, Rng.id());
    let mut addresses = vec![
        0,
        u32::MAX,
        enabled | 1 << 24,
        enabled | 1 << 16,
        device << 11,
    ];
    addresses.extend([enabled | device << 11 | 1 << 8, enabled | device << 11 | 3]);
    for device in [0, device, 31] {
        let registers = (0..0x100).step_by(4);
        addresses.extend(registers.map(|register| enabled | device << 11 | register));
    }
    let accesses = (ADDRESS..DATA + 4).flat_map(|port| [1, 2, 4].map(|width| (port, width)));
    for address in &addresses {
        let mut steps = Vec::new();
        for (port, width) in accesses.clone() {
            for value in [0, u64::from(u32::MAX), WINDOW + 0x10_8006] {
                // The access before may have changed it.
                steps.push(Step::output(ADDRESS, 4, (*address).into()));
                steps.push(Step::output(port, width, value));
                steps.push(Step::output(ADDRESS, 4, (*address).into()));
                steps.push(Step::input(port, width));
            }
        }
        rig.puppet.run(&steps);
        recovers(&rig, &format!("any access to {address:#x}"));
    }
    let count = addresses.len() * 8 * 3 * 3;
    println!("pci: configuration space: {count} cases");
    rig.finish();
}

/// `rep outs` and `rep ins`, which KVM hands over as one access of many bytes.
#[test]
fn configuration_space_takes_strings() {
    let Some(rig) = boot() else { return };
    let device = find(&rig.puppet, Rng.id());
    for port in [ADDRESS, ADDRESS + 3, DATA, DATA + 2] {
        for times in [0, 1, 2, 3, 9, 1024] {
            for (opcode, prefix) in legacy::STRINGS {
                let code = legacy::string_code(opcode, prefix, times, port);
                rig.puppet.ram.write(SCRATCH_CODE, &code);
                let steps = [select(device, BAR), Step::new(Op::Call, SCRATCH_CODE)];
                assert_eq!(rig.puppet.run(&steps)[1].faults, 0, "port {port:#x}");
            }
        }
        recovers(&rig, "strings");
    }
    rig.finish();
}

/// BARs over RAM, over windows, over interrupt controllers and outside of everything.
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
        WINDOW - BAR_BYTES,
        WINDOW_END - BAR_BYTES,
        WINDOW_END,
        0xfee0_0000,
        0xfffb_8000,
        0xffff_8000,
    ];
    for start in others {
        let ram = rig.puppet.ram.bytes(0x300_0000, 0x8000);
        driver.start();
        let mut steps = write(device, BAR, start).to_vec();
        // As if the device were there, whatever else may be.
        if (WINDOW..WINDOW_END).contains(&start) {
            steps.extend([Step::write(start + NOTIFY, 2, 0), Step::read(start, 4)]);
        }
        // The versions of the local APIC, and of the I/O APIC by its index and its data.
        steps.push(Step::write(0xfec0_0000, 4, 1));
        steps.extend([Step::read(0xfee0_0030, 4), Step::read(0xfec0_0010, 4)]);
        let came = rig.puppet.run(&steps);
        let versions = [2, 1].map(|last| came[steps.len() - last].value & 0xff);
        assert_eq!(versions, [0x14, 0x11], "the APICs are where they were");
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

/// Of BARs on one another the lower device's answers, and both do when they are apart again.
#[test]
fn bars_on_one_another_are_one_devices() {
    let Some(rig) = boot_with(|_| balloon::options()) else {
        return;
    };
    let subjects: [&dyn Subject; 2] = [&Rng, &Balloon];
    let mut devices = subjects.map(|subject| {
        let driver = Driver::new(&rig, subject);
        (find(&rig.puppet, subject.id()), driver.window, subject)
    });
    devices.sort_by_key(|(device, ..)| *device);
    let [low, high] = devices;
    let queues = |at: u64| rig.puppet.run_one(Step::read(at + QUEUES, 2)).value;
    let is_served = |bar: u64, subject: &dyn Subject| {
        let driver = Driver::new(&rig, subject);
        assert_eq!(driver.window, bar);
        driver.start();
        subject.good(&driver, "BARs on one another");
        // The other device has its queues at the same place.
        driver.set(driver::STATUS, 0);
    };
    for ((device, bar, subject), (_, other, _)) in [(high, low), (low, high)] {
        rig.puppet.run(&write(device, BAR, other));
        assert_eq!(queues(bar), 0xffff, "{subject:?} is not where it was");
        let answers = u64::from(low.2.queues());
        assert_eq!(queues(other), answers, "the lower one is there");
        let notify = (0..4).map(|queue| Step::write(other + NOTIFY + 4 * queue, 2, 0));
        rig.puppet.run(&notify.collect::<Vec<_>>());
        is_served(other, low.2);
        rig.puppet.run(&write(device, BAR, bar));
        is_served(low.1, low.2);
        is_served(high.1, high.2);
    }
    serve(&rig, "BARs on one another");
    rig.finish();
}

/// One CPU notifies the device wherever it may be, and the other has it be here, there and nowhere.
#[test]
fn bars_move_while_the_device_is_notified() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let device = find(&rig.puppet, Rng.id());
    let places = [driver.window, WINDOW + 0x10_0000];
    driver.start();
    rig.puppet.start_second();
    let mut moves = Vec::new();
    for round in 0..20 {
        moves.extend(write(device, BAR, places[round % 2]));
        moves.extend(write(device, COMMAND, [0x6, 0, 0x2][round % 3]));
    }
    let uses = places.map(|bar| {
        [
            Step::write(bar + NOTIFY, 2, 0).times(20, 0),
            Step::read(bar + STATUS, 1).times(5, 0),
            Step::write(bar + TABLE + 12, 4, 1).times(5, 0),
        ]
    });
    let uses = uses.concat().repeat(20);
    rig.puppet.begin(1, &moves);
    rig.puppet.begin(0, &uses);
    for (cpu, steps) in [(0, uses.len()), (1, moves.len())] {
        assert!(rig.puppet.finish(cpu, steps).is_some(), "CPU {cpu} hangs");
    }
    rig.puppet.stop_second();
    recovers(&rig, "BARs that move");
    rig.finish();
}

/// The register of the capability by which a BAR is reached without memory (virtio 1.3 §4.1.4.9): bar, offset,
/// length and data follow.
fn access_capability(puppet: &Puppet, device: u32) -> u32 {
    let mut at: u32 = read(puppet, device, CAPABILITIES).to_le_bytes()[0].into();
    for _ in 0..10 {
        let [id, next, _, kind, ..] = read(puppet, device, at).to_le_bytes();
        if (id, kind) == (9, 5) {
            return at;
        }
        at = next.into();
    }
    panic!("there is no such capability");
}

/// Names what the capability is to reach, and has it read or write that by one port and width.
fn reach((device, at): (u32, u32), (bar, offset, len): (u64, u64, u64), access: Step) -> Vec<Step> {
    let mut steps = write(device, at + 4, bar).to_vec();
    steps.extend(write(device, at + 8, offset));
    steps.extend(write(device, at + 12, len));
    steps.extend([select(device, at + 16), access]);
    steps
}

#[test]
fn the_bar_is_reached_by_its_capability_and_nothing_else_is() {
    let Some(rig) = boot() else { return };
    let driver = Driver::new(&rig, &Rng);
    let device = find(&rig.puppet, Rng.id());
    let capability = (device, access_capability(&rig.puppet, device));
    let get = |place| {
        let steps = reach(capability, place, Step::input(DATA, 4));
        rig.puppet.run(&steps)[steps.len() - 1].value & 0xffff_ffff
    };
    let set = |place, value| {
        rig.puppet
            .run(&reach(capability, place, Step::output(DATA, 4, value)))
    };
    driver.start();
    assert_eq!([get((0, STATUS, 1)), get((0, QUEUES, 2))], [LIVE, 1]);
    // A request of which the device is told so.
    driver.lay(0, &[Buffer::In(32)]);
    driver.publish(0, 0);
    set((0, NOTIFY, 2), 0);
    assert!(driver.wait(0, 1, "a notification by the capability"));
    set((0, TABLE, 4), 0xfee0_0000);
    assert_eq!(get((0, TABLE, 4)), 0xfee0_0000, "the table is there, too");
    set((0, STATUS, 1), 0);
    assert_eq!(driver.status(), 0, "it is reset");

    let end = BAR_BYTES;
    let mut cases = vec![(1, 0, 4), (5, 0, 4), (6, STATUS, 1), (0xff, STATUS, 1)];
    cases.extend([0, 3, 5, 8, 0x100, 0xffff_ffff].map(|len| (0, STATUS, len)));
    cases.extend([end - 2, end, 0xffff_fffc, 0x1000_0000].map(|offset| (0, offset, 4)));
    cases.extend([(0, STATUS + 1, 2), (0, STATUS + 1, 4), (0, TABLE + 2, 4)]);
    // And all places that there are, which say what they say to any access.
    let whole = places().flat_map(|place| [1, 2, 4].map(|len| (0, place, len)));
    cases.extend(whole.filter(|place| *place != (0, STATUS, 1)));
    for place in &cases {
        driver.start();
        let mut steps = Vec::new();
        for value in [0, 0xffff_ffff] {
            for (port, width) in [(DATA, 4), (DATA, 1), (DATA + 1, 2), (DATA + 3, 1)] {
                steps.extend(reach(capability, *place, Step::output(port, width, value)));
                steps.extend(reach(capability, *place, Step::input(port, width)));
            }
        }
        let came = rig.puppet.run(&steps);
        assert!(came.iter().all(|step| step.faults == 0), "{place:x?}");
        driver.has_status(LIVE, &format!("{place:x?}"));
        Rng.good(&driver, "an access by the capability");
    }
    println!("pci: accesses by the capability: {} cases", cases.len());
    recovers(&rig, "accesses by the capability");
    rig.finish();
}
