//! The pod's network: a network namespace that containerd or its client prepared (for the CRI, by
//! CNI), in which each interface is connected to a tap of the VM's. All frames that arrive at one
//! leave by the other (tc's `redirect`), so that the guest takes the interface's place: its MAC and
//! its addresses.

mod redirect;
mod rule;
mod tap;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use protocol::agent::messages::{ExactRoutes, NumberedInterface};
use protocol::agent::types::{ArpNeighbor, Interface, IpAddress, IpFamily, Route};
use protocol::netlink::Netlink;
use protocol::netlink::address::{self, Assigned};
use protocol::netlink::link::{self, Change, Link as Found};
use protocol::netlink::neighbour::{self, Neighbour, PERMANENT};
use protocol::netlink::route::{self, KERNEL, ON_LINK, REDIRECT};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// What the VM's end of an interface is called, and its number.
const TAP: &str = "podvmm";

/// The number of the loopback interface in each network namespace.
const LOOPBACK: u32 = 1;

/// The flag of a route that is never deleted by itself (linux/rtnetlink.h, RTNH_F_PERVASIVE).
const PERVASIVE: u32 = 2;

/// The scope of routes to what is on the link itself (linux/rtnetlink.h, RT_SCOPE_LINK).
const LINK_SCOPE: u32 = 253;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("enter network namespace {}", .path.display())]
    Enter { path: PathBuf, source: io::Error },
    #[error("make a network namespace")]
    Make(#[source] io::Error),
    #[error("{what}")]
    Netlink { what: String, source: io::Error },
    #[error("start a thread")]
    Thread(#[source] io::Error),
    #[error("make tap {name}")]
    Tap { name: String, source: io::Error },
    #[error("the pod has {0} interfaces, and a VM that waited has one")]
    Count(usize),
    /// What the guest's agent cannot be told, or cannot make.
    #[error("the pod's network has {0}, which its VM cannot have")]
    Impossible(String),
}

/// An interface of the pod's and the VM's end of it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) mac: String,
    pub(crate) tap: OwnedFd,
}

/// What the guest is to be told.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) routes: Vec<Route>,
    /// Routes that a [`Route`] does not tell, and rules.
    pub(crate) exact: ExactRoutes,
    pub(crate) neighbors: Vec<ArpNeighbor>,
}

/// Whether frames may come to an interface. Modules of tunnels make some in each namespace that lead
/// nowhere (`gretap0`, `erspan0`): no program turns them on, or gives them an address.
fn is_in_use(found: &Found, addresses: &[Assigned]) -> bool {
    let has_address = addresses
        .iter()
        .any(|address| address.interface == found.index);
    let is_up = found.flags & link::UP != 0;
    found.hardware.iter().any(|byte| *byte != 0) && (is_up || has_address)
}

/// Moves this thread, and what it starts, into a network namespace: that one, or a new one.
pub(crate) fn enter(path: Option<&Path>) -> Result<(), Error> {
    let Some(path) = path else {
        // SAFETY: it changes nothing but which network this thread sees.
        let made = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        return made.map_err(|errno| Error::Make(errno.into()));
    };
    let namespace = namespace(path)?;
    let kind = Some(LinkNameSpaceType::Network);
    let entered = rustix::thread::move_into_link_name_space(namespace.as_fd(), kind);
    entered.map_err(cannot_enter(path))
}

fn namespace(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(cannot_enter(path))
}

fn cannot_enter(path: &Path) -> impl Fn(Errno) -> Error {
    move |errno| Error::Enter {
        path: path.into(),
        source: errno.into(),
    }
}

/// Does something in a network namespace, on a thread of its own.
pub(crate) fn within<T: Send>(
    path: &Path,
    act: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("network".into());
        let act = || enter(Some(path)).and_then(|()| act());
        let thread = thread.spawn_scoped(scope, act).map_err(Error::Thread)?;
        thread.join().expect("a panic ends the process")
    })
}

/// How many interfaces of a network namespace [`connect`] would connect.
pub(crate) fn count(path: &Path) -> Result<usize, Error> {
    within(path, || Ok(interfaces(&mut open()?)?.len()))
}

/// Connects each interface of this thread's network namespace to a tap of its own.
pub(crate) fn connect() -> Result<(Vec<Link>, Settings), Error> {
    let mut netlink = open()?;
    let found = interfaces(&mut netlink)?;
    let settings = settings(&mut netlink, &found)?;
    let mut links = Vec::new();
    for (number, link) in found.iter().enumerate() {
        let name = format!("{TAP}{number}");
        let tap = tap::make(&name).map_err(|source| Error::Tap {
            name: name.clone(),
            source,
        })?;
        join(&mut netlink, link, &name)?;
        links.push(Link {
            mac: address::hardware_text(&link.hardware),
            tap,
        });
    }
    Ok((links, settings))
}

