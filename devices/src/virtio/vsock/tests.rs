mod conversation;
mod restore;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::connection::WINDOW;
use super::packet::*;
use super::{Vsock, VsockConfig};
use crate::virtio::testing::{Buffer, Guest, lifecycle};

const CID: u32 = 3;
const RX: usize = 0;
const TX: usize = 1;
const GUEST_WINDOW: u32 = 256 << 10;
/// Room the test's driver offers for one packet.
const ROOM: u32 = 4096;

struct Bench {
    folder: TempDir,
    guest: Guest,
}

impl Bench {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let guest = Guest::live(device(&folder));
        Self { folder, guest }
    }

    fn path(&self) -> PathBuf {
        self.folder.as_path().join("vsock")
    }

    /// A host's program that has connected and said what it wants.
    fn caller(&self, greeting: &str) -> UnixStream {
        caller(&self.folder, greeting)
    }

    /// Sends a packet of the guest's.
    fn say(&mut self, header: Header, payload: &[u8]) {
        say(&mut self.guest, header, payload);
    }

    /// The next packet for the guest, if there is one.
    fn hear(&mut self) -> Option<(Header, Vec<u8>)> {
        hear(&mut self.guest)
    }

    /// The next packet for the guest, which a timer may still hold back.
    fn wait(&mut self) -> Header {
        loop {
            if let Some((header, _)) = self.hear() {
                return header;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn hear_op(&mut self) -> Option<(Op, u32)> {
        let (header, _) = self.hear()?;
        Some((Op::of(header.op).unwrap(), header.flags))
    }

    /// A connection opened by a host's program to port 1024.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut stream = self.caller("CONNECT 1024\n");
        let (request, _) = self.hear().unwrap();
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1024));
        let answer = reply(&request, Op::Response);
        self.say(answer, &[]);
        let mut line = [0; 14];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(
            str::from_utf8(&line).unwrap(),
            format!("OK {}\n", request.src_port)
        );
        (stream, answer)
    }
}

fn device(folder: &TempDir) -> Vsock {
    let socket = folder.as_path().join("vsock");
    Vsock::new(VsockConfig { cid: CID, socket }).unwrap()
}

fn caller(folder: &TempDir, greeting: &str) -> UnixStream {
    let mut stream = UnixStream::connect(folder.as_path().join("vsock")).unwrap();
    stream.write_all(greeting.as_bytes()).unwrap();
    stream
}

fn say(guest: &mut Guest, header: Header, payload: &[u8]) {
    let len = u32::try_from(payload.len()).unwrap();
    let mut packet = Header { len, ..header }.to_bytes().to_vec();
    packet.extend_from_slice(payload);
    assert_eq!(guest.request(TX, &[Buffer::Out(packet)]), Some(vec![]));
}

fn hear(guest: &mut Guest) -> Option<(Header, Vec<u8>)> {
    // Buffers of an earlier try, which heard nothing, are still there.
    guest.settle();
    let packet = guest.take(RX).or_else(|| {
        if guest.in_flight(RX) == 0 {
            guest.add(RX, &[Buffer::In(ROOM)])?;
            guest.kick(RX);
            guest.settle();
        }
        guest.take(RX)
    })?;
    let (header, payload) = packet.split_first_chunk::<HEADER_LEN>().unwrap();
    let header = Header::parse(header);
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
    assert_eq!(header.len as usize, payload.len());
    Some((header, payload.to_vec()))
}

/// What the guest answers to `header`.
fn reply(header: &Header, op: Op) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: header.dst_port,
        dst_port: header.src_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_WINDOW,
        ..Header::default()
    }
}

fn from_guest(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_WINDOW,
        ..Header::default()
    }
}

fn with(header: Header, op: Op) -> Header {
    Header {
        op: op as u16,
        ..header
    }
}

