//! The CPU and what belongs to it: model-specific registers, CPUID, local APICs and the IOAPIC. KVM has
//! them, so the question is what reaches podvmm, and whether devices are served afterwards.

use std::time::Instant;

use tests::podvmm::kvm_is_here;

use crate::driver::{Buffer, Driver, INTERRUPT_ACK, Subject};
use crate::puppet::{Op, Step};
use crate::rig::Rig;

const LOCAL_APIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// The first device's line.
const FIRST_PIN: u64 = 5;
const VECTOR: u64 = 0x50;

/// The entropy device, which has an interrupt and no other state.
#[derive(Debug)]
struct Witness;

impl Subject for Witness {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn id(&self) -> u32 {
        4
    }

    fn queues(&self) -> u16 {
        1
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        driver.send(0, &[Buffer::In(16)], after).answer(after);
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (0, vec![Buffer::In(16)])
    }
}

fn in_a_vm(part: &str, cases: fn(&Driver<'_>) -> usize) {
    if !kvm_is_here() {
        return;
    }
    let rig = Rig::boot(|_| Vec::new());
    let driver = Driver::new(&rig, &Witness);
    driver.start();
    let start = Instant::now();
    let count = cases(&driver);
    println!(
        "cpu: {part}: {count} cases, {} ms",
        start.elapsed().as_millis()
    );
    driver.recover(part);
    driver.set(crate::driver::STATUS, 0);
    rig.is_well(part);
    rig.finish();
}

/// Ranges of model-specific registers: Intel's, AMD's, KVM's and those of other hypervisors.
const RANGES: [(u64, u32); 9] = [
    (0, 0x800),
    (0x800, 0x100),
    (0xc00, 0x400),
    (0x4000_0000, 0x200),
    (0x4b56_4d00, 0x20),
    (0xc000_0000, 0x400),
    (0xc001_0000, 0x400),
    (0xc001_1000, 0x100),
    (0xffff_ff00, 0x100),
];

#[test]
fn model_specific_registers_are_read() {
    in_a_vm("MSRs read", |driver| {
        for (first, count) in RANGES {
            let step = Step::new(Op::ReadMsr, first).times(count, 1);
            let came = driver.puppet().run_one(step);
            assert!(came.faults <= count.into(), "{came:?}");
            assert!(matches!(came.vector, None | Some(13)), "{came:?}");
            driver.recover(&format!("MSRs from {first:#x}"));
        }
        RANGES.iter().map(|(_, count)| *count as usize).sum()
    });
}

/// Those that end the CPU's own mode, or have KVM write to RAM, are left to other tests.
#[test]
fn model_specific_registers_are_written() {
    in_a_vm("MSRs written", |driver| {
        let apart = [0x1b, 0xc000_0080, 0xc000_0100, 0xc000_0101];
        let mut count = 0;
        for (first, len) in RANGES {
            for value in [0, 1, 0xff, 1 << 63, u64::MAX] {
                let all = (first..first + u64::from(len)).filter(|msr| !apart.contains(msr));
                let write = |msr| Step::new(Op::WriteMsr, msr).value(value);
                let steps: Vec<_> = all.map(write).collect();
                for came in driver.puppet().run(&steps) {
                    assert!(matches!(came.vector, None | Some(13)), "{came:?}");
                    count += 1;
                }
                driver.recover(&format!("MSRs from {first:#x} with {value:#x}"));
            }
        }
        // What was turned off or led elsewhere by that is the guest's.
        count
    });
}

#[test]
fn cpuid_is_asked_for_everything() {
    in_a_vm("CPUID", |driver| {
        let firsts = [
            0,
            0x4000_0000,
            0x4000_0100,
            0x8000_0000,
            0x8000_00f0,
            0x8fff_ffe0,
            0xffff_ffe0,
        ];
        let mut steps = Vec::new();
        for first in firsts {
            for subleaf in [0, 1, 2, 3, 63, 0xffff_ffff] {
                steps.push(Step::new(Op::Cpuid, first).value(subleaf).times(32, 1));
            }
        }
        let twice = [(); 2].map(|()| driver.puppet().run(&steps));
        assert_eq!(twice[0], twice[1], "it is the same each time");
        assert!(twice[0].iter().all(|came| came.faults == 0));
        steps.len() * 32
    });
}

#[test]
fn the_local_apic_is_written_everywhere() {
    in_a_vm("local APIC", |driver| {
        let mut count = 0;
        let mut steps = Vec::new();
        for offset in (0..0x400).step_by(0x10).chain([0xff0, 0xffc]) {
            for (width, shift) in [(1, 0), (2, 0), (8, 0), (4, 4), (4, 2), (4, 0)] {
                let at = LOCAL_APIC + offset + shift;
                if offset + shift + u64::from(width) > 0x1000 {
                    continue;
                }
                steps.push(Step::read(at, width));
                // Its commands, to send interrupts, are another test's.
                if ![0x300, 0x310].contains(&offset) {
                    steps
                        .extend([0, 0x1ff, 0xffff_ffff].map(|value| Step::write(at, width, value)));
                }
                count += 4;
            }
        }
        driver.puppet().run(&steps);
        driver.recover("the local APIC");
        count + interrupts_sent(driver)
    });
}

/// Interrupts that the CPU sends to itself and to CPUs that are not there, in all modes but those that
/// would start or stop it.
fn interrupts_sent(driver: &Driver<'_>) -> usize {
    let send = |high: u64, low: u64| {
        [
            Step::write(LOCAL_APIC + 0x310, 4, high),
            Step::write(LOCAL_APIC + 0x300, 4, low),
        ]
    };
    driver
        .puppet()
        .run_one(Step::write(LOCAL_APIC + 0xf0, 4, 0x1ff));
    let mut steps = Vec::new();
    for mode in [0, 1, 3, 4, 7] {
        for target in [0, 2 << 24, 0xfe << 24, 0xff << 24] {
            for bits in [0, 0x800, 0x4000, 0x8000, 0xc000] {
                for vector in [0, 0x0f, VECTOR, 0xff] {
                    // 0 is the CPU itself, whose NMI is an exception like others.
                    steps.extend(send(target, mode << 8 | bits | vector));
                }
            }
        }
    }
    let count = steps.len() / 2;
    driver.puppet().run(&steps);
    // Many at once, to itself, which it takes when it enables interrupts.
    let itself = send(0, 0x4_0000 | VECTOR);
    let before = driver.puppet().interrupts();
    // It takes all priorities again.
    let mut storm = vec![Step::write(LOCAL_APIC + 0x80, 4, 0)];
    storm.push(itself[1].times(3000, 0));
    storm.push(Step::new(Op::AwaitInterrupts, 0).value(before + 1));
    driver.puppet().run(&storm);
    driver.recover("interrupts that the CPU sends");
    count + 1
}

#[test]
fn the_ioapic_is_written_everywhere() {
    in_a_vm("IOAPIC", |driver| {
        let select = |register| Step::write(IOAPIC, 4, register);
        let mut count = 0;
        let mut steps = Vec::new();
        for register in 0..0x100 {
            for value in [0x1_0000, 0xffff_ffff, 0x1_50ff] {
                steps.push(select(register));
                steps.push(Step::read(IOAPIC + 0x10, 4));
                steps.push(Step::write(IOAPIC + 0x10, 4, value));
                count += 1;
            }
        }
        for offset in (0..0x100).step_by(4) {
            for width in [1, 2, 4, 8] {
                steps.push(Step::read(IOAPIC + offset, width));
                steps.push(Step::write(IOAPIC + offset, width, 0x1_0000));
                count += 1;
            }
        }
        driver.puppet().run(&steps);
        driver.recover("the IOAPIC");
        count + lines(driver)
    });
}

/// A device's line in each mode of delivery and of triggering, while its interrupts come.
fn lines(driver: &Driver<'_>) -> usize {
    let mut count = 0;
    driver
        .puppet()
        .run_one(Step::write(LOCAL_APIC + 0xf0, 4, 0x1ff));
    for delivery in [0, 1, 4, 7] {
        for trigger in [0, 1 << 15, 1 << 13, 1 << 15 | 1 << 13] {
            for target in [0, 0x0f << 24, 0xff << 24] {
                let low = VECTOR | delivery << 8 | trigger;
                driver.puppet().run(&redirect(low, target));
                (0..4).for_each(|_| driver.subject.good(driver, "a line"));
                driver.puppet().run_one(Step::new(Op::AwaitInterrupts, 0));
                count += 1;
            }
        }
    }
    // As a driver sets it: each answer is an interrupt, and thousands come.
    driver.puppet().run(&redirect(VECTOR, 0));
    for _ in 0..200 {
        let before = driver.puppet().interrupts();
        driver.subject.good(driver, "interrupts");
        driver.puppet().run(&[
            Step::new(Op::AwaitInterrupts, 0).value(before + 1),
            driver.register(INTERRUPT_ACK, 1),
        ]);
    }
    driver.puppet().run(&redirect(0x1_0000, 0));
    count + 1
}

/// Routes the first device's line.
fn redirect(low: u64, high: u64) -> [Step; 4] {
    let register = 0x10 + 2 * FIRST_PIN;
    [
        Step::write(IOAPIC, 4, register + 1),
        Step::write(IOAPIC + 0x10, 4, high),
        Step::write(IOAPIC, 4, register),
        Step::write(IOAPIC + 0x10, 4, low),
    ]
}
