//! Traffic control (tc(8); linux/rtnetlink.h, linux/pkt_cls.h): all frames that arrive at one interface leave by
//! another.

use std::io;

use protocol::netlink::{CREATE, EXCLUSIVE, Message, NESTED, Netlink};

const NEW_QUEUE: u16 = 36;
const DELETE_QUEUE: u16 = 37;
const NEW_FILTER: u16 = 44;
/// The length of a tcmsg, in bytes.
const FIXED_LEN: usize = 20;
const KIND: u16 = 1;
const OPTIONS: u16 = 2;

/// The handle of the queue of what arrives, and its place (TC_H_INGRESS).
const INGRESS: u32 = 0xffff_0000;
const AT_INGRESS: u32 = 0xffff_fff1;

/// All frames, whatever they carry (linux/if_ether.h, ETH_P_ALL).
const ALL_FRAMES: u16 = 0x0003;
/// The priority of the only filter there is.
const PRIORITY: u32 = 1;

const SELECTOR: u16 = 5;
const ACTIONS: u16 = 7;
/// `struct tc_u32_sel` of linux/pkt_cls.h: what matches is final (TC_U32_TERMINAL), and the one key
/// looks at no bit.
const ANY_FRAME: [u8; 32] = {
    let mut selector = [0; 32];
    selector[0] = 1;
    selector[2] = 1;
    selector
};

/// The number of the only action there is.
const FIRST: u16 = 1;
const PARAMETERS: u16 = 2;
/// The frame is not for this host any more (TC_ACT_STOLEN).
const STOLEN: u32 = 4;
/// The frame leaves by the other interface (TCA_EGRESS_REDIR).
const REDIRECT: u32 = 1;

/// Sends all frames that arrive at `from` out by `to`.
pub(super) fn add(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    netlink.change(ingress(NEW_QUEUE, from), CREATE | EXCLUSIVE)?;
    netlink.change(filter(from, to), CREATE | EXCLUSIVE)
}

/// Takes away what [`add`] made of `from`, if it did.
pub(super) fn remove(netlink: &mut Netlink, from: u32) -> io::Result<()> {
    match netlink.change(ingress(DELETE_QUEUE, from), 0) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
        removed => removed,
    }
}

/// A request about an interface: the handle of a thing, the place where it is, and what it is told of itself.
fn message(kind: u16, index: u32, [handle, parent, info]: [u32; 3]) -> Message {
    let mut fixed = [0; FIXED_LEN];
    let numbers = [index, handle, parent, info];
    for (place, number) in fixed[4..].chunks_exact_mut(4).zip(numbers) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    Message::new(kind, &fixed)
}

fn ingress(kind: u16, index: u32) -> Message {
    message(kind, index, [INGRESS, AT_INGRESS, 0]).with(KIND, b"ingress\0")
}

/// A filter that all frames match. (u32 is on more hosts than `matchall`.)
fn filter(from: u32, to: u32) -> Message {
    let none = || Message::new(0, &[]);
    // A tc_mirred: its number, what it can do, what becomes of the frame, two counts, what it does and where to.
    let mirred = [0, 0, STOLEN, 0, 0, REDIRECT, to].map(u32::to_ne_bytes);
    let action = none().with(KIND, b"mirred\0").with_nested(
        OPTIONS | NESTED,
        &none().with(PARAMETERS, mirred.as_flattened()),
    );
    let options = none()
        .with(SELECTOR, &ANY_FRAME)
        .with_nested(ACTIONS, &none().with_nested(FIRST, &action));
    let info = PRIORITY << 16 | u32::from(ALL_FRAMES.to_be());
    message(NEW_FILTER, from, [0, INGRESS, info])
        .with(KIND, b"u32\0")
        .with_nested(OPTIONS, &options)
}
