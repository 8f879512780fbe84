//! Interfaces: found, and changed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Message, Netlink, attributes, number, text};

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
/// The length of an ifinfomsg, in bytes.
const FIXED_LEN: usize = 16;
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const DETAILS: u16 = 18;
const NAMESPACE: u16 = 28;
/// The attribute within [`DETAILS`] that tells an interface's kind.
const KIND: u16 = 1;
/// The attribute for the bus of the device behind an interface (IFLA_PARENT_DEV_BUS_NAME, Linux
/// 5.14).
const BUS: u16 = 57;

/// The flag of an interface that is turned on (linux/if.h, as those below).
pub const UP: u32 = 1;
/// The flag of the interface that leads back to its own host.
pub const LOOPBACK: u32 = 8;
/// The flag of an interface whose neighbours are not asked for their hardware addresses.
pub const NO_ARP: u32 = 0x80;
/// The frames of Ethernet (linux/if_arp.h, ARPHRD_ETHER).
pub const ETHERNET: u16 = 1;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The interface's number in its network namespace.
    pub index: u32,
    /// Whose frames it carries, such as [`ETHERNET`]'s.
    pub frames: u16,
    /// [`UP`], [`NO_ARP`] and others.
    pub flags: u32,
    pub name: String,
    /// Longest packet, in bytes.
    pub mtu: u32,
    /// The hardware address; empty without one.
    pub hardware: Vec<u8>,
    /// The interface's kind, such as `bridge`; empty for a real one.
    pub kind: String,
    /// The bus of the interface's device, such as `virtio`; empty without a device.
    pub bus: String,
}

/// All interfaces.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let all = netlink.list(&Message::new(GET_LINK, &[0; FIXED_LEN]))?;
    Ok(all.iter().filter_map(|payload| parse(payload)).collect())
}

fn parse(payload: &[u8]) -> Option<Link> {
    let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
    let mut link = Link {
        frames: u16::from_ne_bytes([fixed[2], fixed[3]]),
        index: number(&fixed[4..8])?,
        flags: number(&fixed[8..12])?,
        ..Link::default()
    };
    for (kind, value) in attributes(rest) {
        match kind {
            ADDRESS => link.hardware = value.to_vec(),
            NAME => link.name = text(value),
            MTU => link.mtu = number(value)?,
            DETAILS => {
                let kind = attributes(value).find(|(kind, _)| *kind == KIND);
                link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            BUS => link.bus = text(value),
            _ => {}
        }
    }
    Some(link)
}

/// What is to become of an interface.
#[derive(Debug, Default)]
pub struct Change<'a> {
    pub name: Option<&'a str>,
    pub mtu: Option<u32>,
    pub hardware: Option<&'a [u8]>,
    /// The network namespace to which it moves, where it is down.
    pub namespace: Option<BorrowedFd<'a>>,
    /// Flags, of those in the mask.
    pub flags: u32,
    /// Which flags are set or cleared.
    pub mask: u32,
}

impl Change<'_> {
    /// Changes the interface of this number.
    pub fn apply(&self, netlink: &mut Netlink, index: u32) -> io::Result<()> {
        netlink.change(self.message(index), 0)
    }

    fn message(&self, index: u32) -> Message {
        let mut fixed = [0; FIXED_LEN];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        fixed[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        fixed[12..16].copy_from_slice(&self.mask.to_ne_bytes());
        let mut message = Message::new(NEW_LINK, &fixed);
        if let Some(mtu) = self.mtu {
            message = message.with(MTU, &mtu.to_ne_bytes());
        }
        if let Some(hardware) = self.hardware {
            message = message.with(ADDRESS, hardware);
        }
        if let Some(name) = self.name {
            message = message.with(NAME, &[name.as_bytes(), b"\0"].concat());
        }
        if let Some(namespace) = self.namespace {
            message = message.with(NAMESPACE, &namespace.as_raw_fd().to_ne_bytes());
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernel_has_a_loopback_interface() {
        let links = list(&mut Netlink::open().unwrap()).unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!((lo.index, lo.kind.as_str(), lo.bus.as_str()), (1, "", ""));
        assert!(lo.flags & LOOPBACK != 0 && lo.frames != ETHERNET);
        assert!(lo.mtu > 0);
    }

    proptest! {
        #[test]
        fn a_change_reads_as_the_link_it_makes(index: u32, mtu: u32, flags: u32, name in "[a-z0-9]{1,15}", hardware: [u8; 6]) {
            let change = Change { name: Some(&name), mtu: Some(mtu), hardware: Some(&hardware), flags, ..Change::default() };
            let link = parse(change.message(index).payload()).unwrap();
            let hardware = hardware.to_vec();
            let expected = Link { index, flags, name, mtu, hardware, ..Link::default() };
            prop_assert_eq!(link, expected);
        }

        #[test]
        fn any_bytes_are_a_link_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            let _ = parse(&bytes);
        }
    }
}