fn is_at_its_end(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    // A reset is the end of a stream whose bytes were not all taken.
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn the_guest_reads_its_address() {
    let mut bench = Bench::new();
    assert_eq!(bench.guest.config::<8>(0), 3_u64.to_le_bytes());
}

#[test]
fn bytes_go_both_ways() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    stream.write_all(b"to the guest").unwrap();
    let (data, payload) = bench.hear().unwrap();
    assert_eq!(
        (data.op, payload.as_slice()),
        (Op::Data as u16, &b"to the guest"[..])
    );
    bench.say(with(header, Op::Data), b"to the host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn a_greeting_may_come_in_pieces_and_data_right_behind_it() {
    let mut bench = Bench::new();
    let mut stream = bench.caller("conn");
    assert_eq!(bench.hear(), None);
    stream.write_all(b"ect 7\nafter").unwrap();
    let (request, _) = bench.hear().unwrap();
    assert_eq!(request.dst_port, 7);
    assert_eq!(bench.hear(), None);
    bench.say(reply(&request, Op::Response), &[]);
    assert_eq!(bench.hear().unwrap().1, b"after");
}

#[test]
fn a_caller_that_says_nonsense_or_leaves_early_is_let_go() {
    let mut bench = Bench::new();
    let mut wrong = bench.caller("HELLO 1\n");
    let mut long = bench.caller(&"C".repeat(40));
    let mut early = bench.caller("CONNECT 10");
    early.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.hear(), None);
    assert!(is_at_its_end(&mut wrong) && is_at_its_end(&mut early));
    // What it had sent beyond the limit was not read.
    long.set_nonblocking(true).unwrap();
    assert!(long.read(&mut [0]).is_err());
}

#[test]
fn a_caller_that_leaves_before_the_guest_answers_is_called_off() {
    let mut bench = Bench::new();
    let stream = bench.caller("CONNECT 1024\n");
    let (request, _) = bench.hear().unwrap();
    drop(stream);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
    // The guest's answer comes too late.
    bench.say(reply(&request, Op::Response), &[]);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
}

#[test]
fn the_guest_is_asked_again_until_a_program_listens() {
    let mut bench = Bench::new();
    let mut stream = bench.caller("CONNECT 1024\n");
    for _ in 0..3 {
        let request = bench.wait();
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1024));
        bench.say(reply(&request, Op::Reset), &[]);
    }
    let request = bench.wait();
    bench.say(reply(&request, Op::Response), &[]);
    let mut line = [0; 3];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
}

#[test]
fn the_guest_reaches_who_listens_on_the_host() {
    let mut bench = Bench::new();
    let listener = UnixListener::bind(bench.folder.as_path().join("vsock_52")).unwrap();
    bench.say(from_guest(Op::Request, 9, 52), &[]);
    assert_eq!(bench.hear_op(), Some((Op::Response, 0)));
    let (mut stream, _) = listener.accept().unwrap();
    bench.say(from_guest(Op::Data, 9, 52), b"hello");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn a_port_without_a_listener_is_refused() {
    let mut bench = Bench::new();
    bench.say(from_guest(Op::Request, 9, 52), &[]);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset() {
    let mut bench = Bench::new();
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::CreditUpdate] {
        bench.say(from_guest(op, 9, 52), &[]);
        assert_eq!(bench.hear_op(), Some((Op::Reset, 0)), "{op:?}");
    }
    bench.say(from_guest(Op::Reset, 9, 52), &[]);
    assert_eq!(bench.hear(), None);
}

#[test]
fn packets_that_make_no_sense_are_answered_or_dropped() {
    let mut bench = Bench::new();
    let good = from_guest(Op::Data, 9, 52);
    bench.say(Header { kind: 2, ..good }, &[]);
    let (reset, _) = bench.hear().unwrap();
    assert_eq!((reset.op, reset.kind), (Op::Reset as u16, 2));
    bench.say(Header { op: 99, ..good }, &[]);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
    bench.say(Header { src_cid: 4, ..good }, &[]);
    bench.say(Header { dst_cid: 3, ..good }, &[]);
    assert_eq!(bench.hear(), None);
    let mut packet = good.to_bytes();
    packet[24] = 1; // one byte of payload that is not there
    bench.guest.request(TX, &[Buffer::Out(packet.to_vec())]);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
    bench
        .guest
        .request(TX, &[Buffer::Out(packet[..20].to_vec())]);
    assert_eq!(bench.hear(), None);
    assert_eq!(bench.guest.counters().errors.get(), 6);
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut bench = Bench::new();
    let (mut stream, mut header) = bench.connected();
    header.buf_alloc = 10;
    bench.say(with(header, Op::CreditUpdate), &[]);
    stream.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(bench.hear().unwrap().1, b"0123456789");
    assert_eq!(bench.hear_op(), Some((Op::CreditRequest, 0)));
    assert_eq!(bench.hear(), None);
    header.fwd_cnt = 10;
    bench.say(with(header, Op::CreditUpdate), &[]);
    assert_eq!(bench.hear().unwrap().1, b"abcdef");
}

#[test]
fn absurd_credit_is_no_credit() {
    let mut bench = Bench::new();
    let (mut stream, mut header) = bench.connected();
    // It says that it took what was never sent.
    header.fwd_cnt = 1;
    bench.say(with(header, Op::CreditUpdate), &[]);
    stream.write_all(b"x").unwrap();
    assert_eq!(bench.hear_op(), Some((Op::CreditRequest, 0)));
    assert_eq!(bench.hear(), None);
}

#[test]
fn the_guest_learns_what_was_taken_before_it_runs_dry() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    let half = vec![7; WINDOW as usize / 2];
    bench.say(with(header, Op::Data), &half);
    let (update, _) = bench.hear().unwrap();
    assert_eq!(update.op, Op::CreditUpdate as u16);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (WINDOW, WINDOW / 2));
    bench.say(with(header, Op::CreditRequest), &[]);
    assert_eq!(bench.hear_op(), Some((Op::CreditUpdate, 0)));
    stream.read_exact(&mut vec![0; half.len()]).unwrap();
}

