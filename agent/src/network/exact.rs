//! Routes and routing rules as a kernel lists them, made into requests that set them in this one
//! (linux/rtnetlink.h, linux/fib_rules.h). They stay as they are, except for the numbers of
//! interfaces and for what a kernel says of a route but no request can set.

use std::collections::HashMap;

use protocol::netlink::route::{
    FIXED_LEN, GATEWAY, GATEWAY_OF_OTHER_FAMILY, INTERFACE, NEW_ROUTE, SEVERAL,
};
use protocol::netlink::{Message, attributes, number};

const NEW_RULE: u16 = 32;

/// Attributes of a route that no request can set.
const CACHE_FIGURES: u16 = 12;
/// The number of an object of the host's that has the gateway, which is listed too.
const NEXT_HOP_OBJECT: u16 = 30;

/// An attribute of a rule.
const PRIORITY: u16 = 6;

/// The length of one of a route's ways, in bytes (struct rtnexthop): a length, flags, a weight and
/// the interface's number.
const WAY_LEN: usize = 8;
/// What of a route's or way's flags can be set (RTNH_F_PERVASIVE, RTNH_F_ONLINK): the rest is its state.
const ROUTE_FLAGS: u8 = 2 | 4;
/// What of a rule's flags can be set (FIB_RULE_INVERT).
const RULE_FLAGS: u8 = 2;

/// The request that sets a route, and whether it needs another one to reach its gateway. `indices` are this
/// kernel's numbers of interfaces by the host's.
pub(crate) fn route(payload: &[u8], indices: &HashMap<u32, u32>) -> Option<(bool, Message)> {
    let (fixed, rest) = fixed(payload, ROUTE_FLAGS)?;
    let mut message = Message::new(NEW_ROUTE, &fixed);
    let mut has_gateway = false;
    for (kind, value) in attributes(rest) {
        match kind {
            CACHE_FIGURES | NEXT_HOP_OBJECT => continue,
            INTERFACE => {
                let index = indices.get(&number(value)?)?;
                message = message.with(kind, &index.to_ne_bytes());
                continue;
            }
            SEVERAL => {
                has_gateway = true;
                message = message.with(kind, &ways(value, indices)?);
                continue;
            }
            GATEWAY | GATEWAY_OF_OTHER_FAMILY => has_gateway = true,
            _ => {}
        }
        message = message.with(kind, value);
    }
    Some((has_gateway, message))
}

/// The request that sets a rule. It names interfaces by their names, which are the same here.
pub(crate) fn rule(payload: &[u8]) -> Option<Message> {
    let (fixed, rest) = fixed(payload, RULE_FLAGS)?;
    let mut message = Message::new(NEW_RULE, &fixed);
    // A kernel lists none for the first of all, and chooses one where none is asked for.
    if !attributes(rest).any(|(kind, _)| kind == PRIORITY) {
        message = message.with(PRIORITY, &0_u32.to_ne_bytes());
    }
    Some(attributes(rest).fold(message, |message, (kind, value)| message.with(kind, value)))
}

/// The fixed part, an rtmsg or a fib_rule_hdr of the same length, with what can be set of its flags, which are its
/// last number, and what follows it.
fn fixed(payload: &[u8], settable: u8) -> Option<([u8; FIXED_LEN], &[u8])> {
    let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
    let [head @ .., flags, _, _, _] = *fixed;
    let [a, b, c, d, e, f, g, h] = head;
    let fixed = [a, b, c, d, e, f, g, h, flags & settable, 0, 0, 0];
    Some((fixed, rest))
}

