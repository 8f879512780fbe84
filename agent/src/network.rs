//! The pod's network, as the host tells it: the guest's interfaces, routes and neighbours. Each call
//! has a conversation with the kernel of its own.

pub(crate) mod exact;
mod link;

use std::collections::HashMap;
use std::io;
use std::path::Path;

use protocol::agent::messages::ExactRoutes;
use protocol::agent::types::{ArpNeighbor, Interface, IpAddress, IpFamily, Route};
use protocol::netlink::address::{self, NoAddress, Prefix};
use protocol::netlink::link::{Change, Link, NO_ARP, UP};
use protocol::netlink::neighbour::{Neighbour, PERMANENT};
use protocol::netlink::{CREATE, EXCLUSIVE, Netlink, REPLACE, route};
use protocol::ttrpc::{Code, Status};

/// Longest name of an interface (IFNAMSIZ, with its NUL).
const NAME_LEN: usize = 15;

/// Why the network is not as the host wants it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The words are the protocol's: shims ask again when they read them.
    #[error("Link not found ({0})")]
    NoLink(String),
    #[error(transparent)]
    Address(#[from] NoAddress),
    #[error("{0:?} is no hardware address")]
    Hardware(String),
    #[error("{0:?} is no name for an interface")]
    Name(String),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("a {0} is not as rtnetlink has it, or of an interface that is not named")]
    Malformed(&'static str),
    #[error("{what} {value} is out of range")]
    Range { what: &'static str, value: i64 },
    #[error("{what}: {source}")]
    Kernel { what: String, source: io::Error },
}

impl Error {
    fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |source| Self::Kernel { what, source }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::NoLink(_) => Code::NotFound,
            Error::Kernel { .. } => Code::Internal,
            Error::Address(_)
            | Error::Hardware(_)
            | Error::Name(_)
            | Error::Missing(_)
            | Error::Malformed(_)
            | Error::Range { .. } => Code::InvalidArgument,
        };
        Self::new(code, error)
    }
}

type Result<T> = std::result::Result<T, Error>;

fn open() -> Result<Netlink> {
    Netlink::open().map_err(Error::kernel("talk to the kernel"))
}

fn links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    protocol::netlink::link::list(netlink).map_err(Error::kernel("list interfaces"))
}

fn narrow<T: TryFrom<i64>>(what: &'static str, value: i64) -> Result<T> {
    T::try_from(value).map_err(|_| Error::Range { what, value })
}

/// Makes an interface, found by its hardware address, what `wanted` says. One that the host has not
/// spoken of yet may take that address.
pub(crate) fn update_interface(wanted: Interface) -> Result<Interface> {
    let hardware = address::hardware(&wanted.hw_addr);
    if hardware.is_none() && !wanted.hw_addr.is_empty() {
        return Err(Error::Hardware(wanted.hw_addr));
    }
    if !wanted.name.is_empty() && !is_name(&wanted.name) {
        return Err(Error::Name(wanted.name));
    }
    let mtu = wanted.mtu.try_into().unwrap_or(i64::MAX);
    let mtu: u32 = narrow("mtu", mtu)?;
    let addresses = prefixes(&wanted.addresses)?;
    let netlink = &mut open()?;
    let links = links(netlink)?;
    let link = link::find(&links, &wanted.hw_addr, &wanted.device);
    // The kernel read the device's address when it found the device. In a clone that was in the
    // template, so its interface has the template's, and takes its own when the host first speaks
    // of it.
    let unnamed = || {
        let hardware = hardware.as_deref()?;
        Some((link::unnamed(&links, hardware)?, Some(hardware)))
    };
    let found = link.map(|link| (link, None)).or_else(unnamed);
    let no_link = || Error::NoLink(format!("Address: {}", wanted.hw_addr));
    let (link, hardware) = found.ok_or_else(no_link)?;
    let act = |what: &str| format!("{what} {}", link.name);
    if hardware.is_some() {
        // This comes before the interface is up: no other host is to see the template's address.
        let change = Change {
            hardware,
            ..Change::default()
        };
        let what = format!("give {} the address {}", link.name, wanted.hw_addr);
        change
            .apply(netlink, link.index)
            .map_err(Error::kernel(what))?;
    }
    if !wanted.name.is_empty() && wanted.name != link.name {
        link::rename(netlink, link, &wanted.name).map_err(Error::kernel(act("rename")))?;
    }
    let change = Change {
        mtu: (mtu != 0).then_some(mtu),
        flags: UP | wanted.raw_flags & NO_ARP,
        mask: UP | NO_ARP,
        ..Change::default()
    };
    change
        .apply(netlink, link.index)
        .map_err(Error::kernel(act("set up")))?;
    assign(netlink, link.index, &addresses)?;
    Ok(wanted)
}