#[test]
fn what_the_host_does_not_take_waits_and_a_guest_that_ignores_that_is_reset() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    let piece = vec![7; 32 << 10];
    let mut sent = 0;
    // The socket's own buffers fill up, then the window does.
    while bench.guest.counters().bytes_in.get() < 1 << 40 {
        bench.say(with(header, Op::Data), &piece);
        sent += piece.len();
        match bench.hear_op() {
            Some((Op::Reset, 0)) => break,
            Some((Op::CreditUpdate, 0)) | None => assert!(sent < 64 << 20),
            other => panic!("{other:?}"),
        }
    }
    let mut taken = Vec::new();
    stream.read_to_end(&mut taken).unwrap();
    assert!(taken.len() < sent && taken.iter().all(|byte| *byte == 7));
}

#[test]
fn what_waited_goes_on_when_the_host_reads_again() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    let piece = vec![7; 32 << 10];
    let mut sent = 0;
    let mut taken = 0;
    // Until a piece brings no credit: then it waits.
    loop {
        bench.say(with(header, Op::Data), &piece);
        sent += piece.len();
        match bench.hear() {
            Some((update, _)) => taken = update.fwd_cnt,
            None => break,
        }
    }
    assert!((taken as usize) < sent);
    bench.say(
        Header {
            flags: SHUTDOWN_SEND,
            ..with(header, Op::Shutdown)
        },
        &[],
    );
    stream.set_nonblocking(true).unwrap();
    let mut read = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(_) => bench.guest.settle(),
        }
    }
    assert_eq!(read, sent);
}

#[test]
fn either_side_may_end_its_half() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    stream.write_all(b"last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.hear().unwrap().1, b"last");
    assert_eq!(bench.hear_op(), Some((Op::Shutdown, SHUTDOWN_SEND)));
    bench.say(with(header, Op::Data), b"still");
    let shutdown = Header {
        flags: SHUTDOWN_BOTH,
        ..with(header, Op::Shutdown)
    };
    bench.say(shutdown, &[]);
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still");
}

#[test]
fn a_host_that_leaves_ends_both_halves_after_its_last_bytes() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    bench.say(with(header, Op::Data), b"not taken");
    assert_eq!(bench.hear().unwrap().1, b"bye");
    assert_eq!(bench.hear_op(), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    bench.say(with(header, Op::Reset), &[]);
    assert_eq!(bench.hear(), None);
    bench.say(with(header, Op::Data), b"x");
    assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
}

#[test]
fn a_reset_of_the_guests_ends_the_hosts_stream() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    bench.say(with(header, Op::Reset), &[]);
    assert!(is_at_its_end(&mut stream));
}

#[test]
fn many_connections_are_open_and_none_starves() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const COUNT: usize = 1000;
    // Both ends of each are this process's.
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum;
    setrlimit(Resource::Nofile, Rlimit { current, ..limit }).unwrap();
    let mut bench = Bench::new();
    let mut streams: Vec<_> = (0..COUNT).map(|_| bench.connected()).collect();
    for (stream, _) in &mut streams {
        stream.write_all(&[1; 3 * ROOM as usize]).unwrap();
    }
    // Each has had one packet before any has its second.
    let mut heard = std::collections::HashSet::new();
    for _ in 0..COUNT {
        let (header, _) = bench.hear().unwrap();
        assert!(
            heard.insert(header.src_port),
            "one has its second turn already"
        );
    }
    for (_, header) in &streams {
        bench.say(with(*header, Op::Reset), &[]);
    }
    for (stream, _) in &mut streams {
        assert!(is_at_its_end(stream));
    }
}

