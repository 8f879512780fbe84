//! Network devices: one with a pair of queues, and one with two pairs and a control queue.

use std::cell::Cell;
use std::path::Path;

use tests::network::{alone, set_up};

use crate::driver::{BUFFERS, Buffer, Driver, LARGE, Subject, Verdict};
use crate::suite;
use crate::wire::{Wire, frame};

use Buffer::{In, InAt, Out, OutAt};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 4;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;

#[derive(Debug)]
struct Net {
    /// Two pairs of queues, and buffers that are merged.
    multi: bool,
    wire: Wire,
    number: Cell<u32>,
}

impl Net {
    fn next(&self) -> Vec<u8> {
        self.number.set(self.number.get() + 1);
        frame(self.number.get())
    }
}

/// A frame with the header in front of it.
fn packet(header: &[u8; HEADER], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

impl Subject for Net {
    fn name(&self) -> &'static str {
        if self.multi { "net, two pairs" } else { "net" }
    }

    fn id(&self) -> u32 {
        1
    }

    fn queues(&self) -> u16 {
        if self.multi { 5 } else { 2 }
    }

    /// MRG_RXBUF, CTRL_VQ and MQ.
    fn features(&self) -> u64 {
        if self.multi {
            1 << 15 | 1 << 17 | 1 << 22
        } else {
            0
        }
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let out = self.next();
        driver
            .send(TRANSMIT, &[Out(packet(&[0; HEADER], &out))], after)
            .answer(after);
        self.wire.expect(&out, after);
        let expected = self.next();
        self.wire.send(&expected);
        // Frames of earlier cases may come first.
        loop {
            let bytes = driver.send(RECEIVE, &[In(2048)], after).answer(after);
            if bytes[HEADER..].starts_with(&expected) {
                return;
            }
        }
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (TRANSMIT, vec![Out(packet(&[0; HEADER], &frame(0)))])
    }

    fn looked_at(&self) -> Vec<u16> {
        if self.multi {
            vec![2, CONTROL]
        } else {
            vec![RECEIVE, TRANSMIT]
        }
    }
}

