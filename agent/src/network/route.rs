//! Routes of the main table.

use std::io;
use std::net::IpAddr;

use super::address::{self, Prefix};
use super::netlink::{Message, Netlink, attributes, number};

const NEW_ROUTE: u16 = 24;
const GET_ROUTE: u16 = 26;
/// The length of an rtmsg, in bytes.
const FIXED_LEN: usize = 12;
const DESTINATION: u16 = 1;
const SOURCE: u16 = 2;
const INTERFACE: u16 = 4;
const GATEWAY: u16 = 5;
const PREFERRED_SOURCE: u16 = 7;
const METRICS: u16 = 8;
/// The attribute within [`METRICS`] that tells the MTU.
const MTU: u16 = 2;

const MAIN_TABLE: u8 = 254;
/// The origin of a route that was set up at boot (RTPROT_BOOT).
const BOOT: u8 = 3;
pub(super) const UNICAST: u8 = 1;
/// The gateway is on the link though no route says so (RTNH_F_ONLINK). What else there is of flags
/// the kernel sets.
const ON_LINK: u32 = 4;

/// A route; without a destination for all of its family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) family: u8,
    pub(super) destination: Option<Prefix>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) interface: Option<u32>,
    pub(super) source: Option<Prefix>,
    pub(super) scope: u8,
    pub(super) flags: u32,
    pub(super) mtu: u32,
}

impl Route {
    /// The message that has the kernel set this route.
    pub(super) fn message(&self) -> Message {
        let (mut destination_len, mut source_len) = (0, 0);
        let mut attributes = Message::new(0, &[]);
        if let Some(prefix) = self.destination.filter(|prefix| prefix.len > 0) {
            destination_len = prefix.len;
            attributes = attributes.with(DESTINATION, &address::octets(prefix.address));
        }
        match self.source {
            // A network is whom the route is for, an address what is sent from.
            Some(prefix) if prefix.len > 0 && prefix.len < prefix.whole() => {
                source_len = prefix.len;
                attributes = attributes.with(SOURCE, &address::octets(prefix.address));
            }
            Some(prefix) => {
                let octets = address::octets(prefix.address);
                attributes = attributes.with(PREFERRED_SOURCE, &octets);
            }
            None => {}
        }
        if let Some(gateway) = self.gateway {
            attributes = attributes.with(GATEWAY, &address::octets(gateway));
        }
        if let Some(interface) = self.interface {
            attributes = attributes.with(INTERFACE, &interface.to_ne_bytes());
        }
        if self.mtu != 0 {
            let mtu = Message::new(0, &[]).with(MTU, &self.mtu.to_ne_bytes());
            attributes = attributes.with_nested(METRICS, &mtu);
        }
        let [a, b, c, d] = (self.flags & ON_LINK).to_ne_bytes();
        let fixed = [
            self.family,
            destination_len,
            source_len,
            0,
            MAIN_TABLE,
            BOOT,
            self.scope,
            UNICAST,
            a,
            b,
            c,
            d,
        ];
        Message::new(NEW_ROUTE, &fixed).and(&attributes)
    }

    /// Reads a route as the kernel lists it; none if it is of another table or leads nowhere.
    fn parse(payload: &[u8]) -> Option<Self> {
        let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
        let [
            family,
            destination_len,
            source_len,
            _,
            table,
            _,
            scope,
            kind,
            flags @ ..,
        ] = *fixed;
        if table != MAIN_TABLE || kind != UNICAST {
            return None;
        }
        let mut route = Self {
            family,
            destination: None,
            gateway: None,
            interface: None,
            source: None,
            scope,
            flags: u32::from_ne_bytes(flags),
            mtu: 0,
        };
        let prefix = |value, len| {
            let address = address::from_octets(value)?;
            let prefix = Prefix { address, len };
            (len <= prefix.whole()).then_some(prefix)
        };
        for (kind, value) in attributes(rest) {
            match kind {
                DESTINATION => route.destination = Some(prefix(value, destination_len)?),
                SOURCE => route.source = Some(prefix(value, source_len)?),
                PREFERRED_SOURCE => {
                    let address = address::from_octets(value)?;
                    let whole = Prefix { address, len: 0 }.whole();
                    route.source = prefix(value, whole);
                }
                GATEWAY => route.gateway = Some(address::from_octets(value)?),
                INTERFACE => route.interface = Some(number(value)?),
                METRICS => {
                    let mtu = attributes(value).find(|(kind, _)| *kind == MTU);
                    route.mtu = mtu.and_then(|(_, value)| number(value)).unwrap_or_default();
                }
                _ => {}
            }
        }
        Some(route)
    }
}

/// The main table's routes, of both families.
pub(super) fn list(netlink: &mut Netlink) -> io::Result<Vec<Route>> {
    let all = netlink.list(&Message::new(GET_ROUTE, &[0; FIXED_LEN]))?;
    let routes = all.iter().filter_map(|payload| Route::parse(payload));
    Ok(routes.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::option;
    use proptest::prelude::*;

    fn route() -> impl Strategy<Value = Route> {
        let prefix = |v6: bool| {
            let address = any::<u128>().prop_map(move |bits| match v6 {
                true => IpAddr::V6(bits.into()),
                #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
                false => IpAddr::V4((bits as u32).into()),
            });
            let whole = if v6 { 128_u8 } else { 32 };
            (address, 1..=whole).prop_map(|(address, len)| Prefix { address, len })
        };
        any::<bool>().prop_flat_map(move |v6| {
            let gateway = prefix(v6).prop_map(|prefix| prefix.address);
            let ends = (
                option::of(prefix(v6)),
                option::of(prefix(v6)),
                option::of(gateway),
            );
            let rest = (
                option::of(any::<u32>()),
                any::<u8>(),
                any::<bool>(),
                any::<u32>(),
            );
            (ends, rest).prop_map(move |(ends, (interface, scope, on_link, mtu))| Route {
                family: if v6 { address::V6 } else { address::V4 },
                destination: ends.0,
                source: ends.1,
                gateway: ends.2,
                interface,
                scope,
                flags: if on_link { ON_LINK } else { 0 },
                mtu,
            })
        })
    }

    #[test]
    fn only_flags_that_may_be_set_are_sent() {
        let route = Route {
            family: address::V4,
            destination: None,
            gateway: None,
            interface: None,
            source: "10.0.0.9/0".parse().ok(),
            scope: 253,
            flags: 0xff,
            mtu: 0,
        };
        let bytes = route.message().payload();
        assert_eq!(bytes[..12], [2, 0, 0, 0, 254, 3, 253, 1, 4, 0, 0, 0]);
        // No network is meant by a prefix of nothing.
        assert_eq!(bytes[12..], [8, 0, 7, 0, 10, 0, 0, 9]);
    }

    proptest! {
        #[test]
        fn a_route_survives_the_wire(route in route()) {
            let back = Route::parse(&route.message().payload());
            prop_assert_eq!(back, Some(route));
        }

        #[test]
        fn any_bytes_are_a_route_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            let _ = Route::parse(&bytes);
        }
    }
}