#[test]
fn a_guest_that_takes_no_resets_is_not_heard_until_it_does() {
    let mut bench = Bench::new();
    for port in 0..400 {
        let packet = from_guest(Op::Data, port, 1).to_bytes().to_vec();
        let _ = bench.guest.add(TX, &[Buffer::Out(packet)]);
        bench.guest.kick(TX);
        bench.guest.settle();
        while bench.guest.take(TX).is_some() {}
    }
    let heard = bench.guest.counters().bytes_out.get();
    assert_eq!(heard, 0);
    let mut resets = 0;
    while bench.hear_op().is_some() {
        resets += 1;
        while bench.guest.take(TX).is_some() {}
    }
    assert!(resets >= 256, "{resets}");
}

#[test]
fn the_device_lives_through_pause_and_reset() {
    let folder = TempDir::new().unwrap();
    lifecycle(
        || device(&folder),
        |guest| {
            let mut stream = caller(&folder, "CONNECT 1024\n");
            let (request, _) = hear(guest).unwrap();
            let header = reply(&request, Op::Response);
            say(guest, header, &[]);
            stream.write_all(b"ping").unwrap();
            assert_eq!(hear(guest).unwrap().1, b"ping");
            say(guest, with(header, Op::Reset), &[]);
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("OK "), "{text}");
        },
    );
}

#[test]
fn a_connection_goes_on_after_a_pause() {
    let mut bench = Bench::new();
    let (mut stream, header) = bench.connected();
    bench.guest.transport.pause().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    bench.guest.settle();
    bench.guest.transport.resume().unwrap();
    assert_eq!(bench.hear().unwrap().1, b"meanwhile");
    bench.say(with(header, Op::Data), b"x");
    stream.read_exact(&mut [0]).unwrap();
}

#[test]
fn the_socket_goes_with_its_device() {
    let bench = Bench::new();
    let path = bench.path();
    drop(bench);
    assert!(!path.exists());
}

/// A guest whose program does not read answers each question as Linux does: with the same credit.
#[test]
fn a_guest_without_room_is_asked_once_until_it_has_some() {
    let mut bench = Bench::new();
    let (mut stream, mut header) = bench.connected();
    header.buf_alloc = 4;
    bench.say(with(header, Op::CreditUpdate), &[]);
    stream.write_all(b"0123456789").unwrap();
    assert_eq!(bench.hear().unwrap().1, b"0123");
    assert_eq!(bench.hear_op(), Some((Op::CreditRequest, 0)));
    for _ in 0..10 {
        bench.say(with(header, Op::CreditUpdate), &[]);
        assert_eq!(bench.hear_op(), None);
    }
    header.fwd_cnt = 4;
    bench.say(with(header, Op::CreditUpdate), &[]);
    assert_eq!(bench.hear().unwrap().1, b"4567");
    assert_eq!(bench.hear_op(), Some((Op::CreditRequest, 0)));
    header.fwd_cnt = 8;
    bench.say(with(header, Op::CreditUpdate), &[]);
    assert_eq!(bench.hear().unwrap().1, b"89");
}

/// As many packets that are answered with a reset as may wait, and room for all the answers: the guest
/// is heard again although it neither kicks nor gives more room.
#[test]
fn a_guest_that_took_its_resets_is_heard_again() {
    for features in [u64::MAX, !(1 << VIRTIO_RING_F_EVENT_IDX)] {
        let mut bench = Bench::new();
        bench.guest.start(features, 256);
        while bench.guest.add(RX, &[Buffer::In(64)]).is_some() {}
        bench.guest.kick(RX);
        bench.guest.settle();
        let packet = |port| from_guest(Op::Data, port, 1).to_bytes().to_vec();
        for port in 0..256 {
            let queued = bench.guest.add(TX, &[Buffer::Out(packet(port))]);
            queued.expect("the queue has as many descriptors");
        }
        bench.guest.kick(TX);
        bench.guest.settle();
        let heard = std::iter::from_fn(|| bench.guest.take(TX)).count();
        let resets = std::iter::from_fn(|| bench.guest.take(RX)).count();
        assert_eq!((heard, resets), (256, 256));
        assert!(bench.guest.is_to_kick(TX), "its kicks are not wanted");
        bench.say(from_guest(Op::Data, 9, 1), &[]);
        assert_eq!(bench.hear_op(), Some((Op::Reset, 0)));
    }
}
