//! Any guest at vsock, with callers on the host; and one that speaks, which is asked nothing without
//! end.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use devices::virtio::testing::{Buffer, Guest, Step, survive};
use devices::virtio::vsock::{Vsock, VsockConfig};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

const RX: usize = 0;
const TX: usize = 1;
const CREDIT_UPDATE: u8 = 6;
const CREDIT_REQUEST: u8 = 7;

#[derive(Debug, Arbitrary)]
enum Input {
    Steps(Vec<Step>),
    Packets(Vec<Packet>),
}

/// A packet about the first caller's connection, and what that caller writes after it.
#[derive(Debug, Arbitrary)]
struct Packet {
    op: u8,
    flags: u8,
    room: u8,
    forwarded: u8,
    payload: u8,
    written: u8,
}

/// The header of a packet (virtio 1.3 §5.10.6), from guest 3 to the host.
fn header(packet: &Packet, guest_port: [u8; 4], host_port: [u8; 4], op: u8) -> Vec<u8> {
    let len = u32::from(packet.payload);
    [
        &3_u64.to_le_bytes()[..],
        &2_u64.to_le_bytes(),
        &guest_port,
        &host_port,
        &len.to_le_bytes(),
        &[1, 0, op, 0],
        &u32::from(packet.flags).to_le_bytes(),
        &u32::from(packet.room).to_le_bytes(),
        &u32::from(packet.forwarded).to_le_bytes(),
    ]
    .concat()
}

fn say(guest: &mut Guest, mut bytes: Vec<u8>, payload: u8) {
    bytes.resize(bytes.len() + usize::from(payload), 7);
    let answer = guest.request(TX, &[Buffer::Out(bytes)]);
    assert!(answer.is_some(), "every packet comes back");
}

/// The next packet for the guest.
fn hear(guest: &mut Guest) -> Option<Vec<u8>> {
    guest.settle();
    if guest.in_flight(RX) == 0 {
        guest.add(RX, &[Buffer::In(4096)])?;
        guest.kick(RX);
        guest.settle();
    }
    guest.take(RX)
}

/// A guest that answers at once what it is asked. The device says no more than it has reasons to: for
/// each byte a packet and a question, for each packet of the guest an answer.
fn converse(guest: &mut Guest, caller: &mut UnixStream, packets: &[Packet]) {
    let request = hear(guest).expect("the caller's request");
    let port = |at: usize| request[at..at + 4].try_into().expect("four bytes");
    let (host_port, guest_port) = (port(16), port(20));
    let (mut reasons, mut heard) = (16, 0);
    for packet in packets {
        reasons += 2;
        let bytes = header(packet, guest_port, host_port, packet.op % 9);
        say(guest, bytes, packet.payload);
        let written = caller.write(&vec![7; packet.written.into()]);
        reasons += 2 * written.unwrap_or(0);
        while let Some(answer) = hear(guest) {
            heard += 1;
            assert!(heard <= reasons, "it never stops to speak");
            if answer[30] == CREDIT_REQUEST {
                let plain = Packet {
                    payload: 0,
                    ..*packet
                };
                let bytes = header(&plain, guest_port, host_port, CREDIT_UPDATE);
                say(guest, bytes, 0);
            }
        }
        assert!(guest.is_to_kick(TX), "it is deaf");
    }
}

fuzz_target!(|input: Input| {
    let folder = TempDir::new().unwrap();
    let socket = folder.as_path().join("vsock");
    let vsock = Vsock::new(VsockConfig {
        cid: 3,
        socket: socket.clone(),
    })
    .unwrap();
    let callers = match &input {
        Input::Steps(_) => 3,
        Input::Packets(_) => 1,
    };
    let mut callers: Vec<_> = (0..callers)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    for caller in &mut callers {
        caller.write_all(b"CONNECT 1\nand more").unwrap();
        caller.set_nonblocking(true).unwrap();
    }
    match input {
        Input::Steps(steps) => survive(vsock, &[1], steps),
        Input::Packets(packets) => {
            let mut guest = Guest::live(vsock);
            converse(&mut guest, &mut callers[0], &packets);
        }
    }
});