/// Several ways with this kernel's numbers of their interfaces.
fn ways(value: &[u8], indices: &HashMap<u32, u32>) -> Option<Vec<u8>> {
    let mut ways = value.to_vec();
    let mut at = 0;
    while at < ways.len() {
        let way = ways.get_mut(at..)?.first_chunk_mut::<WAY_LEN>()?;
        let [a, b, flags, _, index @ ..] = way;
        *flags &= ROUTE_FLAGS;
        let len = usize::from(u16::from_ne_bytes([*a, *b]));
        *index = indices.get(&u32::from_ne_bytes(*index))?.to_ne_bytes();
        if len < WAY_LEN {
            return None;
        }
        at += len.next_multiple_of(4);
    }
    Some(ways)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::update_routes;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use protocol::agent::messages::{ExactRoutes, NumberedInterface};
    use protocol::agent::types::Route;
    use protocol::netlink::Netlink;
    use protocol::netlink::route::GET_ROUTE;
    use std::collections::BTreeSet;
    use std::process::Command;

    const GET_RULE: u16 = 34;

    fn ip(line: &str) -> String {
        let output = Command::new("ip").args(line.split(' ')).output();
        let output = output.expect("iproute2 is installed");
        assert!(output.status.success(), "ip {line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `act` in a network of its own in which eth0 and eth1 are up, and which has so many others.
    fn in_a_network<T: Send>(others: usize, act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: it changes nothing but which network this thread sees.
                let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
                assert_eq!(unshared, 0, "this test needs root");
                for number in 0..others {
                    ip(&format!("link add other{number} type bridge"));
                }
                for (name, address) in [("eth0", "10.9.8.7/24"), ("eth1", "10.9.9.7/24")] {
                    ip(&format!("link add {name} type bridge"));
                    ip(&format!("address add {address} dev {name}"));
                    ip(&format!("link set {name} up"));
                }
                ip("-6 address add fd00::7/64 dev eth0 nodad");
                act()
            });
            thread.join().unwrap()
        })
    }

    /// What ip(8) says of all routes that the kernel did not set itself, and of all rules.
    fn said() -> Vec<String> {
        let listed = ["-4", "-6"].map(|family| {
            let routes = ip(&format!("{family} route show table all"));
            let rules = ip(&format!("{family} rule show"));
            let set = routes.lines().filter(|line| !line.contains("proto kernel"));
            set.chain(rules.lines())
                .map(|line| line.trim().replace(" linkdown", ""))
                .collect::<Vec<_>>()
        });
        let mut listed = listed.concat();
        listed.sort();
        listed
    }

    /// The numbers of eth0 and eth1, and of lo, which is the first of each network.
    fn indices() -> [u32; 3] {
        ["lo", "eth0", "eth1"].map(|name| {
            let line = ip(&format!("link show {name}"));
            line.split(':').next().unwrap().parse().unwrap()
        })
    }

    /// The payloads of all messages of a kind, of both families.
    fn listed(kind: u16) -> Vec<Vec<u8>> {
        let netlink = &mut Netlink::open().unwrap();
        let listed = [2, 10].map(|family| {
            let mut fixed = [0; FIXED_LEN];
            fixed[0] = family;
            netlink.list(&Message::new(kind, &fixed)).unwrap()
        });
        listed.concat()
    }

    #[test]
    fn what_a_kernel_lists_another_one_sets() {
        let _turn = crate::sys::turn_with_children();
        let made = [
            "route add 10.10.0.1 dev eth0 scope link metric 5",
            "route add default via 10.9.8.1 metric 100",
            "route add default via 10.9.9.1 metric 200",
            "route add 10.1.0.0/16 nexthop via 10.9.8.2 weight 3 nexthop via 10.9.9.2",
            "route add blackhole 10.2.0.0/16",
            "route add prohibit 10.8.0.0/16 metric 7",
            "route add default via 10.9.9.1 dev eth1 table 100",
            "route add 10.3.0.0/16 via 10.9.8.2 table 1000 mtu 1300 onlink dev eth0",
            "route add 10.4.0.0/16 via 10.9.8.2 tos 0x10",
            "route add 10.5.0.0/16 via inet6 fd00::2 dev eth0",
            "-6 route add fd01::/64 via fd00::2 metric 5",
            "-6 route add unreachable fd02::/64",
            "rule add from 10.9.9.7 table 100",
            "rule add not fwmark 0x10/0xf0 iif eth1 lookup 1000 pref 77",
            "rule add to 10.77.0.0/16 prohibit",
            "-6 rule add from fd00::7 table 100 pref 50",
        ];
        let (before, routes, rules, expected) = in_a_network(0, || {
            for line in made {
                ip(line);
            }
            (indices(), listed(GET_ROUTE), listed(GET_RULE), said())
        });
        let found = in_a_network(3, || {
            assert_ne!(before[1..], indices()[1..]);
            let named = |(index, name): (u32, &str)| NumberedInterface {
                index,
                name: name.into(),
            };
            // Those that the kernel makes by itself are there (RTPROT_KERNEL).
            let is_set = |payload: &&Vec<u8>| payload[5] != 2;
            let wanted = ExactRoutes {
                interfaces: before
                    .into_iter()
                    .zip(["lo", "eth0", "eth1"])
                    .map(named)
                    .collect(),
                routes: routes.iter().filter(is_set).cloned().collect(),
                rules,
            };
            // Which is reached by one of the others.
            let plain = [Route {
                dest: "10.11.0.0/16".into(),
                gateway: "10.10.0.1".into(),
                device: "eth0".into(),
                ..Route::default()
            }];
            let wanted_count = u32::try_from(wanted.routes.len() + wanted.rules.len()).unwrap();
            for _ in 0..2 {
                assert_eq!(update_routes(&plain, &wanted).unwrap(), wanted_count);
            }
            said()
        });
        let mut expected = expected;
        expected.push("10.11.0.0/16 via 10.10.0.1 dev eth0 proto boot".into());
        let plain = |lines: Vec<String>| -> BTreeSet<_> {
            lines
                .iter()
                .map(|line| line.replace(" proto boot", ""))
                .collect()
        };
        assert_eq!(plain(found), plain(expected));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none(bytes in vec(any::<u8>(), 0..200)) {
            let indices = (0..256).map(|index| (index, index + 1)).collect();
            let _ = (route(&bytes, &indices), rule(&bytes));
        }

        #[test]
        fn any_ways_have_their_interfaces_or_are_none(
            interfaces in vec(0..4_u32, 0..9), rest in vec(any::<u8>(), 0..20),
        ) {
            let indices = HashMap::from([(1, 11), (2, 12), (3, 13)]);
            let way = |index: u32| [&[16, 0, 0xff, 3][..], &index.to_ne_bytes(), &[8, 0, 5, 0, 10, 9, 8, 7]].concat();
            let listed = interfaces.iter().flat_map(|index| way(*index)).collect::<Vec<_>>();
            let mapped = ways(&listed, &indices);
            prop_assert_eq!(mapped.is_some(), !interfaces.contains(&0));
            let flags = mapped.iter().flat_map(|it| it.chunks(16)).all(|way| way[2] == 6 && way[4] > 10);
            prop_assert!(flags);
            let _ = ways(&[listed, rest].concat(), &indices);
        }
    }
}
