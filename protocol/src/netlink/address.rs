//! Addresses: their text, and those of interfaces.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::{CREATE, Message, Netlink, REPLACE, attributes};

const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
/// The length of an ifaddrmsg, in bytes.
const FIXED_LEN: usize = 8;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
/// The host's network knows the address to be the pod's, so the guest's kernel does not ask other
/// hosts whether it is free (IFA_F_NODAD).
const NO_DETECTION: u8 = 2;

/// The family of IPv4 addresses and routes (AF_INET).
pub const V4: u8 = 2;
/// The family of IPv6 addresses and routes (AF_INET6).
pub const V6: u8 = 10;

/// The scope of addresses that are good everywhere (RT_SCOPE_UNIVERSE).
pub const EVERYWHERE: u8 = 0;
/// The scope of addresses that are good within their site (RT_SCOPE_SITE).
pub const SITE: u8 = 200;

/// An address and how much of it names the network, as `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub address: IpAddr,
    /// The network's part, in bits.
    pub len: u8,
}

/// It is no address with a prefix.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address")]
pub struct NoAddress(pub String);

impl Prefix {
    /// Reads an address and the length of its prefix.
    pub fn new(address: &str, len: &str) -> Result<Self, NoAddress> {
        let wrong = || NoAddress(format!("{address}/{len}"));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let len = len.parse().map_err(|_| wrong())?;
        let prefix = Self { address, len };
        if len > prefix.whole() {
            return Err(wrong());
        }
        Ok(prefix)
    }

    /// The length of a prefix that is the whole address.
    pub fn whole(&self) -> u8 {
        if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// [`V4`] or [`V6`].
    pub fn family(&self) -> u8 {
        family(self.address)
    }
}

/// Reads an address with its prefix. Without a prefix all of the address is meant.
impl FromStr for Prefix {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        if let Some((address, len)) = text.split_once('/') {
            return Self::new(address, len);
        }
        let address = text.parse().map_err(|_| NoAddress(text.to_owned()))?;
        let prefix = Self { address, len: 0 };
        let len = prefix.whole();
        Ok(Self { len, ..prefix })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

/// [`V4`] or [`V6`].
pub fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { V4 } else { V6 }
}

/// An address as the kernel has it.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An address of the kernel's, told by its length.
pub fn from_octets(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(octets).into())
}

/// A hardware address such as `02:00:5e:00:00:01`.
pub fn hardware(text: &str) -> Option<Vec<u8>> {
    let bytes = text.split(':').map(|byte| match byte.len() {
        1 | 2 => u8::from_str_radix(byte, 16).ok(),
        _ => None,
    });
    bytes.collect()
}

/// The text of a hardware address, in lower case.
pub fn hardware_text(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// An address that an interface has.
#[derive(Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The interface's number.
    pub interface: u32,
    pub prefix: Prefix,
    /// The other end, if it is one of a pair: the prefix's length is that one's.
    pub peer: Option<IpAddr>,
    /// How far it is good: [`EVERYWHERE`], [`SITE`], or less.
    pub scope: u8,
}

/// All addresses.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Assigned>> {
    let all = netlink.list(&Message::new(GET_ADDRESS, &[0; FIXED_LEN]))?;
    Ok(all.iter().filter_map(|payload| parse(payload)).collect())
}

fn parse(payload: &[u8]) -> Option<Assigned> {
    let (&[_family, len, _flags, scope, a, b, c, d], rest) =
        payload.split_first_chunk::<FIXED_LEN>()?;
    let find = |wanted| {
        let mut found = attributes(rest).filter(|(kind, _)| *kind == wanted);
        found.find_map(|(_, value)| from_octets(value))
    };
    // Where the two differ the other is the peer's.
    let (local, other) = (find(LOCAL), find(ADDRESS));
    let address = local.or(other)?;
    let prefix = Prefix { address, len };
    (len <= prefix.whole()).then_some(Assigned {
        interface: u32::from_ne_bytes([a, b, c, d]),
        prefix,
        peer: other.filter(|other| *other != address),
        scope,
    })
}

fn message(kind: u16, interface: u32, prefix: &Prefix) -> Message {
    let [a, b, c, d] = interface.to_ne_bytes();
    let flags = if prefix.address.is_ipv6() {
        NO_DETECTION
    } else {
        0
    };
    let octets = octets(prefix.address);
    Message::new(kind, &[prefix.family(), prefix.len, flags, 0, a, b, c, d])
        .with(LOCAL, &octets)
        .with(ADDRESS, &octets)
}

/// Gives an interface an address. One that it has already it keeps.
pub fn add(netlink: &mut Netlink, interface: u32, prefix: &Prefix) -> io::Result<()> {
    let mut message = message(NEW_ADDRESS, interface, prefix);
    if let (IpAddr::V4(address), ..=30) = (prefix.address, prefix.len) {
        let host = u32::MAX.checked_shr(prefix.len.into()).unwrap_or_default();
        let broadcast = address.to_bits() | host;
        message = message.with(BROADCAST, &broadcast.to_be_bytes());
    }
    netlink.change(message, CREATE | REPLACE)
}

/// Takes an address from an interface.
pub fn remove(netlink: &mut Netlink, interface: u32, prefix: &Prefix) -> io::Result<()> {
    netlink.change(message(DELETE_ADDRESS, interface, prefix), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prefixes_are_read_whole_or_not_at_all() {
        let read = |text: &str| text.parse::<Prefix>().map(|prefix| prefix.to_string());
        let good = ["10.0.0.1/24", "10.0.0.1", "::/0", "fd00::2/64", "fd00::2"];
        let good: Vec<_> = good.iter().filter_map(|text| read(text).ok()).collect();
        let expected = [
            "10.0.0.1/24",
            "10.0.0.1/32",
            "::/0",
            "fd00::2/64",
            "fd00::2/128",
        ];
        assert_eq!(good, expected);
        for bad in [
            "",
            "/",
            "10.0.0.1/33",
            "10.0.0/8",
            "::1/129",
            "::1/-1",
            "a/8",
            "1.2.3.4/",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hardware_addresses_are_bytes() {
        assert_eq!(hardware("02:aB:0:f:1:00"), Some(vec![2, 0xab, 0, 15, 1, 0]));
        for bad in ["", "02:", "02:xyz", "02-03", "02:+3"] {
            assert!(hardware(bad).is_none_or(|bytes| bytes.len() < 3), "{bad}");
        }
        assert_eq!(hardware_text(&[2, 0xab]), "02:ab");
    }

    proptest! {
        #[test]
        fn an_address_survives_the_wire(address: IpAddr, len in 0..=32_u8, interface: u32) {
            let prefix = Prefix { address, len };
            let message = message(NEW_ADDRESS, interface, &prefix);
            let expected = Assigned { interface, prefix, peer: None, scope: EVERYWHERE };
            prop_assert_eq!(parse(message.payload()), Some(expected));
            prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
        }

        #[test]
        fn any_bytes_are_an_address_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            if let Some(address) = parse(&bytes) {
                prop_assert!(address.prefix.len <= address.prefix.whole());
            }
        }

        #[test]
        fn any_text_is_an_address_or_none(text in "[0-9a-f:./]{0,24}|\\PC{0,9}") {
            let _ = (text.parse::<Prefix>(), hardware(&text));
        }
    }
}
