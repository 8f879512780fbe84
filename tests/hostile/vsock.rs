//! The socket device: packets that are none, connections that are not there, and more of them than may be.

use std::cell::Cell;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use tests::podvmm::kvm_is_here;

use crate::driver::{BUFFERS, Buffer, Driver, LARGE, SIZE, Subject};
use crate::rig::{Rig, plain};
use crate::suite;

use Buffer::{In, Out, OutAt};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CID: u64 = 3;
const HOST: u64 = 2;
/// A port where a program of the host's listens.
const SERVED: u32 = 5000;
/// One where none does.
const FREE: u32 = 9;
const HEADER: usize = 44;

// Operations (virtio 1.3 §5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// `struct virtio_vsock_hdr`, and what follows it.
#[derive(Clone, Debug)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    payload: Vec<u8>,
}

impl Packet {
    fn new(op: u16, src_port: u32, dst_port: u32) -> Self {
        Self {
            src_cid: CID,
            dst_cid: HOST,
            src_port,
            dst_port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 0x1_0000,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    fn with(self, payload: &[u8]) -> Self {
        Self {
            len: u32::try_from(payload.len()).expect("it is short"),
            payload: payload.into(),
            ..self
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.src_cid.to_le_bytes().to_vec();
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

#[derive(Debug)]
struct Vsock {
    listener: UnixListener,
    /// The guest's port that is used next.
    port: Cell<u32>,
}

impl Vsock {
    fn next_port(&self) -> u32 {
        self.port.set(self.port.get() + 1);
        self.port.get()
    }

    /// Gives the device buffers until a packet comes that is for `port`. Returns its operation.
    fn hear(driver: &Driver<'_>, port: u32, after: &str) -> u16 {
        for _ in 0..1000 {
            let bytes = driver.send(RECEIVE, &[In(4096)], after).answer(after);
            let to = u32::from_le_bytes(bytes[20..24].try_into().expect("it has four bytes"));
            if to == port {
                return u16::from_le_bytes([bytes[30], bytes[31]]);
            }
        }
        panic!("vsock: {after}: no packet for port {port}");
    }
}

fn say(driver: &Driver<'_>, packet: &Packet, what: &str) {
    driver
        .send(TRANSMIT, &[Out(packet.bytes())], what)
        .answer(what);
}

impl Subject for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn id(&self) -> u32 {
        19
    }

    fn queues(&self) -> u16 {
        3
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let port = self.next_port();
        say(driver, &Packet::new(REQUEST, port, SERVED), after);
        assert_eq!(Self::hear(driver, port, after), RESPONSE, "{after}");
        say(
            driver,
            &Packet::new(DATA, port, SERVED).with(&port.to_le_bytes()),
            after,
        );
        say(driver, &Packet::new(RESET, port, SERVED), after);
        // Those of earlier cases may come first.
        loop {
            let (mut stream, _) = self.listener.accept().expect("it is called");
            let mut bytes = Vec::new();
            let read = stream.read_to_end(&mut bytes);
            if read.is_ok() && bytes == port.to_le_bytes() {
                return;
            }
        }
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        let packet = Packet::new(REQUEST, self.port.get(), FREE);
        (TRANSMIT, vec![Out(packet.bytes())])
    }

    fn looked_at(&self) -> Vec<u16> {
        vec![RECEIVE, TRANSMIT]
    }

    /// The device looks for buffers when it has something to say.
    fn provoke(&self, driver: &Driver<'_>, queue: u16) {
        driver.kick(queue);
        if queue == RECEIVE {
            let (transmit, request) = self.request();
            driver.lay_from(transmit, 0, BUFFERS + 0x8000, &request);
            driver.publish(transmit, 0);
            assert!(
                driver.kick_and_await(transmit, 1, "a call"),
                "the device asks for a reset"
            );
        }
    }
}

fn options(folder: &Path) -> Vec<String> {
    let socket = plain(&folder.join("vsock")).to_owned();
    vec!["--vsock".into(), format!("cid={CID},socket={socket}")]
}

#[test]
fn the_socket_device() {
    suite::on_each(options, converse);
}

fn converse(rig: Rig) {
    let path = rig.folder.path().join(format!("vsock_{SERVED}"));
    let subject = Vsock {
        listener: UnixListener::bind(path).expect("the folder is new"),
        port: Cell::new(10_000),
    };
    suite::run_in(rig, &subject, |driver| {
        headers(driver) + short(driver) + connected(driver) + floods(driver)
    });
}

/// Each operation and type, with and without a connection, and fields that make no sense.
fn headers(driver: &Driver<'_>) -> usize {
    let mut cases = Vec::new();
    for op in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x7fff, 0xffff] {
        for kind in [0, 1, 2, 3, 0xffff] {
            let packet = Packet {
                kind,
                ..Packet::new(op, 77, FREE)
            };
            cases.push((format!("operation {op} of type {kind}"), packet));
        }
    }
    let data = || Packet::new(DATA, 77, FREE);
    for cid in [0, 1, 2, 4, 0xffff_ffff, 1 << 32 | CID, u64::MAX] {
        let packet = Packet {
            src_cid: cid,
            ..Packet::new(REQUEST, 77, SERVED)
        };
        cases.push((format!("a call from {cid:#x}"), packet));
        let packet = Packet {
            dst_cid: if cid == HOST { CID } else { cid },
            ..Packet::new(REQUEST, 77, SERVED)
        };
        cases.push((format!("a call to {cid:#x}"), packet));
    }
    for len in [1, 2, 4096, 0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX] {
        cases.push((
            format!("{len} bytes that are not there"),
            Packet { len, ..data() },
        ));
    }
    for port in [0, 1, 1 << 30, (1 << 30) + 1, u32::MAX] {
        cases.push((format!("a call of {port}"), Packet::new(REQUEST, 77, port)));
        cases.push((
            format!("a call by {port}"),
            Packet::new(REQUEST, port, FREE),
        ));
    }
    let count = cases.len();
    for (name, packet) in cases {
        say(driver, &packet, &name);
        driver.recover(&name);
    }
    count
}

/// Packets without a whole header, and large ones.
fn short(driver: &Driver<'_>) -> usize {
    let whole = Packet::new(REQUEST, 78, FREE).bytes();
    let mut cases: Vec<(String, Vec<Buffer>)> = (0..HEADER)
        .map(|len| {
            (
                format!("{len} bytes of a header"),
                vec![Out(whole[..len].to_vec())],
            )
        })
        .collect();
    cases.push(("room for a header".into(), vec![In(44)]));
    cases.push((
        "a header and room".into(),
        vec![Out(whole.clone()), In(4096)],
    ));
    let parts: Vec<Buffer> = whole.chunks(6).map(|part| Out(part.to_vec())).collect();
    cases.push(("a header in eight parts".into(), parts));
    cases.push((
        "a header and a MiB".into(),
        vec![Out(whole.clone()), OutAt(LARGE, 1 << 20)],
    ));
    cases.push((
        "a header and 32 MiB".into(),
        vec![Out(whole), OutAt(LARGE, 32 << 20)],
    ));
    let count = cases.len();
    for (name, request) in cases {
        driver.send(TRANSMIT, &request, &name).answer(&name);
        driver.recover(&name);
    }
    count
}

/// What is said, made of a packet of a connection.
type Packets = fn(Packet) -> Vec<Packet>;

/// What a guest says on a connection of its own.
fn connected(driver: &Driver<'_>) -> usize {
    let packets: [(&str, Packets); 14] = [
        ("a second call", |it| vec![Packet { op: REQUEST, ..it }]),
        ("a response that is not asked for", |it| {
            vec![Packet { op: RESPONSE, ..it }]
        }),
        ("a shutdown of nothing", |it| {
            vec![Packet {
                op: SHUTDOWN,
                flags: 0,
                ..it
            }]
        }),
        ("a shutdown of what does not exist", |it| {
            vec![Packet {
                op: SHUTDOWN,
                flags: u32::MAX,
                ..it
            }]
        }),
        ("data after a shutdown", |it| {
            vec![
                Packet {
                    op: SHUTDOWN,
                    flags: 2,
                    ..it.clone()
                },
                it.with(b"late"),
            ]
        }),
        ("an operation that does not exist", |it| {
            vec![Packet { op: 99, ..it }]
        }),
        ("another type", |it| vec![Packet { kind: 2, ..it }]),
        ("more data than the packet has", |it| {
            vec![Packet { len: 100, ..it }]
        }),
        ("more data than there is room for", |it| {
            vec![it.with(&[7; 0x7000]); 4]
        }),
        ("a window of nothing", |it| {
            vec![Packet {
                op: CREDIT_UPDATE,
                buf_alloc: 0,
                ..it
            }]
        }),
        ("more taken than was sent", |it| {
            vec![Packet {
                op: CREDIT_UPDATE,
                fwd_cnt: u32::MAX,
                buf_alloc: u32::MAX,
                ..it
            }]
        }),
        ("many requests for credit", |it| {
            vec![
                Packet {
                    op: CREDIT_REQUEST,
                    ..it
                };
                40
            ]
        }),
        ("resets", |it| vec![Packet { op: RESET, ..it }; 3]),
        ("data from another port", |it| {
            vec![Packet { src_port: 1, ..it }.with(b"x")]
        }),
    ];
    let count = packets.len();
    for (number, (name, packets)) in (20_000..).zip(packets) {
        say(driver, &Packet::new(REQUEST, number, SERVED), name);
        for packet in packets(Packet::new(DATA, number, SERVED)) {
            say(driver, &packet, name);
        }
        // The host's program is not to find it in its way.
        say(driver, &Packet::new(RESET, number, SERVED), name);
        driver.recover(name);
        driver.start();
    }
    count
}

/// Calls without end, and no buffer for what the device has to say: it stops to hear the guest, and holds
/// no more than it may.
fn floods(driver: &Driver<'_>) -> usize {
    for (name, port) in [
        ("calls of a port that is free", FREE),
        ("calls of a program", SERVED),
    ] {
        let before = driver.rig.descriptors();
        let mut guest_port = 30_000;
        for _ in 0..200 {
            for slot in 0..SIZE {
                guest_port += 1;
                let packet = Packet::new(REQUEST, guest_port, port);
                let buffers = BUFFERS + 0x100 * u64::from(slot);
                driver.lay_from(TRANSMIT, slot, buffers, &[Out(packet.bytes())]);
                driver.publish(TRANSMIT, slot);
            }
            driver.kick(TRANSMIT);
            if !comes_to(driver, driver.available(TRANSMIT)) {
                break;
            }
        }
        let opened = driver.rig.descriptors() - before;
        assert!(opened <= 1100, "{name}: {opened} descriptors");
        driver.rig.client();
        driver.start();
        driver.subject.good(driver, name);
    }
    2
}

/// Whether the device takes all that is queued within a while.
fn comes_to(driver: &Driver<'_>, index: u16) -> bool {
    for _ in 0..100 {
        if driver.used(TRANSMIT) == index {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

/// As in `devices/src/virtio/vsock`: connections that a guest may have opened, and the bytes of each that wait
/// while the host's program takes none.
const MAX_OF_GUEST: u64 = 1024;
const WINDOW: u64 = 64 << 10;
/// What podvmm may have besides for each: the connection itself, and where it is listed.
const CONNECTION: u64 = 1 << 10;

/// As many connections as there may be, each with as much under way as it may have.
#[test]
fn full_connections_take_no_more_than_is_said() {
    if !kvm_is_here() {
        return;
    }
    let rig = Rig::boot(options);
    let path = rig.folder.path().join(format!("vsock_{SERVED}"));
    let listener = UnixListener::bind(path).expect("the folder is new");
    let waiting = listener.try_clone().expect("there are descriptors");
    let subject = Vsock {
        listener: waiting,
        port: Cell::new(10_000),
    };
    let mut rig = suite::warmed(rig, &subject);
    let driver = Driver::new(&rig, &subject);
    driver.start();
    let before = rig.private_bytes();
    // The program takes calls, and nothing that is said.
    let mut callers = Vec::new();
    let mut packets = None;
    for port in (40_000..).take(usize::try_from(MAX_OF_GUEST).expect("it is small")) {
        say(&driver, &Packet::new(REQUEST, port, SERVED), "a call");
        let answer = Vsock::hear(&driver, port, "a call");
        assert_eq!(answer, RESPONSE, "call {port}");
        callers.push(listener.accept().expect("it is called"));
        let most = *packets.get_or_insert_with(|| until_full(&driver, port));
        (0..most).for_each(|_| say(&driver, &piece(port), "data"));
    }
    say(&driver, &Packet::new(REQUEST, 39_999, SERVED), "one more");
    assert_eq!(Vsock::hear(&driver, 39_999, "one more"), RESET);
    let grown = rig.private_bytes().saturating_sub(before);
    let most = MAX_OF_GUEST * (WINDOW + CONNECTION);
    println!("vsock: {MAX_OF_GUEST} full connections take {grown} bytes, {most} at most");
    assert!(
        (most / 2..=most).contains(&grown),
        "{grown} of {most} bytes"
    );
    drop(callers);
    driver.start();
    subject.good(&driver, "full connections");
    // The allocator keeps what was freed, for the next ones.
    rig.take_stock();
    rig.finish();
}

/// Bytes of one packet of those that fill a connection.
const PIECE: u32 = 16 << 10;

fn piece(port: u32) -> Packet {
    Packet::new(DATA, port, SERVED).with(&[7; PIECE as usize])
}

/// How many pieces a connection takes whose program takes none, found by one that is used up for it.
fn until_full(driver: &Driver<'_>, like: u32) -> usize {
    let port = like - 20_000;
    say(driver, &Packet::new(REQUEST, port, SERVED), "a call");
    assert_eq!(Vsock::hear(driver, port, "a call"), RESPONSE);
    let mut sent = 0;
    loop {
        say(driver, &Packet::new(CREDIT_REQUEST, port, SERVED), "credit");
        let taken = credit(driver, port);
        if sent - taken + u64::from(PIECE) > WINDOW {
            say(driver, &Packet::new(RESET, port, SERVED), "the end");
            return usize::try_from(sent).expect("it is small") / PIECE as usize;
        }
        say(driver, &piece(port), "data");
        sent += u64::from(PIECE);
    }
}

/// How much the host's program was given, as the device says.
fn credit(driver: &Driver<'_>, port: u32) -> u64 {
    loop {
        let bytes = driver.send(RECEIVE, &[In(4096)], "credit").answer("credit");
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if (word(20), word(28) >> 16) == (port, CREDIT_UPDATE.into()) {
            return word(40).into();
        }
    }
}
