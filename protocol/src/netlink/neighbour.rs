//! Neighbours: who on a link has which hardware address.

use std::io;
use std::net::IpAddr;

use super::address::{family, from_octets, octets};
use super::route::UNICAST;
use super::{CREATE, Message, Netlink, REPLACE, attributes};

const NEW_NEIGHBOUR: u16 = 28;
const GET_NEIGHBOUR: u16 = 30;
/// The length of an ndmsg, in bytes.
const FIXED_LEN: usize = 12;
const ADDRESS: u16 = 1;
const HARDWARE: u16 = 2;

/// The state of a neighbour that is known for good (NUD_PERMANENT).
pub const PERMANENT: u16 = 0x80;

/// An address on a link, and the hardware that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub interface: u32,
    /// [`PERMANENT`], or another of NUD_*.
    pub state: u16,
    /// NTF_* of linux/neighbour.h.
    pub flags: u8,
    pub address: IpAddr,
    pub hardware: Vec<u8>,
}

impl Neighbour {
    fn message(&self) -> Message {
        let [a, b, c, d] = self.interface.to_ne_bytes();
        let [e, f] = self.state.to_ne_bytes();
        let family = family(self.address);
        let fixed = [family, 0, 0, 0, a, b, c, d, e, f, self.flags, UNICAST];
        Message::new(NEW_NEIGHBOUR, &fixed)
            .with(ADDRESS, &octets(self.address))
            .with(HARDWARE, &self.hardware)
    }

    /// Reads a neighbour; `None` if its address or hardware is not known.
    fn parse(payload: &[u8]) -> Option<Self> {
        let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
        let [_family, _, _, _, a, b, c, d, e, f, flags, _] = *fixed;
        let (mut address, mut hardware) = (None, None);
        for (kind, value) in attributes(rest) {
            match kind {
                ADDRESS => address = from_octets(value),
                HARDWARE => hardware = Some(value.to_vec()),
                _ => {}
            }
        }
        Some(Self {
            interface: u32::from_ne_bytes([a, b, c, d]),
            state: u16::from_ne_bytes([e, f]),
            flags,
            address: address?,
            hardware: hardware?,
        })
    }

    /// Makes it known, or changes what is known of its address.
    pub fn add(&self, netlink: &mut Netlink) -> io::Result<()> {
        netlink.change(self.message(), CREATE | REPLACE)
    }
}

/// All neighbours whose hardware is known.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Neighbour>> {
    let all = netlink.list(&Message::new(GET_NEIGHBOUR, &[0; FIXED_LEN]))?;
    let neighbours = all.iter().filter_map(|payload| Neighbour::parse(payload));
    Ok(neighbours.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_neighbour_survives_the_wire(
            interface: u32, state: u16, flags: u8, address: IpAddr, hardware: [u8; 6],
        ) {
            let hardware = hardware.to_vec();
            let neighbour = Neighbour { interface, state, flags, address, hardware };
            let message = neighbour.message();
            prop_assert_eq!(Neighbour::parse(message.payload()), Some(neighbour));
        }

        #[test]
        fn any_bytes_are_a_neighbour_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            let _ = Neighbour::parse(&bytes);
        }
    }
}
