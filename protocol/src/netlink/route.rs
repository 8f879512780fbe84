//! Routes, and the numbers of what a route's message has.

use std::io;
use std::net::IpAddr;

use super::address::{self, Prefix, V4, V6};
use super::{Message, Netlink, attributes, number};

/// The request that sets a route, and the kind of an answer that lists one.
pub const NEW_ROUTE: u16 = 24;
/// The request for a list of routes.
pub const GET_ROUTE: u16 = 26;
/// The length of an rtmsg, in bytes.
pub const FIXED_LEN: usize = 12;

const DESTINATION: u16 = 1;
const SOURCE: u16 = 2;
/// The attribute for the number of the interface by which a route leads.
pub const INTERFACE: u16 = 4;
/// The attribute for a gateway.
pub const GATEWAY: u16 = 5;
const METRIC: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;
const METRICS: u16 = 8;
/// The attribute for several ways, each with its gateway.
pub const SEVERAL: u16 = 9;
const TABLE: u16 = 15;
/// The attribute for a gateway of another family than the route's.
pub const GATEWAY_OF_OTHER_FAMILY: u16 = 18;
const ENCAPSULATION: u16 = 21;
/// The attribute within [`METRICS`] that tells the MTU.
const MTU: u16 = 2;

const MAIN_TABLE: u8 = 254;
/// The origin of a route that was set up at boot (RTPROT_BOOT).
const BOOT: u8 = 3;
/// The origin of a route that a router's message made (RTPROT_REDIRECT).
pub const REDIRECT: u8 = 1;
/// The origin of a route that the kernel made by itself (RTPROT_KERNEL).
pub const KERNEL: u8 = 2;
/// The kind of a route that leads somewhere (RTN_UNICAST).
pub const UNICAST: u8 = 1;
/// The flag of a route whose gateway is on the link though no route says so (RTNH_F_ONLINK).
pub const ON_LINK: u32 = 4;
/// The metric of an IPv6 route for which the user gave none (linux/ipv6_route.h, IP6_RT_PRIO_USER).
const USUAL_V6_METRIC: u32 = 1024;

/// A route; without a destination for all of its family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// [`V4`] or [`V6`].
    pub family: u8,
    pub destination: Option<Prefix>,
    pub gateway: Option<IpAddr>,
    /// The number of the interface by which it leads.
    pub interface: Option<u32>,
    /// A network whose packets alone it is for, or the address from which is sent.
    pub source: Option<Prefix>,
    pub scope: u8,
    /// [`ON_LINK`], and what the kernel tells of the route's state.
    pub flags: u32,
    /// Longest packet, in bytes; 0 for the interface's.
    pub mtu: u32,
}

impl Route {
    /// The message that has the kernel set this route.
    pub fn message(&self) -> Message {
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
}

/// A route as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub route: Route,
    /// What made it, such as [`KERNEL`].
    pub origin: u8,
    /// Whether it is of the main table and leads somewhere.
    pub is_main: bool,
    /// Whether it has something that a [`Route`] cannot have, such as a metric or several gateways.
    pub has_more: bool,
    /// All of it, as in a message that sets it.
    pub payload: Vec<u8>,
}

impl Listed {
    /// Reads a route; `None` if it is not one of IPv4's or IPv6's.
    fn parse(payload: Vec<u8>) -> Option<Self> {
        let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
        let [
            family,
            destination_len,
            source_len,
            service,
            table,
            origin,
            scope,
            kind,
            flags @ ..,
        ] = *fixed;
        let usual_metric = match family {
            V4 => 0,
            V6 => USUAL_V6_METRIC,
            _ => return None,
        };
        let mut route = Route {
            family,
            destination: None,
            gateway: None,
            interface: None,
            source: None,
            scope,
            flags: u32::from_ne_bytes(flags),
            mtu: 0,
        };
        let mut table = u32::from(table);
        let mut has_more = service != 0;
        let prefix = |value, len| {
            let address = address::from_octets(value)?;
            let prefix = Prefix { address, len };
            (len <= prefix.whole()).then_some(prefix)
        };
        for (kind, value) in attributes(rest) {
            match kind {
                DESTINATION => route.destination = Some(prefix(value, destination_len)?),
                SOURCE => {
                    route.source = Some(prefix(value, source_len)?);
                    has_more = true;
                }
                PREFERRED_SOURCE => {
                    let address = address::from_octets(value)?;
                    let whole = Prefix { address, len: 0 }.whole();
                    route.source = prefix(value, whole);
                }
                GATEWAY => route.gateway = Some(address::from_octets(value)?),
                INTERFACE => route.interface = Some(number(value)?),
                TABLE => table = number(value)?,
                METRIC => has_more |= number(value)? != usual_metric,
                METRICS => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            MTU => route.mtu = number(value).unwrap_or_default(),
                            _ => has_more = true,
                        }
                    }
                }
                SEVERAL | GATEWAY_OF_OTHER_FAMILY | ENCAPSULATION => has_more = true,
                _ => {}
            }
        }
        Some(Self {
            route,
            origin,
            is_main: table == u32::from(MAIN_TABLE) && kind == UNICAST,
            has_more,
            payload,
        })
    }
}

