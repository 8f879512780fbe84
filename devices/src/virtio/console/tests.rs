//! A console as its driver sees it, against pipes and files on the host's side.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::virtio::testing::{Buffer, Guest, lifecycle};

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
/// Queues of port 0 and port 1.
const IN: [usize; 2] = [0, 4];
const OUT: [usize; 2] = [1, 5];

const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

fn port(name: &str, input: Option<PipeReader>, output: Option<PipeWriter>) -> Port {
    Port {
        name: name.into(),
        console: false,
        input: input.map(|pipe| Input::new(OwnedFd::from(pipe)).unwrap()),
        output: output.map(|pipe| Output::new(OwnedFd::from(pipe)).unwrap()),
    }
}

/// A guest that has not opened its ports yet: input on port 0, output on port 1.
fn guest() -> (Guest, PipeWriter, PipeReader) {
    let (stdin, host_in) = io::pipe().unwrap();
    let (host_out, stdout) = io::pipe().unwrap();
    let ports = vec![
        port("in", Some(stdin), None),
        port("out", None, Some(stdout)),
    ];
    (Guest::live(Console::new(ports).unwrap()), host_in, host_out)
}

fn message(id: u32, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    [
        &id.to_le_bytes()[..],
        &event.to_le_bytes(),
        &value.to_le_bytes(),
        rest,
    ]
    .concat()
}

fn say(guest: &mut Guest, id: u32, event: u16, value: u16) {
    let heard = guest.request(CONTROL_OUT, &[Buffer::Out(message(id, event, value, &[]))]);
    assert_eq!(heard, Some(vec![]));
}

/// Offers room for messages and takes what the device has to say.
fn listen(guest: &mut Guest) -> Vec<Vec<u8>> {
    while guest.add(CONTROL_IN, &[Buffer::In(80)]).is_some() {}
    guest.kick(CONTROL_IN);
    guest.settle();
    std::iter::from_fn(|| guest.take(CONTROL_IN)).collect()
}

/// Does what Linux does until programs have opened both ports.
fn open_ports(guest: &mut Guest) {
    say(guest, 0, DEVICE_READY, 1);
    for id in [0, 1] {
        say(guest, id, PORT_READY, 1);
        say(guest, id, PORT_OPEN, 1);
    }
    listen(guest);
}

fn opened() -> (Guest, PipeWriter, PipeReader) {
    let (mut guest, host_in, host_out) = guest();
    open_ports(&mut guest);
    (guest, host_in, host_out)
}

/// Sends without waiting for the device.
fn queue_output(guest: &mut Guest, bytes: &[u8]) {
    guest.add(OUT[1], &[Buffer::Out(bytes.to_vec())]).unwrap();
    guest.kick(OUT[1]);
}

#[test]
fn the_driver_is_told_of_ports_names_and_openness() {
    let (mut guest, _host_in, _host_out) = guest();
    assert_eq!(u32::from_le_bytes(guest.config(4)), 2);
    say(&mut guest, 0, DEVICE_READY, 1);
    assert_eq!(
        listen(&mut guest),
        [message(0, 1, 0, &[]), message(1, 1, 0, &[])]
    );
    say(&mut guest, 1, PORT_READY, 1);
    assert_eq!(
        listen(&mut guest),
        [message(1, 7, 1, b"out"), message(1, 6, 1, &[])]
    );
}

#[test]
fn messages_wait_until_the_driver_has_room() {
    let (mut guest, _host_in, _host_out) = guest();
    // However often it asks, the device owes it each message once.
    for _ in 0..100 {
        say(&mut guest, 0, DEVICE_READY, 1);
        say(&mut guest, 0, PORT_READY, 1);
    }
    assert_eq!(listen(&mut guest).len(), 4);
    assert_eq!(listen(&mut guest).len(), 0);
}

#[test]
fn a_message_that_finds_too_little_room_is_dropped() {
    let (mut guest, _host_in, _host_out) = guest();
    guest.add(CONTROL_IN, &[Buffer::In(7)]).unwrap();
    guest.add(CONTROL_IN, &[Buffer::In(8)]).unwrap();
    say(&mut guest, 0, DEVICE_READY, 1);
    assert_eq!(guest.take(CONTROL_IN), Some(vec![]));
    assert_eq!(guest.take(CONTROL_IN), Some(message(1, 1, 0, &[])));
    assert_eq!(guest.counters().errors.get(), 1);
}

