//! Guests that end their VM: it ends with its reason, whatever its devices are at.

use tests::podvmm::kvm_is_here;

use crate::driver::{Buffer, Driver, QUEUE_NOTIFY, SIZE, Subject};
use crate::puppet::{Op, SCRATCH_CODE, Step};
use crate::rig::Rig;

/// Exit codes of a VM (podvmm --help): it reset or halted, KVM could not go on, it triple-faulted.
const RESET: i32 = 0;
const KVM: i32 = 120;
const TRIPLE_FAULT: i32 = 121;

#[derive(Debug)]
struct Rng;

impl Subject for Rng {
    fn name(&self) -> &'static str {
        "an end"
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

/// Code that ends the guest, and the exit codes that this may have.
type Case = (&'static str, &'static [u8], &'static [i32]);

/// An empty interrupt descriptor table comes first: `push 0; push 0; lidt [rsp]`.
const ENDS: [Case; 9] = [
    ("a reset", &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], &[RESET]),
    ("a halt", &[0xfa, 0xf4, 0xeb, 0xfd], &[RESET]),
    (
        "an undefined instruction without a handler",
        &[0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b],
        &[TRIPLE_FAULT],
    ),
    (
        "a jump to a window without a handler",
        &[0xb8, 0, 0, 0, 0xc0, 0xff, 0xe0],
        &[KVM, TRIPLE_FAULT],
    ),
    (
        "a jump to where nothing is",
        &[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0],
        &[KVM, TRIPLE_FAULT],
    ),
    (
        "page tables in a window",
        &[0xb8, 0, 0, 0, 0xc0, 0x0f, 0x22, 0xd8, 0xeb, 0xfe],
        &[KVM, TRIPLE_FAULT],
    ),
    (
        "no page tables",
        &[0xb8, 0, 0, 0x70, 0, 0x0f, 0x22, 0xd8, 0xeb, 0xfe],
        &[KVM, TRIPLE_FAULT],
    ),
    (
        "a stack in a window, and a fault",
        &[0xbc, 0x80, 0, 0, 0xc0, 0x0f, 0x0b],
        &[KVM, TRIPLE_FAULT, -1],
    ),
    (
        "an INIT to itself",
        &[
            0xb9, 0x10, 0x03, 0xe0, 0xfe, 0xc7, 0x01, 0, 0, 0, 0, 0xb9, 0, 0x03, 0xe0, 0xfe, 0xc7,
            0x01, 0, 0x45, 0, 0, 0xeb, 0xfe,
        ],
        &[RESET, KVM, TRIPLE_FAULT],
    ),
];

#[test]
fn ends_have_their_reason() {
    if !kvm_is_here() {
        return;
    }
    for (name, code, codes) in ENDS {
        for busy in [false, true] {
            let rig = Rig::boot(|_| Vec::new());
            let subject = Rng;
            let driver = Driver::new(&rig, &subject);
            driver.start();
            rig.puppet.ram.write(SCRATCH_CODE, code);
            let mut steps = vec![Step::new(Op::Call, SCRATCH_CODE)];
            if busy {
                // With requests under way.
                driver.lay(0, &[Buffer::In(4096)]);
                (0..SIZE).for_each(|_| driver.publish(0, 0));
                steps.insert(0, driver.register(QUEUE_NOTIFY, 0).times(50, 0));
            }
            rig.puppet.begin(0, &steps);
            if codes.contains(&-1) && rig.is_done_soon() {
                // The fault was handled.
                rig.finish();
                continue;
            }
            let ended = rig.ended();
            let code = ended.code.expect("no signal ends it");
            assert!(codes.contains(&code), "{name}: {ended:?}");
        }
    }
}