/// A tap for an interface that is not there yet: `ctr run --cni` makes it between a container's
/// creation and its start.
pub(crate) fn prepare() -> Result<Link, Error> {
    let name = format!("{TAP}0");
    let tap = tap::make(&name).map_err(|source| Error::Tap { name, source })?;
    let mac = api::MacAddr::random().to_string();
    Ok(Link { mac, tap })
}

/// Connects the one interface of the network namespace `pods` to the tap of [`prepare`], which moves
/// there from `vms`.
pub(crate) fn connect_waiting(vms: &Path, pods: &Path) -> Result<Settings, Error> {
    let count = count(pods)?;
    if count != 1 {
        return Err(Error::Count(count));
    }
    let name = format!("{TAP}0");
    let to = namespace(pods)?;
    within(vms, || {
        let mut netlink = open()?;
        let mut leave = || {
            let tap = index_of(&mut netlink, &name)?;
            let change = Change {
                namespace: Some(to.as_fd()),
                ..Change::default()
            };
            change.apply(&mut netlink, tap)
        };
        leave().map_err(failed(&format!("move {name}")))
    })?;
    within(pods, || {
        let mut netlink = open()?;
        let found = interfaces(&mut netlink)?;
        let settings = settings(&mut netlink, &found)?;
        for link in &found {
            join(&mut netlink, link, &name)?;
        }
        Ok(settings)
    })
}

/// Connects the interface that has come to the tap of [`prepare`], whose address is `mac`.
pub(crate) fn connect_late(mac: &str) -> Result<Option<Settings>, Error> {
    let mut netlink = open()?;
    let mut found = interfaces(&mut netlink)?;
    found.truncate(1);
    let Some(link) = found.first() else {
        return Ok(None);
    };
    let mut settings = settings(&mut netlink, &found)?;
    join(&mut netlink, link, &format!("{TAP}0"))?;
    for interface in &mut settings.interfaces {
        interface.hw_addr = mac.into();
    }
    Ok(Some(settings))
}

/// Undoes [`connect`] in a namespace that stays. Taps go with their VM.
pub(crate) fn disconnect() -> Result<(), Error> {
    let mut netlink = open()?;
    // Also those that are out of use by now.
    for link in links(&mut netlink)? {
        redirect::remove(&mut netlink, link.index).map_err(failed(&link.name))?;
    }
    Ok(())
}

/// The pod's interfaces in this thread's network namespace.
fn interfaces(netlink: &mut Netlink) -> Result<Vec<Found>, Error> {
    let addresses = addresses(netlink)?;
    let mut found = links(netlink)?;
    found.retain(|link| is_in_use(link, &addresses));
    Ok(found)
}

/// The interfaces of this thread's network namespace that carry Ethernet frames and are not a VM's end of
/// one.
fn links(netlink: &mut Netlink) -> Result<Vec<Found>, Error> {
    let mut found = link::list(netlink).map_err(failed("list the interfaces"))?;
    found.retain(|link| {
        link.frames == link::ETHERNET
            && link.flags & link::LOOPBACK == 0
            && !link.name.starts_with(TAP)
    });
    Ok(found)
}

/// The number of the interface `name`.
fn index_of(netlink: &mut Netlink, name: &str) -> io::Result<u32> {
    let links = link::list(netlink)?;
    let link = links.iter().find(|link| link.name == name);
    link.map(|link| link.index)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")))
}

/// The addresses of interfaces, without those of one link alone, which each kernel makes by itself.
fn addresses(netlink: &mut Netlink) -> Result<Vec<Assigned>, Error> {
    let mut addresses = address::list(netlink).map_err(failed("list the addresses"))?;
    addresses.retain(|address| matches!(address.scope, address::EVERYWHERE | address::SITE));
    Ok(addresses)
}

fn open() -> Result<Netlink, Error> {
    Netlink::open().map_err(failed("open a netlink socket"))
}

fn failed(what: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Netlink {
        what: what.into(),
        source,
    }
}

/// Has frames go both ways between an interface and the tap `name`.
fn join(netlink: &mut Netlink, link: &Found, name: &str) -> Result<(), Error> {
    let mut join = || {
        let tap = index_of(netlink, name)?;
        let up = Change {
            mtu: Some(link.mtu),
            flags: link::UP,
            mask: link::UP,
            ..Change::default()
        };
        up.apply(netlink, tap)?;
        redirect::add(netlink, link.index, tap)?;
        redirect::add(netlink, tap, link.index)
    };
    join().map_err(failed(&format!("connect {} to {name}", link.name)))
}

