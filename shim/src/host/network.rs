//! The pod's network: a network namespace that containerd or its client prepared (for the CRI, by
//! CNI), in which each interface is connected to a tap of the VM's. All frames that arrive at one
//! leave by the other (tc's `redirect`), so that the guest takes the interface's place: its MAC and
//! its addresses.

mod netlink;
mod tap;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use protocol::agent::messages::{ExactRoutes, NumberedInterface};
use protocol::agent::types::{ArpNeighbor, Interface, IpAddress, IpFamily, Route};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use netlink::{Address, FoundRoute, Netlink};

/// What the VM's end of an interface is called, and its number.
const TAP: &str = "podvmm";

/// The number of the loopback interface in each network namespace.
const LOOPBACK: u32 = 1;

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

/// An interface as it was found.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    index: u32,
    name: String,
    mac: Vec<u8>,
    mtu: u32,
    no_arp: bool,
    is_up: bool,
}

impl Found {
    /// Whether frames may come to it. Modules of tunnels make interfaces in each namespace that lead
    /// nowhere (`gretap0`, `erspan0`): no program turns them on, or gives them an address.
    fn is_in_use(&self, addresses: &[Address]) -> bool {
        let has_address = addresses.iter().any(|address| address.index == self.index);
        self.mac.iter().any(|byte| *byte != 0) && (self.is_up || has_address)
    }
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
            mac: mac(&link.mac),
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
            let tap = netlink.index_of(&name)?;
            netlink.move_to(tap, to.as_fd())
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
        netlink
            .remove_ingress(link.index)
            .map_err(failed(&link.name))?;
    }
    Ok(())
}

/// The pod's interfaces in this thread's network namespace.
fn interfaces(netlink: &mut Netlink) -> Result<Vec<Found>, Error> {
    let addresses = addresses(netlink)?;
    let mut found = links(netlink)?;
    found.retain(|link| link.is_in_use(&addresses));
    Ok(found)
}

/// The interfaces of this thread's network namespace that are not a VM's end of one.
fn links(netlink: &mut Netlink) -> Result<Vec<Found>, Error> {
    let mut found = netlink.links().map_err(failed("list the interfaces"))?;
    found.retain(|link| !link.name.starts_with(TAP));
    Ok(found)
}

fn addresses(netlink: &mut Netlink) -> Result<Vec<Address>, Error> {
    netlink.addresses().map_err(failed("list the addresses"))
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
        let tap = netlink.index_of(name)?;
        netlink.set_up(tap, link.mtu)?;
        netlink.redirect(link.index, tap)?;
        netlink.redirect(tap, link.index)
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
            .filter(|address| address.index == link.index)
            .map(|address| ip(address.address, &own_prefix(address).to_string()))
            .collect(),
        mtu: link.mtu.into(),
        hw_addr: mac(&link.mac),
        raw_flags: if link.no_arp {
            libc::IFF_NOARP.cast_unsigned()
        } else {
            0
        },
        ..Interface::default()
    };
    let name = |index: u32| {
        let link = found.iter().find(|link| link.index == index);
        link.map(|link| link.name.clone())
    };
    let listed = netlink.routes().map_err(failed("list the routes"))?;
    let mut routes = Vec::new();
    let mut exact = ExactRoutes {
        rules: netlink.rules().map_err(failed("list the rules"))?,
        ..ExactRoutes::default()
    };
    for route in listed {
        match route.exact {
            Some(payload) => exact.routes.push(payload),
            None => routes.push(by_name(route, name)?),
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
        .filter_map(|address| to_peer(address, name(address.index)?));
    routes.extend(to_peers);
    let neighbors = netlink.neighbors().map_err(failed("list the neighbours"))?;
    Ok(Settings {
        interfaces: found.iter().map(interface).collect(),
        routes,
        exact,
        neighbors: neighbors
            .into_iter()
            .filter_map(|neighbor| {
                Some(ArpNeighbor {
                    to_ip_address: Some(ip(neighbor.address, "")),
                    device: name(neighbor.index)?,
                    lladdr: mac(&neighbor.lladdr),
                    state: neighbor.state.into(),
                    flags: 0,
                })
            })
            .collect(),
    })
}

/// The length of an address's prefix as the guest has it: of one of a pair of ends, all of it.
fn own_prefix(address: &Address) -> u8 {
    match (address.peer, address.address) {
        (None, _) => address.prefix,
        (Some(_), IpAddr::V4(_)) => 32,
        (Some(_), IpAddr::V6(_)) => 128,
    }
}

/// The route to the other end of a pair, which the kernel makes with the address. The agent's protocol has
/// no words for such a pair.
fn to_peer(address: &Address, device: String) -> Option<Route> {
    let peer = address.peer?;
    let prefix = address.prefix;
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
        source: address.address.to_string(),
        scope: LINK_SCOPE,
        family: family(peer).into(),
        ..Route::default()
    })
}

/// A route as the guest's agent is told of it.
fn by_name(found: FoundRoute, name: impl Fn(u32) -> Option<String>) -> Result<Route, Error> {
    let FoundRoute {
        index, mut route, ..
    } = found;
    let Some(name) = index.and_then(name) else {
        let what = match route.dest.as_str() {
            "" => "a default route".into(),
            dest => format!("a route to {dest}"),
        };
        let strange = "by an interface that is not the pod's";
        return Err(Error::Impossible(format!("{what} {strange}")));
    };
    route.device = name;
    Ok(route)
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

fn mac(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

#[cfg(test)]
mod tests;