fn run(multi: bool, requests: fn(&Driver<'_>) -> usize) {
    alone(move || {
        let pairs = if multi { 2 } else { 1 };
        let net = format!("tap=hostile0,mac=02:00:00:00:00:09,queues={pairs}");
        let options = |_: &Path| vec!["--net".into(), net.clone()];
        suite::on_each(options, |rig| {
            set_up("hostile0", "192.0.2.1/24");
            let subject = Net {
                multi,
                wire: Wire::open("hostile0"),
                number: Cell::new(1),
            };
            suite::run_in(rig, &subject, requests);
        });
    });
}

#[test]
fn a_network_device() {
    run(false, |driver| frames(driver) + rooms(driver));
}

#[test]
fn a_network_device_of_two_pairs() {
    run(true, |driver| rooms(driver) + commands(driver));
}

/// Frames that are none, or that the header says more of than is true.
fn frames(driver: &Driver<'_>) -> usize {
    let mut cases: Vec<(String, Vec<Buffer>)> = Vec::new();
    for len in 0..=HEADER + 15 {
        cases.push((format!("a frame of {len} bytes"), vec![Out(vec![0; len])]));
    }
    for flags in [0, 1, 2, 4, 0xff] {
        for kind in [0, 1, 2, 3, 4, 5, 0x80, 0x81, 0x84, 0xff] {
            for numbers in [0, 1, 60, 0x7fff, 0xffff_u16] {
                let [low, high] = numbers.to_le_bytes();
                let header = [
                    flags, kind, low, high, low, high, low, high, low, high, 0, 0,
                ];
                let name = format!("flags {flags:#x}, segments {kind:#x}, all else {numbers}");
                cases.push((name, vec![Out(packet(&header, &[0x45; 200]))]));
            }
        }
    }
    let many: [(&str, Vec<Buffer>); 7] = [
        ("a frame of 64 KiB", vec![OutAt(LARGE, 0x1_0000)]),
        ("a frame of a MiB", vec![OutAt(LARGE, 1 << 20)]),
        (
            "a frame of more than a MiB",
            vec![OutAt(LARGE, (1 << 20) + 1)],
        ),
        ("a frame of 32 MiB", vec![OutAt(LARGE, 32 << 20)]),
        ("a frame in eight parts", vec![Out(vec![0; 9]); 8]),
        ("a frame to be written", vec![InAt(LARGE, 200)]),
        ("a frame and room", vec![Out(vec![0; 72]), In(72)]),
    ];
    cases.extend(many.map(|(name, request)| (name.to_owned(), request)));
    let count = cases.len();
    for (name, request) in cases {
        driver.send(TRANSMIT, &request, &name).answer(&name);
        driver.recover(&name);
    }
    count
}

/// Buffers for frames that have no room for one.
fn rooms(driver: &Driver<'_>) -> usize {
    let cases: [(&str, Vec<Buffer>); 12] = [
        ("no room", vec![In(0)]),
        ("a byte", vec![In(1)]),
        ("less than the header", vec![In(11)]),
        ("the header alone", vec![In(12)]),
        ("a byte behind the header", vec![In(13)]),
        ("the header in parts", vec![In(5), In(7)]),
        ("less than the frame", vec![In(40)]),
        ("bytes to read", vec![Out(vec![0; 100])]),
        ("bytes to read and room", vec![Out(vec![0; 100]), In(100)]),
        ("eight parts", vec![In(3); 8]),
        ("more than a MiB", vec![InAt(LARGE, 2 << 20)]),
        (
            "the queue's own areas",
            vec![InAt(Driver::areas(RECEIVE)[0], 0x9000)],
        ),
    ];
    let wire = Wire::open("hostile0");
    let count = cases.len();
    for (number, (name, request)) in (1..).zip(cases) {
        driver.start();
        for first in [0, 0, 0] {
            driver.lay_from(RECEIVE, first, BUFFERS, &request);
            driver.publish(RECEIVE, first);
        }
        driver.kick(RECEIVE);
        (0..4).for_each(|_| wire.send(&frame(1_000_000 + number)));
        driver.rig.client();
        driver.start();
        driver.subject.good(driver, name);
    }
    count
}

/// Commands of the control queue.
fn commands(driver: &Driver<'_>) -> usize {
    const PAIRS: [u8; 2] = [4, 0];
    let mut cases = Vec::new();
    for class in [0, 1, 2, 3, 4, 5, 6, 0xff] {
        for command in [0, 1, 2, 5, 0xff] {
            if [class, command] != PAIRS {
                cases.push((vec![class, command, 1, 0], 1));
            }
        }
    }
    for (pairs, ack) in [
        (0, 1),
        (1, 0),
        (2, 0),
        (3, 1),
        (0x100, 1),
        (0x8000, 1),
        (0xffff, 1),
    ] {
        let pairs = u16::to_le_bytes(pairs);
        cases.push((vec![4, 0, pairs[0], pairs[1]], ack));
        cases.push((vec![4, 0, pairs[0], pairs[1], 0, 0, 0, 0], ack));
    }
    for len in 0..4 {
        cases.push((vec![4; len], 1));
    }
    let count = cases.len() + 2;
    for (bytes, ack) in cases {
        let name = format!("command {bytes:?}");
        let answer = driver.send(CONTROL, &[Out(bytes), In(1)], &name);
        assert_eq!(answer.answer(&name), [ack], "{name}");
        // Frames come on both pairs, or on the first again.
        driver.start();
        driver.subject.good(driver, &name);
    }
    for request in [vec![Out(vec![4, 0, 1, 0])], vec![In(1)]] {
        let Verdict::Answered(..) = driver.send(CONTROL, &request, "half a command") else {
            panic!("net: half a command: the device asks for a reset");
        };
        driver.recover("half a command");
    }
    count
}