/// Gives an interface these addresses, and takes those that it should not have. Those the kernel
/// gave it by itself stay.
fn assign(netlink: &mut Netlink, interface: u32, wanted: &[Prefix]) -> Result<()> {
    let all = address::list(netlink).map_err(Error::kernel("list addresses"))?;
    let had = all
        .iter()
        .filter(|assigned| assigned.interface == interface);
    for assigned in had {
        let prefix = &assigned.prefix;
        if !wanted.contains(prefix) && !is_the_kernels(prefix) {
            address::remove(netlink, interface, prefix)
                .map_err(Error::kernel(format!("remove address {prefix}")))?;
        }
    }
    for prefix in wanted {
        address::add(netlink, interface, prefix)
            .map_err(Error::kernel(format!("add address {prefix}")))?;
    }
    Ok(())
}

fn is_the_kernels(prefix: &Prefix) -> bool {
    match prefix.address {
        std::net::IpAddr::V4(_) => false,
        std::net::IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Whether the kernel takes this as an interface's name (`dev_valid_name()`).
fn is_name(name: &str) -> bool {
    let plain = |c: char| !(c == '/' || c == ':' || c == '\0' || c.is_whitespace());
    (1..=NAME_LEN).contains(&name.len()) && name != "." && name != ".." && name.chars().all(plain)
}

/// The addresses, without those of a family that the guest has not.
fn prefixes(addresses: &[IpAddress]) -> Result<Vec<Prefix>> {
    let v6 = has_v6();
    let mut prefixes = Vec::new();
    for IpAddress { address, mask, .. } in addresses {
        let prefix = Prefix::new(address, mask)?;
        if v6 || prefix.address.is_ipv4() {
            prefixes.push(prefix);
        }
    }
    Ok(prefixes)
}

fn has_v6() -> bool {
    let disabled = std::fs::read("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    Path::new("/proc/net/if_inet6").exists()
        && !disabled.is_ok_and(|text| text.trim_ascii() == b"1")
}

/// Adds routes, and then rules. Gateways are reached by routes without one, so those come first. Routes to
/// other destinations stay. Returns how many of `exact` were understood.
pub(crate) fn update_routes(wanted: &[Route], exact: &ExactRoutes) -> Result<u32> {
    let v6 = has_v6();
    let netlink = &mut open()?;
    let links = links(netlink)?;
    let mut requests = Vec::new();
    for route in wanted {
        let parsed = parse_route(route, &links)?;
        if v6 || parsed.family == address::V4 {
            let what = match route.dest.is_empty() {
                true => "add the default route".into(),
                false => format!("add a route to {}", route.dest),
            };
            requests.push((!route.gateway.is_empty(), what, parsed.message()));
        }
    }
    let mut indices = HashMap::new();
    for interface in &exact.interfaces {
        indices.insert(interface.index, by_name(&links, &interface.name)?.index);
    }
    // Of a family that the guest has not, none is set, here as above.
    let is_set = |payload: &&Vec<u8>| v6 || payload.first() != Some(&address::V6);
    for payload in exact.routes.iter().filter(is_set) {
        let route = exact::route(payload, &indices).ok_or(Error::Malformed("route"))?;
        requests.push((route.0, "add a route of the host's".into(), route.1));
    }
    requests.sort_by_key(|(has_gateway, ..)| *has_gateway);
    for (_, what, message) in requests {
        netlink
            .change(message, CREATE | REPLACE)
            .map_err(Error::kernel(what))?;
    }
    for payload in exact.rules.iter().filter(is_set) {
        let message = exact::rule(payload).ok_or(Error::Malformed("rule"))?;
        match netlink.change(message, CREATE | EXCLUSIVE) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::kernel("add a rule of the host's")(error));
            }
            _ => {}
        }
    }
    let set = exact.routes.len() + exact.rules.len();
    Ok(u32::try_from(set).expect("a message has not so many"))
}

