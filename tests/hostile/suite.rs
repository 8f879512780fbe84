//! All that is done to one device, in one VM.

use std::path::Path;
use std::time::Instant;

use tests::podvmm::kvm_is_here;

use crate::driver::{Driver, Subject};
use crate::rig::{Rig, Transport};
use crate::{lifecycle, registers, rings};

/// Runs cases, and returns how many there were.
pub(crate) type Cases = fn(&Driver<'_>) -> usize;

/// Boots a VM with `options` and does to the subject what can be done to each device, and then what
/// `requests` does.
pub(crate) fn run(
    options: impl FnOnce(&Path) -> Vec<String>,
    subject: &dyn Subject,
    requests: Cases,
) {
    if kvm_is_here() {
        run_in(Rig::boot(options), subject, requests);
    }
}

/// The same with the devices on a PCI bus.
pub(crate) fn run_on_pci(
    options: impl FnOnce(&Path) -> Vec<String>,
    subject: &dyn Subject,
    requests: Cases,
) {
    if kvm_is_here() {
        run_in(Rig::boot_on(Transport::Pci, options), subject, requests);
    }
}

/// A rig whose stock is taken while the device is served.
pub(crate) fn warmed(mut rig: Rig, subject: &dyn Subject) -> Rig {
    warm_up(&Driver::new(&rig, subject));
    rig.take_stock();
    rig
}

pub(crate) fn run_in(rig: Rig, subject: &dyn Subject, requests: Cases) {
    let rig = warmed(rig, subject);
    let driver = Driver::new(&rig, subject);
    let parts: [(&str, Cases); 4] = [
        ("registers", registers::run),
        ("rings", rings::run),
        ("lifecycle", lifecycle::run),
        ("requests", requests),
    ];
    // Registers of a PCI bus are other ones.
    let first = usize::from(rig.transport == Transport::Pci);
    for (part, cases) in parts.into_iter().skip(first) {
        warm_up(&driver);
        let start = Instant::now();
        let count = cases(&driver);
        let name = subject.name();
        let took = start.elapsed().as_millis();
        println!("{name}: {part}: {count} cases, {took} ms");
        warm_up(&driver);
        rig.is_well(part);
    }
    rig.finish();
}

/// The device is served, as whenever what podvmm holds is compared.
fn warm_up(driver: &Driver<'_>) {
    driver.start();
    driver.subject.good(driver, "a start");
}