fn settings(netlink: &mut Netlink, found: &[Found]) -> Result<Settings, Error> {
    let addresses = addresses(netlink)?;
    let interface = |link: &Found| Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        addresses: addresses
            .iter()
            .filter(|address| address.interface == link.index)
            .map(|address| ip(address.prefix.address, &own_prefix(address).to_string()))
            .collect(),
        mtu: link.mtu.into(),
        hw_addr: address::hardware_text(&link.hardware),
        raw_flags: link.flags & link::NO_ARP,
        ..Interface::default()
    };
    let name = |index: u32| {
        let link = found.iter().find(|link| link.index == index);
        link.map(|link| link.name.clone())
    };
    let listed = route::list(netlink).map_err(failed("list the routes"))?;
    let mut routes = Vec::new();
    let mut exact = ExactRoutes {
        rules: rule::list(netlink).map_err(failed("list the rules"))?,
        ..ExactRoutes::default()
    };
    // Those the kernel makes by itself it makes in the guest too.
    let set = listed
        .into_iter()
        .filter(|route| !matches!(route.origin, KERNEL | REDIRECT));
    for listed in set {
        if listed.is_main && !listed.has_more {
            routes.push(by_name(&listed.route, name)?);
        } else {
            exact.routes.push(listed.payload);
        }
    }
    if !exact.routes.is_empty() {
        // Those that lead nowhere are, for IPv6, of the loopback interface.
        let loopback = NumberedInterface {
            index: LOOPBACK,
            name: "lo".into(),
        };
        let numbered = |link: &Found| NumberedInterface {
            index: link.index,
            name: link.name.clone(),
        };
        exact.interfaces = found.iter().map(numbered).chain([loopback]).collect();
    }
    let to_peers = addresses
        .iter()
        .filter_map(|address| to_peer(address, name(address.interface)?));
    routes.extend(to_peers);
    // Those that a user or a program set, not those that the kernel found.
    let is_set =
        |neighbour: &Neighbour| neighbour.state == PERMANENT && !neighbour.address.is_multicast();
    let neighbours = neighbour::list(netlink).map_err(failed("list the neighbours"))?;
    Ok(Settings {
        interfaces: found.iter().map(interface).collect(),
        routes,
        exact,
        neighbors: neighbours
            .into_iter()
            .filter(is_set)
            .filter_map(|neighbour| {
                Some(ArpNeighbor {
                    to_ip_address: Some(ip(neighbour.address, "")),
                    device: name(neighbour.interface)?,
                    lladdr: address::hardware_text(&neighbour.hardware),
                    state: neighbour.state.into(),
                    flags: 0,
                })
            })
            .collect(),
    })
}

/// The length of an address's prefix as the guest has it: of one of a pair of ends, all of it.
fn own_prefix(address: &Assigned) -> u8 {
    match address.peer {
        None => address.prefix.len,
        Some(_) => address.prefix.whole(),
    }
}

/// The route to the other end of a pair, which the kernel makes with the address. The agent's protocol has
/// no words for such a pair.
fn to_peer(address: &Assigned, device: String) -> Option<Route> {
    let peer = address.peer?;
    let prefix = address.prefix.len;
    let network: IpAddr = match peer {
        IpAddr::V4(peer) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Ipv4Addr::from(u32::from(peer) & mask).into()
        }
        IpAddr::V6(peer) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            Ipv6Addr::from(u128::from(peer) & mask).into()
        }
    };
    Some(Route {
        dest: format!("{network}/{prefix}"),
        device,
        source: address.prefix.address.to_string(),
        scope: LINK_SCOPE,
        family: family(peer).into(),
        ..Route::default()
    })
}

/// A route as the guest's agent is told of it.
fn by_name(found: &route::Route, name: impl Fn(u32) -> Option<String>) -> Result<Route, Error> {
    let Some(device) = found.interface.and_then(name) else {
        let what = match found.destination {
            None => "a default route".into(),
            Some(prefix) => format!("a route to {prefix}"),
        };
        let strange = "by an interface that is not the pod's";
        return Err(Error::Impossible(format!("{what} {strange}")));
    };
    Ok(Route {
        dest: text(found.destination),
        gateway: text(found.gateway),
        device,
        source: text(found.source.map(|prefix| prefix.address)),
        scope: found.scope.into(),
        family: i32::from(found.family == address::V6),
        flags: found.flags & (ON_LINK | PERVASIVE),
        mtu: found.mtu,
    })
}

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn ip(address: IpAddr, mask: &str) -> IpAddress {
    IpAddress {
        family: family(address).into(),
        address: address.to_string(),
        mask: mask.into(),
    }
}

fn family(address: IpAddr) -> IpFamily {
    match address {
        IpAddr::V4(_) => IpFamily::V4,
        IpAddr::V6(_) => IpFamily::V6,
    }
}

#[cfg(test)]
mod tests;