#[test]
fn messages_that_make_no_sense_are_counted() {
    let (mut guest, _host_in, _host_out) = guest();
    say(&mut guest, 2, PORT_READY, 1);
    say(&mut guest, u32::MAX, PORT_OPEN, 1);
    say(&mut guest, 0, 1234, 0);
    guest
        .request(CONTROL_OUT, &[Buffer::Out(vec![0; 7])])
        .unwrap();
    guest.request(CONTROL_OUT, &[Buffer::In(8)]).unwrap();
    assert_eq!(guest.counters().errors.get(), 5);
    assert_eq!(listen(&mut guest).len(), 0);
}

#[test]
fn input_reaches_a_guest_that_has_opened_the_port() {
    let (mut guest, mut host_in, _host_out) = guest();
    host_in.write_all(b"early").unwrap();
    assert_eq!(guest.request(IN[0], &[Buffer::In(64)]), None);
    open_ports(&mut guest);
    guest.settle();
    assert_eq!(guest.take(IN[0]).unwrap(), b"early");
    guest.add(IN[0], &[Buffer::In(3), Buffer::In(64)]).unwrap();
    guest.kick(IN[0]);
    guest.settle();
    host_in.write_all(b"late").unwrap();
    guest.settle();
    assert_eq!(guest.take(IN[0]).unwrap(), b"late");
}

#[test]
fn input_without_room_stays_with_the_host() {
    let (mut guest, mut host_in, _host_out) = opened();
    host_in.write_all(b"abcdef").unwrap();
    guest.settle();
    assert_eq!(guest.request(IN[0], &[Buffer::In(4)]).unwrap(), b"abcd");
    assert_eq!(guest.request(IN[0], &[Buffer::In(4)]).unwrap(), b"ef");
    assert_eq!(guest.request(IN[0], &[Buffer::In(4)]), None);
}

#[test]
fn the_end_of_input_is_told_after_the_last_byte() {
    let (mut guest, mut host_in, _host_out) = opened();
    host_in.write_all(b"last").unwrap();
    drop(host_in);
    guest.settle();
    assert_eq!(listen(&mut guest).len(), 0);
    assert_eq!(guest.request(IN[0], &[Buffer::In(64)]).unwrap(), b"last");
    assert_eq!(guest.request(IN[0], &[Buffer::In(64)]), None);
    assert_eq!(listen(&mut guest), [message(0, 6, 0, &[])]);
}

#[test]
fn the_end_of_input_is_not_told_where_output_would_stop() {
    let (stdin, host_in) = io::pipe().unwrap();
    let (mut host_out, stdout) = io::pipe().unwrap();
    let ports = vec![
        port("both", Some(stdin), Some(stdout)),
        port("other", None, None),
    ];
    let mut guest = Guest::live(Console::new(ports).unwrap());
    open_ports(&mut guest);
    drop(host_in);
    assert_eq!(guest.request(IN[0], &[Buffer::In(64)]), None);
    assert_eq!(listen(&mut guest).len(), 0);
    guest
        .request(OUT[0], &[Buffer::Out(b"on".to_vec())])
        .unwrap();
    let mut bytes = [0; 2];
    host_out.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"on");
}

#[test]
fn a_buffer_without_room_is_not_taken_for_the_end() {
    let (mut guest, mut host_in, _host_out) = opened();
    host_in.write_all(b"x").unwrap();
    assert_eq!(
        guest.request(IN[0], &[Buffer::Out(vec![0; 4])]),
        Some(vec![])
    );
    assert_eq!(guest.request(IN[0], &[Buffer::In(0)]), Some(vec![]));
    assert_eq!(guest.request(IN[0], &[Buffer::In(4)]).unwrap(), b"x");
    assert_eq!(guest.counters().bad_chains.get(), 2);
}

#[test]
fn input_from_a_regular_file_is_read_to_its_end() {
    let file = TempFile::new().unwrap();
    fs::write(file.as_path(), vec![5; 100_000]).unwrap();
    let input = Input::new(fs::File::open(file.as_path()).unwrap().into()).unwrap();
    let ports = vec![
        Port {
            name: "file".into(),
            console: false,
            input: Some(input),
            output: None,
        },
        port("other", None, None),
    ];
    let mut guest = Guest::live(Console::new(ports).unwrap());
    open_ports(&mut guest);
    let bytes = std::iter::from_fn(|| guest.request(IN[0], &[Buffer::In(4096)]));
    assert_eq!(bytes.flatten().count(), 100_000);
    assert_eq!(listen(&mut guest), [message(0, 6, 0, &[])]);
}

