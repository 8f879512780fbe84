//! rtnetlink: how the shim asks and changes the host's network and the agent the guest's. Messages of
//! attributes go to the kernel and back (rtnetlink(7); linux/netlink.h, linux/rtnetlink.h). Numbers are of the
//! machine's own byte order, and all is padded to 4 bytes. Every length the kernel gives is checked.
//!
//! | module | what |
//! |---|---|
//! | [`address`] | addresses, and those that interfaces have |
//! | [`link`] | interfaces |
//! | [`neighbour`] | who has which hardware address |
//! | [`route`] | routes |
//!
//! There are crates for it, netlink-packet-route and netlink-packet-core, whose messages know all kinds of
//! interfaces and tunnels. With them the agent, which each guest loads at its start, would have 1.97 MB instead
//! of 1.61 MB if it read links, addresses and routes one by one, and 2.06 MB by their enum of all messages; the
//! shim would have 2.85 MB instead of 2.09 MB. They fail a whole list for one attribute that is not of the length
//! they expect, so a kernel newer than they are could leave a pod without a network.

pub mod address;
pub mod link;
pub mod neighbour;
pub mod route;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// The flag of a request that makes the thing if it is not there.
pub const CREATE: u16 = 0x400;
/// The flag of a request that changes the thing if it is there.
pub const REPLACE: u16 = 0x100;
/// The flag of a request to which it is an error that the thing is there already.
pub const EXCLUSIVE: u16 = 0x200;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// The flag of an answer that tells that what is listed changed meanwhile.
const INTERRUPTED: u16 = 0x10;

const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The first kind of message that is not about the conversation itself (NLMSG_MIN_TYPE).
const FIRST_KIND: u16 = 16;

const HEADER_LEN: usize = 16;
const ATTRIBUTE_HEADER_LEN: usize = 4;
/// The bit of an attribute's kind that tells that there are attributes within it. The kernel asks for it in
/// few places.
pub const NESTED: u16 = 0x8000;
/// The bits of an attribute's kind that are the kind itself: the rest tells how it is made.
const KIND_MASK: u16 = 0x3fff;

/// How long the kernel's answer is waited for. It answers at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// A message to the kernel.
#[derive(Clone, Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// One of this kind, with its fixed part.
    pub fn new(kind: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend(fixed);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Self(bytes)
    }

    /// Adds an attribute.
    ///
    /// # Panics
    ///
    /// If the value does not fit into an attribute, which has less than 64 KiB.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(ATTRIBUTE_HEADER_LEN + value.len());
        let len =
            len.expect("an attribute is a number, an address, a name that was checked, or was one");
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds attributes within one, as a message of kind 0 without a fixed part has them.
    #[must_use]
    pub fn with_nested(self, kind: u16, inner: &Self) -> Self {
        self.with(kind, inner.payload())
    }

    /// Adds all attributes of a message of kind 0 without a fixed part.
    #[must_use]
    pub fn and(mut self, attributes: &Self) -> Self {
        self.0.extend(attributes.payload());
        self
    }

    /// The fixed part and the attributes.
    pub fn payload(&self) -> &[u8] {
        &self.0[HEADER_LEN..]
    }

    fn finish(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("a message is short");
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// A message from the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Reply<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages in what was received, up to the first that is not whole.
fn replies(bytes: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [a, b, c, d, kind @ .., e, f, g, h, _, _, _, _] = *rest.first_chunk::<HEADER_LEN>()?;
        let [k, l, m, n] = kind;
        let len = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let payload = rest.get(HEADER_LEN..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Reply {
            kind: u16::from_ne_bytes([k, l]),
            flags: u16::from_ne_bytes([m, n]),
            sequence: u32::from_ne_bytes([e, f, g, h]),
            payload,
        })
    })
}

/// The attributes behind a message's fixed part, by kind, up to the first that is not whole.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [a, b, c, d] = *rest.first_chunk::<ATTRIBUTE_HEADER_LEN>()?;
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(ATTRIBUTE_HEADER_LEN..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & KIND_MASK, value))
    })
}

/// A number of 4 bytes.
pub fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

/// A name, which ends at its NUL if it has one.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