fn parse_route(wanted: &Route, links: &[Link]) -> Result<route::Route> {
    let family = if wanted.family == IpFamily::V6 as i32 {
        address::V6
    } else {
        address::V4
    };
    let of_family = |text: &str| -> Result<Option<Prefix>> {
        if text.is_empty() {
            return Ok(None);
        }
        let prefix: Prefix = text.parse()?;
        match prefix.family() == family {
            true => Ok(Some(prefix)),
            false => Err(NoAddress(text.into()).into()),
        }
    };
    let interface = match wanted.device.as_str() {
        "" => None,
        name => Some(by_name(links, name)?.index),
    };
    Ok(route::Route {
        family,
        destination: of_family(&wanted.dest)?,
        gateway: of_family(&wanted.gateway)?.map(|prefix| prefix.address),
        interface,
        source: of_family(&wanted.source)?,
        scope: narrow("scope", wanted.scope.into())?,
        flags: wanted.flags,
        mtu: wanted.mtu,
    })
}

fn by_name<'a>(links: &'a [Link], name: &str) -> Result<&'a Link> {
    let link = links.iter().find(|link| link.name == name);
    link.ok_or_else(|| Error::NoLink(format!("Name: {name}")))
}

/// Makes neighbours known.
pub(crate) fn add_neighbours(wanted: &[ArpNeighbor]) -> Result<()> {
    let netlink = &mut open()?;
    let links = links(netlink)?;
    for neighbour in wanted {
        parse_neighbour(neighbour, &links)?
            .add(netlink)
            .map_err(Error::kernel(format!("add neighbour {}", neighbour.lladdr)))?;
    }
    Ok(())
}

fn parse_neighbour(wanted: &ArpNeighbor, links: &[Link]) -> Result<Neighbour> {
    let to = wanted.to_ip_address.as_ref();
    let to = &to.ok_or(Error::Missing("toIPAddress"))?.address;
    let to: Prefix = to.parse()?;
    let hardware = address::hardware(&wanted.lladdr);
    let hardware = hardware.ok_or_else(|| Error::Hardware(wanted.lladdr.clone()))?;
    Ok(Neighbour {
        interface: by_name(links, &wanted.device)?.index,
        state: match wanted.state {
            0 => PERMANENT,
            state => narrow("state", state.into())?,
        },
        flags: narrow("flags", wanted.flags.into())?,
        address: to.address,
        hardware,
    })
}

/// All interfaces with their addresses.
pub(crate) fn list_interfaces() -> Result<Vec<Interface>> {
    let netlink = &mut open()?;
    let links = links(netlink)?;
    let all = address::list(netlink).map_err(Error::kernel("list addresses"))?;
    let interfaces = links.into_iter().map(|link| {
        let own = all
            .iter()
            .filter(|assigned| assigned.interface == link.index);
        let addresses = own.map(|assigned| IpAddress {
            family: wire_family(assigned.prefix.family()),
            address: assigned.prefix.address.to_string(),
            mask: assigned.prefix.len.to_string(),
        });
        Interface {
            addresses: addresses.collect(),
            device: link.name.clone(),
            name: link.name,
            mtu: link.mtu.into(),
            hw_addr: address::hardware_text(&link.hardware),
            r#type: link.kind,
            raw_flags: link.flags,
            ..Interface::default()
        }
    });
    Ok(interfaces.collect())
}

fn wire_family(family: u8) -> i32 {
    match family {
        address::V6 => IpFamily::V6.into(),
        _ => IpFamily::V4.into(),
    }
}

/// The routes of the main table.
pub(crate) fn list_routes() -> Result<Vec<Route>> {
    let netlink = &mut open()?;
    let links = links(netlink)?;
    let all = route::list(netlink).map_err(Error::kernel("list routes"))?;
    let name = |index| links.iter().find(|link| Some(link.index) == index);
    let main = all.into_iter().filter(|listed| listed.is_main);
    let routes = main.map(|listed| listed.route).map(|route| Route {
        dest: text(route.destination),
        gateway: text(route.gateway),
        device: name(route.interface).map_or_else(String::new, |link| link.name.clone()),
        source: text(route.source.map(|prefix| prefix.address)),
        scope: route.scope.into(),
        family: wire_family(route.family),
        flags: route.flags,
        mtu: route.mtu,
    });
    Ok(routes.collect())
}

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