#[test]
fn output_reaches_the_host_in_order() {
    let (mut guest, _host_in, mut host_out) = opened();
    let parts = [Buffer::Out(b"one ".to_vec()), Buffer::Out(b"two ".to_vec())];
    assert_eq!(guest.request(OUT[1], &parts), Some(vec![]));
    assert_eq!(
        guest.request(OUT[1], &[Buffer::Out(b"three".to_vec())]),
        Some(vec![])
    );
    let mut bytes = [0; 13];
    host_out.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"one two three");
}

#[test]
fn output_waits_for_a_slow_host_and_goes_on_where_it_stopped() {
    let (mut guest, _host_in, mut host_out) = opened();
    let bytes: Vec<u8> = (0..=250).cycle().take(300_000).collect();
    queue_output(&mut guest, &bytes);
    guest.settle();
    assert_eq!(
        guest.take(OUT[1]),
        None,
        "the pipe cannot have taken it all"
    );
    let mut got = vec![0; bytes.len()];
    for part in got.chunks_mut(50_000) {
        host_out.read_exact(part).unwrap();
        guest.settle();
    }
    assert!(got == bytes);
    assert_eq!(guest.take(OUT[1]), Some(vec![]));
    assert_eq!(guest.counters().bytes_out.get(), 300_000);
}

#[test]
fn output_that_waits_survives_pause_and_resume() {
    let (mut guest, _host_in, mut host_out) = opened();
    queue_output(&mut guest, &vec![3; 100_000]);
    guest.settle();
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    let mut got = vec![0; 100_000];
    for part in got.chunks_mut(20_000) {
        host_out.read_exact(part).unwrap();
        guest.settle();
    }
    assert_eq!(got, vec![3; 100_000]);
    assert_eq!(guest.take(OUT[1]), Some(vec![]));
}

#[test]
fn output_without_a_reader_is_dropped_and_the_guest_goes_on() {
    let (mut guest, _host_in, host_out) = opened();
    queue_output(&mut guest, &vec![3; 100_000]);
    guest.settle();
    drop(host_out);
    guest.settle();
    assert_eq!(guest.take(OUT[1]), Some(vec![]));
    assert_eq!(
        guest.request(OUT[1], &[Buffer::Out(vec![0; 9])]),
        Some(vec![])
    );
    assert_eq!(guest.counters().errors.get(), 2);
    // Neither is output of a port that has none.
    assert_eq!(
        guest.request(OUT[0], &[Buffer::Out(vec![0; 9])]),
        Some(vec![])
    );
}

#[test]
fn draining_gives_the_host_all_that_is_queued() {
    let (mut guest, _host_in, mut host_out) = opened();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 300_000];
        host_out.read_exact(&mut bytes).unwrap();
        bytes
    });
    queue_output(&mut guest, &[1; 150_000]);
    queue_output(&mut guest, &[2; 150_000]);
    guest.transport.drain();
    assert!(reader.join().unwrap() == [vec![1; 150_000], vec![2; 150_000]].concat());
    assert_eq!(guest.take(OUT[1]), Some(vec![]));
    assert_eq!(guest.take(OUT[1]), Some(vec![]));
}

#[test]
fn draining_hears_what_the_guest_sent_last() {
    let (mut guest, _host_in, mut host_out) = guest();
    queue_output(&mut guest, b"bye");
    guest.transport.drain();
    let mut bytes = [0; 3];
    host_out.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"bye");
}

struct ChannelSink(Sender<Vec<u8>>);

impl Write for ChannelSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_hears_every_line() {
    let (sender, lines) = channel();
    let output = Some(Output::sink(Box::new(ChannelSink(sender))));
    let status = Port {
        name: "status".into(),
        console: false,
        input: None,
        output,
    };
    let mut guest = Guest::live(Console::new(vec![status]).unwrap());
    let line = [Buffer::Out(b"ready\n".to_vec())];
    assert_eq!(guest.request(OUT[0], &line), Some(vec![]));
    assert_eq!(lines.try_recv().unwrap(), b"ready\n");
}

