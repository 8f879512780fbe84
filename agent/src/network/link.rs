//! Interfaces as the host speaks of them: found, and renamed.

use std::io;

use protocol::netlink::link::{Change, Link, UP, list};
use protocol::netlink::{Netlink, address};

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
    use protocol::netlink::link::NO_ARP;

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
}