/// The routes of all tables, of both families.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Listed>> {
    let all = netlink.list(&Message::new(GET_ROUTE, &[0; FIXED_LEN]))?;
    Ok(all.into_iter().filter_map(Listed::parse).collect())
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
                family: if v6 { V6 } else { V4 },
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
            family: V4,
            destination: None,
            gateway: None,
            interface: None,
            source: "10.0.0.9/0".parse().ok(),
            scope: 253,
            flags: 0xff,
            mtu: 0,
        };
        let message = route.message();
        let bytes = message.payload();
        assert_eq!(bytes[..12], [2, 0, 0, 0, 254, 3, 253, 1, 4, 0, 0, 0]);
        // No network is meant by a prefix of nothing.
        assert_eq!(bytes[12..], [8, 0, 7, 0, 10, 0, 0, 9]);
    }

    #[test]
    fn what_a_route_cannot_have_is_noticed() {
        let listed = |change: &[(usize, u8)], attribute: Option<(u16, &[u8])>| {
            let mut fixed = [V4, 0, 0, 0, MAIN_TABLE, BOOT, 0, UNICAST, 0, 0, 0, 0];
            for (at, byte) in change {
                fixed[*at] = *byte;
            }
            let mut message = Message::new(NEW_ROUTE, &fixed);
            if let Some((kind, value)) = attribute {
                message = message.with(kind, value);
            }
            let listed = Listed::parse(message.payload().to_vec());
            listed.map(|listed| (listed.is_main, listed.has_more))
        };
        let number = u32::to_ne_bytes;
        let is_all = Some((true, false));
        assert_eq!(listed(&[], None), is_all);
        assert_eq!(listed(&[], Some((METRIC, &number(0)))), is_all);
        assert_eq!(listed(&[(0, V6)], Some((METRIC, &number(1024)))), is_all);
        assert_eq!(
            listed(&[], Some((METRICS, &[8, 0, 2, 0, 0, 5, 0, 0]))),
            is_all
        );
        let has_more = Some((true, true));
        assert_eq!(listed(&[(3, 0x10)], None), has_more);
        assert_eq!(
            listed(&[], Some((METRICS, &[8, 0, 8, 0, 0, 5, 0, 0]))),
            has_more
        );
        assert_eq!(listed(&[(2, 8)], Some((SOURCE, &[10, 0, 0, 0]))), has_more);
        for (kind, value) in [
            (METRIC, 1024),
            (SEVERAL, 0),
            (GATEWAY_OF_OTHER_FAMILY, 0),
            (ENCAPSULATION, 1),
        ] {
            assert_eq!(
                listed(&[], Some((kind, &number(value)))),
                has_more,
                "{kind}"
            );
        }
        let other = Some((false, false));
        assert_eq!(listed(&[], Some((TABLE, &number(1000)))), other);
        assert_eq!(listed(&[(4, 100)], None), other);
        assert_eq!(listed(&[(7, 6)], None), other);
        // MPLS has labels of four bytes, and IPv4's multicast a family of its own.
        for family in [28, 128] {
            let change = [(0, family), (1, 20)];
            assert_eq!(listed(&change, Some((DESTINATION, &[0, 1, 1, 0]))), None);
        }
    }

    proptest! {
        #[test]
        fn a_route_survives_the_wire(route in route()) {
            let payload = route.message().payload().to_vec();
            let for_a_network = |source: &Prefix| source.len < source.whole();
            let expected = Listed {
                has_more: route.source.as_ref().is_some_and(for_a_network),
                route,
                origin: BOOT,
                is_main: true,
                payload: payload.clone(),
            };
            prop_assert_eq!(Listed::parse(payload), Some(expected));
        }

        #[test]
        fn any_bytes_are_a_route_or_none(
            family in prop_oneof![Just(V4), Just(V6)], bytes in proptest::collection::vec(any::<u8>(), 0..99),
        ) {
            let _ = Listed::parse(bytes.clone());
            let _ = Listed::parse([vec![family], bytes].concat());
        }
    }
}
