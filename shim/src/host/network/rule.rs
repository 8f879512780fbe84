//! The rules by which tables of routes are chosen (linux/fib_rules.h).

use std::io;

use protocol::netlink::address::{V4, V6};
use protocol::netlink::{Message, Netlink, attributes, number};

const GET_RULE: u16 = 34;
/// The length of a fib_rule_hdr, in bytes.
const FIXED_LEN: usize = 12;
const PRIORITY: u16 = 6;
const SUPPRESSED_PREFIX: u16 = 14;
const TABLE: u16 = 15;
const ORIGIN: u16 = 21;
/// The action of a rule that chooses a table (FR_ACT_TO_TBL).
const TO_TABLE: u8 = 1;

/// The rules as the kernel lists them, without those that each kernel has.
pub(super) fn list(netlink: &mut Netlink) -> io::Result<Vec<Vec<u8>>> {
    let mut rules = netlink.list(&Message::new(GET_RULE, &[0; FIXED_LEN]))?;
    rules.retain(|payload| is_set(payload).unwrap_or_default());
    Ok(rules)
}

/// Whether a rule is of IPv4 or IPv6, and not one the kernel made: to the tables local, main and default, in
/// this order.
fn is_set(payload: &[u8]) -> Option<bool> {
    let (fixed, rest) = payload.split_first_chunk::<FIXED_LEN>()?;
    let [family, _, _, service, table, _, _, action, _, _, _, _] = *fixed;
    let (mut priority, mut table, mut is_plain) = (0, u32::from(table), true);
    for (kind, value) in attributes(rest) {
        match kind {
            PRIORITY => priority = number(value)?,
            TABLE => table = number(value)?,
            ORIGIN => {}
            SUPPRESSED_PREFIX if number(value) == Some(u32::MAX) => {}
            _ => is_plain = false,
        }
    }
    let is_kernels = matches!((priority, table), (0, 255) | (32766, 254) | (32767, 253))
        && (action, service) == (TO_TABLE, 0)
        && is_plain;
    Some(matches!(family, V4 | V6) && !is_kernels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_rules_are_not_set() {
        let rule = |family: u8, table: u8, priority: u32| {
            let fixed = [family, 0, 0, 0, table, 0, 0, TO_TABLE, 0, 0, 0, 0];
            Message::new(0, &fixed)
                .with(SUPPRESSED_PREFIX, &u32::MAX.to_ne_bytes())
                .with(TABLE, &u32::from(table).to_ne_bytes())
                .with(PRIORITY, &priority.to_ne_bytes())
                .with(ORIGIN, &[2])
        };
        for family in [V4, V6] {
            for (table, priority) in [(255, 0), (254, 32766), (253, 32767)] {
                let kernels = rule(family, table, priority);
                assert_eq!(is_set(kernels.payload()), Some(false));
                // FRA_FWMARK.
                let marked = kernels.with(10, &[1; 4]);
                assert_eq!(is_set(marked.payload()), Some(true));
            }
            assert_eq!(is_set(rule(family, 254, 100).payload()), Some(true));
        }
        // Multicast's (RTNL_FAMILY_IPMR), which the guest is not told of.
        assert_eq!(is_set(rule(128, 250, 100).payload()), Some(false));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_rule_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            let _ = is_set(&bytes);
        }
    }
}