/// A conversation with the kernel.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// The kernel puts no more than this into one datagram.
    const BUFFER: usize = 32 << 10;

    /// Opens a conversation with the kernel of this thread's network namespace.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Connected to the kernel, whose port is 0, it takes no message of another process.
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self::on(socket))
    }

    /// A conversation on a socket at whose other end is no kernel.
    #[cfg(feature = "test-utils")]
    pub fn over(socket: OwnedFd) -> Self {
        Self::on(socket)
    }

    fn on(socket: OwnedFd) -> Self {
        Self {
            socket,
            sequence: 0,
            buffer: vec![0; Self::BUFFER],
        }
    }

    /// Has something changed. `flags` are [`CREATE`], [`REPLACE`] and [`EXCLUSIVE`].
    pub fn change(&mut self, message: Message, flags: u16) -> io::Result<()> {
        self.exchange(message, REQUEST | ACK | flags, &mut |_| {})
    }

    /// Lists things: the payload of each message. If the kernel says that they changed meanwhile, it is asked
    /// again.
    pub fn list(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        const TRIES: usize = 10;
        for _ in 0..TRIES {
            let mut all = Vec::new();
            let listed = self.exchange(message.clone(), REQUEST | DUMP, &mut |payload| {
                all.push(payload.to_vec());
            });
            match listed {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                listed => return listed.map(|()| all),
            }
        }
        Err(io::Error::other("it changes all the time"))
    }

    fn exchange(
        &mut self,
        message: Message,
        flags: u16,
        take: &mut dyn FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.finish(flags, self.sequence);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        let mut interrupted = false;
        loop {
            let received = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC)
            });
            let (_, len) = received?;
            let bytes = self.buffer.get(..len);
            let bytes = bytes.ok_or_else(|| io::Error::other("an answer of more than 32 KiB"))?;
            for reply in replies(bytes).filter(|reply| reply.sequence == self.sequence) {
                interrupted |= reply.flags & INTERRUPTED != 0;
                match reply.kind {
                    ERROR | DONE => {
                        verdict(reply.payload)?;
                        return match interrupted {
                            true => Err(io::ErrorKind::Interrupted.into()),
                            false => Ok(()),
                        };
                    }
                    ..FIRST_KIND => {}
                    _ => take(reply.payload),
                }
            }
        }
    }
}

/// How it went: a negative error number, or 0. The end of a list need not say.
fn verdict(payload: &[u8]) -> io::Result<()> {
    let errno = payload
        .first_chunk()
        .map_or(0, |it| i32::from_ne_bytes(*it));
    match errno.checked_neg() {
        Some(errno) if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_as_rtnetlink_has_it() {
        let mtu = Message::new(0, &[]).with(2, &1400_u32.to_ne_bytes());
        let bytes = Message::new(16, &[7; 3])
            .with(3, b"eth0\0")
            .with_nested(8, &mtu)
            .finish(5, 9);
        let expected = [
            &[44, 0, 0, 0, 16, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0][..],
            &[7, 7, 7, 0],
            b"\x09\x00\x03\x00eth0\0\0\0\0",
            &[12, 0, 8, 0, 8, 0, 2, 0, 0x78, 0x05, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn what_is_cut_short_is_passed_over() {
        let whole = Message::new(0, &[]).with(1, b"abcd").with(2, b"ef");
        let whole = whole.payload();
        assert_eq!(attributes(whole).count(), 2);
        assert_eq!(attributes(&whole[..13]).count(), 1);
        assert_eq!(attributes(&[3, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
        let reply = Message::new(16, &[1, 2, 3, 4]).finish(0, 1);
        assert_eq!(replies(&reply).count(), 1);
        assert_eq!(replies(&reply[..19]).count(), 0);
        let mut short = reply;
        short[0] = 15;
        assert_eq!(replies(&short).count(), 0);
    }

    #[test]
    fn a_refusal_has_its_number() {
        let refused = verdict(&(-17_i32).to_ne_bytes()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        for fine in [&[][..], &[0; 4], &i32::MIN.to_ne_bytes(), &[1; 3]] {
            verdict(fine).unwrap();
        }
    }

    #[test]
    fn only_the_kernel_is_listened_to() {
        let netlink = Netlink::open().unwrap();
        let own = rustix::net::getsockname(&netlink.socket).unwrap();
        let other = Netlink::open().unwrap().socket;
        let reply = Message::new(DONE, &[0; 4]).finish(0, 1);
        let sent = rustix::net::sendto(&other, &reply, SendFlags::empty(), &own);
        sent.unwrap_err();
    }

    #[test]
    fn the_kernel_lists_what_it_has() {
        let link = [0; 16];
        let links = Netlink::open().unwrap().list(&Message::new(18, &link));
        assert!(!links.unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answers_or_passed_over(bytes in vec(any::<u8>(), 0..200)) {
            let taken: usize = replies(&bytes).map(|reply| reply.payload.len() + HEADER_LEN).sum();
            prop_assert!(taken <= bytes.len());
            let taken: usize = attributes(&bytes).map(|(_, value)| value.len()).sum();
            prop_assert!(taken <= bytes.len());
            let _ = (verdict(&bytes), number(&bytes), text(&bytes));
        }

        #[test]
        fn attributes_survive_the_wire(all in vec((0..KIND_MASK, vec(any::<u8>(), 0..40)), 0..9)) {
            let mut message = Message::new(1, &[0; 8]);
            for (kind, value) in &all {
                message = message.with(*kind, value);
            }
            let bytes = message.finish(REQUEST, 3);
            let replies: Vec<_> = replies(&bytes).collect();
            prop_assert_eq!(replies.len(), 1);
            prop_assert_eq!((replies[0].kind, replies[0].sequence), (1, 3));
            let back: Vec<_> = attributes(&replies[0].payload[8..])
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect();
            prop_assert_eq!(back, all);
        }
    }
}