#[test]
fn a_console_port_learns_its_size() {
    let (stdin, _host_in) = io::pipe().unwrap();
    let console = Port {
        console: true,
        ..port("hvc", Some(stdin), None)
    };
    let device = Console::new(vec![console, port("other", None, None)]).unwrap();
    let handle = device.handle();
    let mut guest = Guest::live(device);
    handle.resize(80, 25);
    open_ports(&mut guest);
    listen(&mut guest);
    handle.resize(132, 50);
    guest.settle();
    let size = [132u16.to_le_bytes(), 50u16.to_le_bytes()].concat();
    assert_eq!(listen(&mut guest), [message(0, 5, 0, &size)]);
    say(&mut guest, 0, PORT_READY, 1);
    assert_eq!(
        listen(&mut guest),
        [
            message(0, 4, 1, &[]),
            message(0, 7, 1, b"hvc"),
            message(0, 6, 1, &[]),
            message(0, 5, 0, &size),
        ]
    );
}

#[test]
fn a_driver_without_ports_has_one_console() {
    let (mut host_out, stdout) = io::pipe().unwrap();
    let (stdin, mut host_in) = io::pipe().unwrap();
    let ports = vec![
        port("first", Some(stdin), Some(stdout)),
        port("second", None, None),
    ];
    let mut guest = Guest::new(Console::new(ports).unwrap());
    guest.start(!(1 << device::F_MULTIPORT), 16);
    host_in.write_all(b"in").unwrap();
    assert_eq!(guest.request(IN[0], &[Buffer::In(8)]).unwrap(), b"in");
    assert_eq!(
        guest.request(OUT[0], &[Buffer::Out(b"out".to_vec())]),
        Some(vec![])
    );
    let mut bytes = [0; 3];
    host_out.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"out");
}

#[test]
fn the_console_lives_through_pause_and_reset() {
    let (stdin, mut host_in) = io::pipe().unwrap();
    let (mut host_out, stdout) = io::pipe().unwrap();
    let console = || {
        let stdin = stdin.try_clone().unwrap();
        let stdout = stdout.try_clone().unwrap();
        Console::new(vec![
            port("in", Some(stdin), None),
            port("out", None, Some(stdout)),
        ])
        .unwrap()
    };
    lifecycle(console, |guest| {
        open_ports(guest);
        host_in.write_all(b"ping").unwrap();
        assert_eq!(guest.request(IN[0], &[Buffer::In(16)]).unwrap(), b"ping");
        assert_eq!(
            guest.request(OUT[1], &[Buffer::Out(b"pong".to_vec())]),
            Some(vec![])
        );
        let mut bytes = [0; 4];
        host_out.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"pong");
        // Take back the buffers that listening left with the device.
        say(guest, 0, DEVICE_READY, 1);
        listen(guest);
    });
}

#[test]
fn ports_out_of_measure_are_refused() {
    let ports = |count: usize| {
        (0..count)
            .map(|_| port("x", None, None))
            .collect::<Vec<_>>()
    };
    let errors = [
        ports(0),
        ports(17),
        vec![port("", None, None)],
        vec![port(&"n".repeat(65), None, None)],
    ]
    .map(|ports| Console::new(ports).unwrap_err().to_string());
    assert_eq!(errors[0], "a console has 1 to 16 ports, not 0");
    assert_eq!(errors[1], "a console has 1 to 16 ports, not 17");
    assert_eq!(
        errors[2],
        "a console port's name is 1 to 64 bytes long, unlike \"\""
    );
    assert!(errors[3].starts_with("a console port's name is 1 to 64 bytes long"));
    assert_eq!(Console::new(ports(16)).unwrap().handle().0.size(), None);
}

/// What the host takes at once does not divide a turn.
#[test]
fn output_in_large_pieces_takes_as_many_turns_as_it_needs() {
    let file = TempFile::new().unwrap();
    let output = Output::new(file.as_file().try_clone().unwrap().into()).unwrap();
    let ports = vec![Port {
        output: Some(output),
        ..port("log", None, None)
    }];
    let mut guest = Guest::live(Console::new(ports).unwrap());
    for _ in 0..16 {
        guest.add(OUT[0], &[Buffer::Out(vec![7; 20_000])]).unwrap();
    }
    guest.kick(OUT[0]);
    guest.settle();
    assert_eq!(guest.in_flight(OUT[0]), 16, "they are all used");
    assert_eq!(std::iter::from_fn(|| guest.take(OUT[0])).count(), 16);
    assert_eq!(file.as_file().metadata().unwrap().len(), 16 * 20_000);
}
