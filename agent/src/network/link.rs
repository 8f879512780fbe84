//! Interfaces: found, and changed.

use std::io;

use super::address;
use super::netlink::{Message, Netlink, attributes, number, text};

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
/// The length of an ifinfomsg, in bytes.
const FIXED_LEN: usize = 16;
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const DETAILS: u16 = 18;
/// The attribute within [`DETAILS`] that tells an interface's kind.
const KIND: u16 = 1;
/// The attribute for the bus of the device behind an interface (IFLA_PARENT_DEV_BUS_NAME, Linux
/// 5.14).
const BUS: u16 = 57;

pub(super) const UP: u32 = 1;
pub(super) const NO_ARP: u32 = 0x80;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) hardware: Vec<u8>,
    /// The interface's kind, such as `bridge`; empty for a real one.
    pub(super) kind: String,
    /// The bus of the interface's device, such as `virtio`; empty without a device.
    pub(super) bus: String,
}

/// All interfaces.
pub(super) fn list(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let all = netlink.list(&Message::new(GET_LINK, &[0; FIXED_LEN]))?;
    Ok(all.iter().filter_map(|payload| parse(payload)).collect())
}

fn parse(payload: &[u8]) -> Option<Link> {
    let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
    let mut link = Link {
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
pub(super) struct Change<'a> {
    pub(super) name: Option<&'a str>,
    pub(super) mtu: Option<u32>,
    pub(super) hardware: Option<&'a [u8]>,
    /// Flags, of those in the mask.
    pub(super) flags: u32,
    pub(super) mask: u32,
}

impl Change<'_> {
    pub(super) fn apply(&self, netlink: &mut Netlink, index: u32) -> io::Result<()> {
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
        message
    }
}

/// Gives `link` a name. If another has it, that one gets this one's.
pub(super) fn rename(netlink: &mut Netlink, link: &Link, name: &str) -> io::Result<()> {
    let other = list(netlink)?.into_iter().find(|other| other.name == name);
    if let Some(other) = &other {
        set_name(netlink, other, &format!("swap{}", other.index))?;
    }
    set_name(netlink, link, name)?;
    match &other {
        Some(other) => set_name(netlink, other, &link.name),
        None => Ok(()),
    }
}

/// Renames an interface. For older kernels, which rename none that is up, it goes down meanwhile.
fn set_name(netlink: &mut Netlink, link: &Link, name: &str) -> io::Result<()> {
    let rename = Change {
        name: Some(name),
        ..Change::default()
    };
    match rename.apply(netlink, link.index) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            set_up(netlink, link.index, 0)?;
            rename.apply(netlink, link.index)?;
            set_up(netlink, link.index, link.flags & UP)
        }
        renamed => renamed,
    }
}

fn set_up(netlink: &mut Netlink, index: u32, flags: u32) -> io::Result<()> {
    let change = Change {
        flags,
        mask: UP,
        ..Change::default()
    };
    change.apply(netlink, index)
}

/// The one with this hardware address, or with this name.
pub(super) fn find<'a>(links: &'a [Link], hardware: &str, name: &str) -> Option<&'a Link> {
    match address::hardware(hardware) {
        Some(wanted) if !hardware.is_empty() => links.iter().find(|link| link.hardware == wanted),
        _ => links
            .iter()
            .find(|link| link.name == name && !name.is_empty()),
    }
}

/// The first of the VMM's interfaces that the host has not spoken of, which would be up, and that may
/// have an address such as this.
pub(super) fn unnamed<'a>(links: &'a [Link], hardware: &[u8]) -> Option<&'a Link> {
    let unnamed = links.iter().filter(|link| {
        link.bus == "virtio" && link.flags & UP == 0 && link.hardware.len() == hardware.len()
    });
    unnamed.min_by_key(|link| link.index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_link_is_found_by_its_hardware_address_whatever_the_case() {
        let link = |name: &str, hardware: &[u8]| Link {
            name: name.into(),
            hardware: hardware.to_vec(),
            ..Link::default()
        };
        let links = [link("lo", &[0; 6]), link("eth0", &[2, 0, 0, 0, 0, 0xab])];
        let name = |hardware, name| find(&links, hardware, name).map(|link| link.name.as_str());
        assert_eq!(name("02:00:00:00:00:AB", ""), Some("eth0"));
        assert_eq!(name("02:00:00:00:00:ac", "eth0"), None);
        assert_eq!(name("", "lo"), Some("lo"));
        assert_eq!(name("", ""), None);
    }

    #[test]
    fn the_first_virtio_interface_that_is_down_is_unnamed() {
        let link = |index, flags, bus: &str| Link {
            index,
            flags,
            bus: bus.into(),
            hardware: vec![2; 6],
            ..Link::default()
        };
        let index = |links: &[Link]| unnamed(links, &[4; 6]).map(|link| link.index);
        let named = link(2, UP, "virtio");
        let bridge = link(3, 0, "");
        let (late, early) = (link(9, NO_ARP, "virtio"), link(4, 0, "virtio"));
        assert_eq!(
            index(&[late.clone(), bridge.clone(), early, named.clone()]),
            Some(4)
        );
        assert_eq!(index(&[bridge, named]), None);
        assert_eq!(unnamed(&[late], &[4; 8]), None);
    }

    #[test]
    fn the_kernel_has_a_loopback_interface() {
        let links = list(&mut Netlink::open().unwrap()).unwrap();
        let lo = find(&links, "", "lo").unwrap();
        assert_eq!((lo.index, lo.kind.as_str(), lo.bus.as_str()), (1, "", ""));
        assert!(lo.mtu > 0);
    }

    proptest! {
        #[test]
        fn a_change_reads_as_the_link_it_makes(index: u32, mtu: u32, flags: u32, name in "[a-z0-9]{1,15}", hardware: [u8; 6]) {
            let change = Change { name: Some(&name), mtu: Some(mtu), hardware: Some(&hardware), flags, mask: 0 };
            let link = parse(&change.message(index).payload()).unwrap();
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
