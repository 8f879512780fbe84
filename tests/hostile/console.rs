//! The console: a port's two queues, and the control messages of several ports.

use std::fs;

use crate::driver::{Buffer, Driver, LARGE, Subject};
use crate::rig::{Rig, plain};
use crate::suite;
use tests::podvmm::kvm_is_here;

use Buffer::{In, Out, OutAt};

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

#[derive(Debug)]
struct Console {
    /// Several ports were negotiated.
    multiport: bool,
}

impl Subject for Console {
    fn name(&self) -> &'static str {
        if self.multiport {
            "console, ports"
        } else {
            "console"
        }
    }

    fn id(&self) -> u32 {
        3
    }

    fn queues(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        if self.multiport { 2 } else { 0 }
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let path = driver.rig.folder.path().join("console");
        let len = || fs::metadata(&path).expect("podvmm has made it").len();
        let before = len();
        driver
            .send(1, &[Out(b"well?\n".to_vec())], after)
            .answer(after);
        // What was sent earlier may come before it.
        assert!(len() >= before + 6, "{after}: nothing was printed");
        if self.multiport {
            let ready = message(0, 0, 1);
            driver
                .send(CONTROL_TRANSMIT, &[Out(ready)], after)
                .answer(after);
            let told = driver.send(CONTROL_RECEIVE, &[In(64)], after);
            assert_eq!(told.answer(after)[..8], message(0, 1, 0), "{after}");
        }
        // A file grows for as long as the guest writes, as the host has it.
        fs::write(&path, []).expect("it is the test's");
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (1, vec![Out(b"hello\n".to_vec())])
    }

    fn looked_at(&self) -> Vec<u16> {
        if self.multiport {
            vec![1, CONTROL_TRANSMIT]
        } else {
            vec![1]
        }
    }
}

/// A message of the control queues: port, event, value.
fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

fn options(folder: &std::path::Path) -> Vec<String> {
    let console = format!("file={}", plain(&folder.join("console")));
    vec!["--console".into(), console]
}

#[test]
fn the_console() {
    suite::run(options, &Console { multiport: false }, |driver| {
        let cases: [(&str, Vec<Buffer>); 7] = [
            ("nothing to print", vec![Out(Vec::new())]),
            ("room to print", vec![In(64)]),
            ("some of both", vec![Out(b"x".to_vec()), In(64)]),
            ("a MiB", vec![OutAt(LARGE, 1 << 20)]),
            ("a MiB in eight parts", vec![OutAt(LARGE, 1 << 17); 8]),
            ("16 MiB", vec![OutAt(LARGE, 16 << 20)]),
            (
                "the rings themselves",
                vec![OutAt(Driver::areas(1)[0], 0x9000)],
            ),
        ];
        let count = cases.len();
        for (name, request) in cases {
            driver.send(1, &request, name).answer(name);
            driver.recover(name);
        }
        count
    });
}

#[test]
fn the_consoles_ports() {
    suite::run(options, &Console { multiport: true }, |driver| {
        let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
        for event in [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x7fff, 0xffff] {
            for value in [0, 1, 2, 0xffff] {
                for port in [0, 1, 15, 16, 0x8000_0000, u32::MAX] {
                    let name = format!("event {event} of port {port:#x} with {value}");
                    cases.push((name, message(port, event, value)));
                }
            }
        }
        for len in 0..8 {
            cases.push((format!("a message of {len} bytes"), vec![0; len]));
        }
        cases.push(("a message and a page".into(), vec![0; 4096]));
        let count = cases.len();
        for (index, (name, bytes)) in cases.into_iter().enumerate() {
            driver
                .send(CONTROL_TRANSMIT, &[Out(bytes)], &name)
                .answer(&name);
            if index % 8 == 0 {
                // With all that was asked for still to be told.
                driver.start();
                driver.subject.good(driver, &name);
            }
        }
        driver.start();
        count
    });
}

/// As in `vmm/src/console/streams.rs`: what a guest can have appended to a console's file.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A guest that prints without end: the file has an end, and the guest goes on.
#[test]
fn a_file_takes_no_more_than_is_said_of_what_is_printed() {
    if !kvm_is_here() {
        return;
    }
    let subject = Console { multiport: false };
    let rig = suite::warmed(Rig::boot(options), &subject);
    let driver = Driver::new(&rig, &subject);
    driver.start();
    let before = rig.private_bytes();
    for _ in 0..6 {
        let printed = driver.send(1, &[OutAt(LARGE, 16 << 20)], "16 MiB");
        printed.answer("16 MiB");
    }
    let path = rig.folder.path().join("console");
    let file = fs::metadata(&path).expect("podvmm has made it").len();
    assert!(
        (MAX_FILE_BYTES..MAX_FILE_BYTES + 200).contains(&file),
        "{file} bytes"
    );
    let grown = rig.private_bytes().saturating_sub(before);
    assert!(grown < 1 << 20, "podvmm has {grown} bytes more");
    // When another program has emptied it, there is room again.
    fs::write(&path, []).expect("it is the test's");
    subject.good(&driver, "the file was emptied");
    rig.finish();
}
