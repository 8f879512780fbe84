//! All that is done to one device, in one VM for each transport.

use std::path::Path;
use std::time::Instant;

use tests::podvmm::kvm_is_here;

use crate::driver::{Driver, Subject};
use crate::rig::{Rig, Transport};
use crate::{lifecycle, registers, rings};

/// Runs cases, and returns how many there were.
pub(crate) type Cases = fn(&Driver<'_>) -> usize;

/// Boots a VM with `options` for `test`, over one transport and then over the other.
pub(crate) fn on_each(options: impl Fn(&Path) -> Vec<String>, test: impl Fn(Rig)) {
    if kvm_is_here() {
        for transport in Transport::ALL {
            test(Rig::boot_on(transport, &options));
        }
    }
}

/// Does to the subject, in VMs with `options`, what can be done to each device, and then what `requests`
/// does.
pub(crate) fn run(options: impl Fn(&Path) -> Vec<String>, subject: &dyn Subject, requests: Cases) {
    on_each(options, |rig| run_in(rig, subject, requests));
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
    for (part, cases) in parts {
        warm_up(&driver);
        let start = Instant::now();
        let count = cases(&driver);
        let (name, transport) = (subject.name(), rig.transport);
        let took = start.elapsed().as_millis();
        println!("{name} over {transport:?}: {part}: {count} cases, {took} ms");
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
