//! Any kernel at the shim's and the agent's questions about networks: what it lists is read or passed over, what
//! is read and set again is the same, and each question ends with what was sent.
#![no_main]

mod heap;

use std::os::fd::OwnedFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use protocol::netlink::address::Prefix;
use protocol::netlink::link::Change;
use protocol::netlink::{Message, Netlink, address, link, neighbour, route};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

/// The end of a list.
const DONE: u16 = 3;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    question: u8,
    datagrams: Vec<Datagram<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Datagram<'a> {
    Bytes(&'a [u8]),
    Replies(Vec<Reply<'a>>),
}

#[derive(Arbitrary, Debug)]
struct Reply<'a> {
    kind: Kind,
    flags: u16,
    /// Which question it answers, counted from the first.
    sequence: u8,
    /// By how much its length is a lie.
    lie: i8,
    payload: Payload<'a>,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Error,
    Done,
    Listed,
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Payload<'a> {
    Bytes(&'a [u8]),
    Attributes([u8; 16], Vec<(u8, &'a [u8])>),
}

fn reply(kind: u16, flags: u16, sequence: u32, payload: &[u8], lie: i8) -> Vec<u8> {
    let len = u32::try_from(16 + payload.len()).unwrap();
    let len = len.saturating_add_signed(lie.into());
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

impl Reply<'_> {
    fn bytes(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::Error => 2,
            Kind::Done => DONE,
            Kind::Listed => 24,
            Kind::Any(kind) => kind,
        };
        let payload = match &self.payload {
            Payload::Bytes(bytes) => bytes.to_vec(),
            // A route and a neighbour have 12 bytes before their attributes, an address 8 and a link 16.
            Payload::Attributes(fixed, attributes) => {
                let fixed = &fixed[..[8, 12, 16][usize::from(self.sequence % 3)]];
                let message = Message::new(0, fixed);
                let message = attributes.iter().fold(message, |message, (kind, value)| {
                    message.with((kind % 64).into(), value)
                });
                message.payload().to_vec()
            }
        };
        let sequence = 1 + u32::from(self.sequence / 3 % 3);
        reply(kind, self.flags, sequence, &payload, self.lie)
    }
}

/// A conversation with one who has said all of this before it is asked.
fn conversation(datagrams: &[Vec<u8>]) -> (Netlink, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (ours, theirs) = pair.unwrap();
    for datagram in datagrams.iter().filter(|datagram| !datagram.is_empty()) {
        // What has no room is not said.
        let _ = rustix::net::send(&theirs, datagram, SendFlags::NOSIGNAL);
    }
    (Netlink::over(ours), theirs)
}

fuzz_target!(|input: Input<'_>| {
    let datagrams: Vec<_> = input
        .datagrams
        .iter()
        .map(|datagram| match datagram {
            Datagram::Bytes(bytes) => bytes.to_vec(),
            Datagram::Replies(replies) => replies.iter().flat_map(Reply::bytes).collect(),
        })
        .collect();
    let said: usize = datagrams.iter().map(Vec::len).sum();
    heap::bounded((128 << 10) + 32 * said, || {
        let (mut netlink, _kernel) = conversation(&datagrams);
        ask(input.question, &mut netlink);
    });
});

fn ask(question: u8, netlink: &mut Netlink) {
    match question % 6 {
        0 => drop(link::list(netlink)),
        1 => drop(address::list(netlink)),
        2 => drop(neighbour::list(netlink)),
        3 => {
            let change = Change::default();
            let _ = change.apply(netlink, 1);
        }
        4 => {
            let prefix = Prefix::new("10.0.0.1", "24").unwrap();
            let _ = address::add(netlink, 1, &prefix);
        }
        _ => {
            for listed in route::list(netlink).unwrap_or_default() {
                assert!(listed.payload.len() >= route::FIXED_LEN);
                is_the_same_again(listed);
            }
        }
    }
}

/// A route that a message can set is the same where that is listed.
fn is_the_same_again(listed: route::Listed) {
    let mut route = listed.route;
    if listed.has_more || route.destination.is_some_and(|prefix| prefix.len == 0) {
        return;
    }
    let payload = route.message();
    let listing = [
        reply(24, 0, 1, payload.payload(), 0),
        reply(DONE, 0, 1, &[0; 4], 0),
    ];
    let (mut netlink, _kernel) = conversation(&listing);
    let again = route::list(&mut netlink).expect("the list has an end");
    route.flags &= route::ON_LINK;
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].route, route);
}
