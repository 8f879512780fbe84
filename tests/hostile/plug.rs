//! Devices that come and go under a driver that does as it likes.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::{Value, json};
use tests::podvmm::kvm_is_here;
use tests::service::{get, put, refusal};

use crate::blk::{self, Disk};
use crate::driver::{Driver, STATUS, Subject};
use crate::pci;
use crate::puppet::Step;
use crate::rig::{PATIENCE, Rig, Transport, plain};

/// The registers by which a guest learns which devices came and which are to go: a bit for each.
const CAME: u16 = 0xae00;
const LEAVING: u16 = 0xae04;
/// Devices that come and go while another CPU is at their registers.
const STORM: usize = 60;

const DISK: Disk = Disk { readonly: false };

fn boot() -> Option<Rig> {
    if !kvm_is_here() {
        return None;
    }
    let mut rig = Rig::boot_on(Transport::Pci, |folder| blk::boot(folder, ""));
    serve(&rig, "a start");
    rig.take_stock();
    Some(rig)
}

fn serve(rig: &Rig, after: &str) {
    let driver = Driver::new(rig, &DISK);
    driver.start();
    DISK.good(&driver, after);
}

fn remove(client: &mut Client) {
    let id = json!({"id": "disk0"});
    put(client, "vm.remove-device", Some(id)).expect("there is such a device");
}

fn add(client: &mut Client, folder: &Path) {
    let disk = json!({"path": plain(&folder.join("disk")), "num_queues": 2});
    put(client, "vm.add-disk", Some(disk)).expect("there is a place for it");
}

fn wait_until_gone(client: &mut Client) {
    let deadline = Instant::now() + PATIENCE;
    while get(client, "vm.info")["config"]["disks"] != Value::Null {
        assert!(Instant::now() < deadline, "the device does not go");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_device_goes_when_its_driver_lets_go_and_comes_again() {
    let Some(rig) = boot() else { return };
    let mut client = rig.client();
    let device = pci::find(&rig.puppet, DISK.id());
    let read = |port: u16| rig.puppet.run_one(Step::input(port, 4)).value & 0xffff_ffff;
    let driver = Driver::new(&rig, &DISK);
    driver.start();
    assert_eq!([read(CAME), read(LEAVING)], [0, 0]);
    remove(&mut client);
    remove(&mut client);
    assert_eq!(get(&mut client, "vm.info")["leaving"], json!(["disk0"]));
    for _ in 0..20 {
        DISK.good(&driver, "it was asked for its device");
    }
    assert_eq!(
        [read(LEAVING), read(LEAVING), read(CAME)],
        [1 << device, 0, 0]
    );
    driver.set(STATUS, 0);
    // A driver looks whether that is done, and the device is there for it until then.
    thread::sleep(Duration::from_millis(200));
    assert_eq!(get(&mut client, "vm.info")["leaving"], json!(["disk0"]));
    assert_eq!(driver.status(), 0);
    wait_until_gone(&mut client);
    // There is nothing where it was.
    let nothing = Step::read(driver.window, 4);
    assert_eq!(rig.puppet.run_one(nothing).value & 0xffff_ffff, 0xffff_ffff);
    rig.puppet
        .run_one(Step::write(driver.window + 0x3000, 2, 0));
    assert_eq!(pci::read(&rig.puppet, device, 0), 0xffff_ffff);

    add(&mut client, rig.folder.path());
    assert_eq!([read(CAME), read(CAME), read(LEAVING)], [1 << device, 0, 0]);
    assert_eq!(pci::find(&rig.puppet, DISK.id()), device);
    serve(&rig, "it came again");
    drop(client);
    rig.is_well("a device that went and came");
    rig.finish();
}

#[test]
fn devices_come_and_go_while_a_cpu_is_at_them() {
    let Some(rig) = boot() else { return };
    let mut client = rig.client();
    let device = pci::find(&rig.puppet, DISK.id());
    let window = Driver::new(&rig, &DISK).window;
    rig.puppet.start_second();
    let mut steps = Vec::new();
    for round in 0..64_u64 {
        // Memory on and off, the BAR there and elsewhere, a status as of a driver and none, and any register.
        steps.extend(pci::write(device, 0x04, 6 * (round & 1)));
        steps.extend(pci::write(device, 0x10, window + (round % 3) * 0x8000));
        steps.push(Step::write(window + 0x14, 1, round % 2));
        steps.push(Step::write(window + 0x3000, 2, 0));
        steps.push(Step::write(window + 0x4000 + 16 * (round % 4), 4, round));
        steps.push(Step::read(window + 4 * round, 4));
        steps.extend(pci::write(device, 0x40, 0x8000_0000));
        steps.extend(pci::write(
            device,
            4 * u32::try_from(round).expect("it is small"),
            round,
        ));
        steps.push(Step::input(CAME, 4));
        steps.push(Step::write(window + 0x14, 1, 0));
        steps.push(Step::read(window + 0x14, 1));
    }
    let driver = Driver::new(&rig, &DISK);
    driver.set(STATUS, 0);
    assert_eq!(driver.status(), 0);
    rig.puppet.begin(1, &steps);
    for _ in 0..STORM {
        if rig.puppet.is_done(1) {
            rig.puppet.begin(1, &steps);
        }
        remove(&mut client);
        wait_until_gone(&mut client);
        add(&mut client, rig.folder.path());
    }
    let gone = refusal(put(
        &mut client,
        "vm.remove-device",
        Some(json!({"id": "disk1"})),
    ));
    assert_eq!(gone.0, 404);
    assert!(rig.puppet.finish(1, steps.len()).is_some(), "it hangs");
    rig.puppet.stop_second();
    rig.puppet.run(&pci::write(device, 0x10, window));
    serve(&rig, "a storm");
    drop(client);
    rig.is_well("a storm");
    rig.finish();
}
