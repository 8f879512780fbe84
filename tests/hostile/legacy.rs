//! Ports: the serial port, the keyboard controller, the timer and interrupt controllers that KVM has, and
//! all where nothing is.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use tests::podvmm::kvm_is_here;

use crate::puppet::{Op, SCRATCH_CODE, Step};
use crate::rig::{PATIENCE, Rig};

const SERIAL: u16 = 0x3f8;
/// Ends the guest if 0xfe is written there.
const RESET: u16 = 0x64;

/// Puts the serial port back to where a byte that is written is sent, and sees one arrive.
fn good(rig: &Rig, after: &str) {
    let path = rig.folder.path().join("serial");
    fs::write(&path, []).expect("it is the test's");
    rig.puppet.run(&[
        Step::output(SERIAL + 3, 1, 3),
        Step::output(SERIAL + 4, 1, 0),
        Step::output(SERIAL + 1, 1, 0),
        Step::output(SERIAL, 1, b'!'.into()),
    ]);
    let start = Instant::now();
    while !fs::read(&path).expect("podvmm has made it").ends_with(b"!") {
        assert!(start.elapsed() < PATIENCE, "{after}: nothing is printed");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Does its worst, and returns how many cases that were.
type Cases = fn(&Rig) -> usize;

#[test]
fn ports() {
    if !kvm_is_here() {
        return;
    }
    let rig = Rig::boot(|_| Vec::new());
    good(&rig, "the start");
    let parts: [(&str, Cases); 5] = [
        ("every port", every_port),
        ("widths", widths),
        ("serial", serial),
        ("controllers", controllers),
        ("strings", strings),
    ];
    for (part, cases) in parts {
        let start = Instant::now();
        let count = cases(&rig);
        println!(
            "ports: {part}: {count} cases, {} ms",
            start.elapsed().as_millis()
        );
        rig.is_well(part);
    }
    rig.finish();
}

/// Each port up to the last of the old devices', and the last there are.
fn every_port(rig: &Rig) -> usize {
    let mut count = 0;
    for first in (0..0x1000_u16).step_by(0x100).chain([0x8000, 0xff00]) {
        // Behind the devices there is nothing, in any width.
        let widths = if first < 0x500 { &[1, 2, 4][..] } else { &[1] };
        for width in widths.iter().copied() {
            let reads = Step::input(first, width).times(0x100, 1);
            assert_eq!(rig.puppet.run_one(reads).faults, 0);
            // Of all values this one resets nothing.
            let writes = Step::output(first, width, 0x5a5a_5a5a).times(0x100, 1);
            assert_eq!(rig.puppet.run_one(writes).faults, 0);
            good(rig, &format!("ports from {first:#x} in {width} bytes"));
            count += 2;
        }
    }
    count
}

/// Where something is, in widths that it does not have, and across its ends.
fn widths(rig: &Rig) -> usize {
    let mut count = 0;
    let around = [
        0x5f, 0x60, 0x61, 0x62, 0x63, 0x65, 0x3f5, 0x3f6, 0x3f7, 0x3fd, 0x3ff, 0x400, 0xfffd,
    ];
    for port in around {
        for width in [2, 4] {
            for value in [0, 0xfe, 0xffff_ffff, 0xfefe_fefe] {
                let steps = [Step::output(port, width, value), Step::input(port, width)];
                rig.puppet.run(&steps);
                count += 1;
            }
        }
        good(rig, &format!("port {port:#x}"));
    }
    for width in [2, 4] {
        // Only in a byte is it the command.
        rig.puppet.run_one(Step::output(RESET, width, 0xfe));
        good(rig, "a reset that is too wide");
        count += 1;
    }
    for value in (0..=0xff).filter(|value| *value != 0xfe) {
        rig.puppet.run_one(Step::output(RESET, 1, value));
        count += 1;
    }
    good(rig, "commands of the keyboard controller");
    count
}

/// Registers of the serial port with all values, loops and interrupts that no handler waits for.
fn serial(rig: &Rig) -> usize {
    let mut count = 0;
    for register in 0..8 {
        for value in 0..=0xff {
            let port = SERIAL + register;
            rig.puppet
                .run(&[Step::output(port, 1, value), Step::input(port, 1)]);
            count += 1;
        }
        good(rig, &format!("serial register {register}"));
    }
    let storms: [&[Step]; 4] = [
        &[
            Step::output(SERIAL + 4, 1, 0x10),
            Step::output(SERIAL, 1, 1).times(300, 0),
        ],
        &[
            Step::output(SERIAL + 1, 1, 0xf),
            Step::output(SERIAL, 1, 1).times(300, 0),
        ],
        &[
            Step::output(SERIAL + 3, 1, 0x80),
            Step::output(SERIAL, 1, 0xff).times(300, 0),
        ],
        &[
            Step::output(SERIAL + 2, 1, 0xff).times(300, 0),
            Step::input(SERIAL, 1).times(300, 0),
        ],
    ];
    for storm in storms {
        rig.puppet.run(storm);
        good(rig, "a storm at the serial port");
        count += 1;
    }
    count
}

/// The timer in all modes with the shortest count, and the interrupt controllers with words that no driver
/// says. The CPU takes interrupts of the timer meanwhile.
fn controllers(rig: &Rig) -> usize {
    let mut count = 0;
    for mode in 0..8 {
        for (low, high) in [(0, 0), (1, 0), (2, 0), (0xff, 0xff)] {
            for channel in 0..3_u16 {
                rig.puppet.run(&[
                    Step::output(0x43, 1, u64::from(channel) << 6 | 0x30 | mode << 1),
                    Step::output(0x40 + channel, 1, low),
                    Step::output(0x40 + channel, 1, high),
                    Step::input(0x40 + channel, 1).times(4, 0),
                ]);
                count += 1;
            }
        }
        good(rig, &format!("the timer in mode {mode}"));
    }
    for command in 0..=0xff {
        rig.puppet.run(&[
            Step::output(0x20, 1, command),
            Step::output(0xa0, 1, command),
            Step::output(0x21, 1, command),
            Step::output(0xa1, 1, command),
            Step::input(0x20, 1),
            Step::input(0x4d0, 1),
            Step::output(0x4d0, 1, command),
        ]);
        count += 1;
    }
    rig.puppet
        .run(&[Step::output(0x21, 1, 0xff), Step::output(0xa1, 1, 0xff)]);
    good(rig, "commands of the interrupt controllers");
    count
}

/// OUTSB, OUTSW, OUTSD, INSB and INSD, by opcode and prefix.
pub(crate) const STRINGS: [(u8, &[u8]); 5] = [
    (0x6e, &[]),
    (0x6f, &[0x66]),
    (0x6f, &[]),
    (0x6c, &[]),
    (0x6d, &[]),
];

/// Code to be called that repeats one of these, from or to 0x600000.
pub(crate) fn string_code(opcode: u8, prefix: &[u8], count: u32, port: u16) -> Vec<u8> {
    // mov rsi/rdi, 0x600000; mov ecx, COUNT; mov dx, PORT; cld; rep; ret. RBX and above are the puppet's.
    let mut bytes = vec![0xbe, 0, 0, 0x60, 0, 0xbf, 0, 0, 0x60, 0, 0xb9];
    bytes.extend(count.to_le_bytes());
    bytes.extend([0x66, 0xba]);
    bytes.extend(port.to_le_bytes());
    bytes.extend([0xfc, 0xf3]);
    bytes.extend(prefix);
    bytes.extend([opcode, 0xc3]);
    bytes
}

/// `rep outsb` and `rep insb`, which KVM hands over as one access of many bytes.
fn strings(rig: &Rig) -> usize {
    let mut count = 0;
    for port in [
        SERIAL,
        SERIAL + 5,
        SERIAL + 7,
        0x60,
        RESET,
        0x40,
        0x80,
        0xffff,
    ] {
        for times in [0, 1, 2, 7, 8, 9, 1024] {
            for (opcode, prefix) in STRINGS {
                // None of the bytes is a reset.
                rig.puppet.ram.write(0x60_0000, &[0x21; 0x8000]);
                let code = string_code(opcode, prefix, times, port);
                rig.puppet.ram.write(SCRATCH_CODE, &code);
                let came = rig.puppet.run_one(Step::new(Op::Call, SCRATCH_CODE));
                assert_eq!(came.faults, 0, "port {port:#x} {times} times");
                count += 1;
            }
        }
        good(rig, &format!("strings at port {port:#x}"));
    }
    count
}
