//! The pod's network: a network namespace that somebody prepared (CNI, for the CRI), in which each
//! interface is connected to a tap of the VM's. All frames that arrive at one leave by the other
//! (tc's `redirect`), so that the guest takes the interface's place: its MAC and its addresses.

mod netlink;
mod tap;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use agent::protocol::agent::{ExactRoutes, NumberedInterface};
use agent::protocol::types::{ArpNeighbor, Interface, IpAddress, IpFamily, Route};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use netlink::{Address, FoundRoute, Netlink};

/// What the VM's end of an interface is called, and its number.
const TAP: &str = "podvmm";

/// The loopback interface of each network namespace.
const LOOPBACK: u32 = 1;

/// To what is on the link itself (linux/rtnetlink.h, RT_SCOPE_LINK).
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
    /// nowhere (`gretap0`, `erspan0`): nobody turns them on, or gives them an address.
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
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    fn run(line: &str) -> String {
        let mut words = line.split(' ');
        let output = Command::new(words.next().unwrap()).args(words).output();
        let output = output.expect("iproute2 is installed");
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Panics unless taps go with their VM. Another test's child may hold one until it has become its
    /// program.
    fn taps_go() {
        let deadline = Instant::now() + Duration::from_secs(10);
        while run("ip link").contains("podvmm0") {
            assert!(Instant::now() < deadline, "taps go with their VM");
        }
    }

    /// Runs `test` in a network namespace of its own, with an interface that has no other end.
    fn in_a_pods_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            enter(None).expect("this test needs root");
            run("ip link add eth0 mtu 1400 address 02:00:00:00:00:07 type bridge");
            run("ip link set eth0 up");
            test();
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_pods_interface_is_told_and_taken_over_and_given_back() {
        in_a_pods_namespace(|| {
            for line in [
                "ip address add 10.9.8.7/24 dev eth0",
                "ip -6 address add fd00::7/64 dev eth0 nodad",
                "ip route add default via 10.9.8.1 dev eth0",
                "ip neigh add 10.9.8.1 lladdr 02:00:00:00:00:01 dev eth0",
            ] {
                run(line);
            }
            let (links, settings) = connect().unwrap();
            assert_eq!(links[0].mac, "02:00:00:00:00:07");
            let interface = &settings.interfaces[0];
            assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1400));
            let addresses: Vec<_> = interface.addresses.iter().collect();
            let addresses = addresses
                .iter()
                .map(|ip| format!("{}/{}", ip.address, ip.mask));
            let mut addresses: Vec<_> = addresses.collect();
            addresses.sort();
            assert_eq!(addresses, ["10.9.8.7/24", "fd00::7/64"]);
            let default = settings.routes.iter().find(|route| route.dest.is_empty());
            assert_eq!(default.unwrap().gateway, "10.9.8.1");
            assert_eq!(settings.neighbors[0].lladdr, "02:00:00:00:00:01");
            for (from, to) in [("eth0", "podvmm0"), ("podvmm0", "eth0")] {
                let filters = run(&format!("tc filter show dev {from} ingress"));
                let redirected = format!("Egress Redirect to device {to}");
                assert!(filters.contains(&redirected), "{filters}");
            }
            disconnect().unwrap();
            assert!(!run("tc qdisc show dev eth0").contains("ingress"));
            drop(links);
            taps_go();
            disconnect().unwrap();
            run("ip link del eth0");
        });
    }

    /// The network namespace of this thread, for others.
    fn own() -> PathBuf {
        let (process, thread) = (std::process::id(), rustix::thread::gettid());
        format!("/proc/{process}/task/{thread}/ns/net").into()
    }

    #[test]
    fn a_vm_that_waited_joins_the_pods_network() {
        in_a_pods_namespace(|| {
            run("ip address add 10.9.8.7/24 dev eth0");
            let pods = own();
            let (tell, told) = std::sync::mpsc::channel();
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let vm = std::thread::spawn(move || {
                enter(None).unwrap();
                let link = prepare().unwrap();
                tell.send(own()).unwrap();
                let _ = ended.recv();
                drop(link);
            });
            let vms = told.recv().unwrap();
            run("ip link add eth1 type bridge");
            assert_eq!(count(&pods).unwrap(), 1, "it is not in use");
            run("ip link set eth1 up");
            assert_eq!(count(&pods).unwrap(), 2);
            let refused = connect_waiting(&vms, &pods).unwrap_err();
            assert!(refused.to_string().contains("2 interfaces"), "{refused}");
            run("ip link del eth1");
            let settings = connect_waiting(&vms, &pods).unwrap();
            assert_eq!(settings.interfaces[0].hw_addr, "02:00:00:00:00:07");
            assert_eq!(settings.interfaces[0].addresses[0].address, "10.9.8.7");
            assert_eq!(count(&pods).unwrap(), 1, "its end of it is the VM's");
            let filters = run("tc filter show dev podvmm0 ingress");
            assert!(filters.contains("Redirect to device eth0"), "{filters}");
            drop(end);
            vm.join().unwrap();
            taps_go();
        });
    }

    #[test]
    fn an_interface_that_comes_late_gets_the_address_the_guest_has() {
        in_a_pods_namespace(|| {
            let spare = prepare().unwrap();
            run("ip link del eth0");
            assert!(connect_late(&spare.mac).unwrap().is_none());
            run("ip link add eth0 type bridge");
            run("ip address add 10.9.8.7/24 dev eth0");
            let settings = connect_late(&spare.mac).unwrap().unwrap();
            assert_eq!(settings.interfaces[0].hw_addr, spare.mac);
            assert_eq!(settings.interfaces[0].addresses[0].address, "10.9.8.7");
        });
    }
    /// As modules of tunnels make in each namespace, where these have none.
    #[test]
    fn interfaces_that_lead_nowhere_are_not_the_pods() {
        in_a_pods_namespace(|| {
            run("ip address add 10.9.8.7/24 dev eth0");
            run("ip link add gretap0 type bridge");
            run("ip link add erspan0 type bridge");
            assert_eq!(count(&own()).unwrap(), 1);
            let (links, settings) = connect().unwrap();
            assert_eq!((links.len(), settings.interfaces.len()), (1, 1));
            disconnect().unwrap();
        });
    }

    #[test]
    fn the_other_end_of_an_address_is_reached_by_a_route() {
        in_a_pods_namespace(|| {
            run("ip address add 10.9.8.7 peer 10.1.2.3/24 dev eth0");
            run("ip -6 address add fd00::7 peer fd01::1/128 dev eth0 nodad");
            let settings = connect().unwrap().1;
            disconnect().unwrap();
            let addresses = settings.interfaces[0].addresses.iter();
            let addresses = addresses.map(|ip| format!("{}/{}", ip.address, ip.mask));
            let mut addresses: Vec<_> = addresses.collect();
            addresses.sort();
            assert_eq!(addresses, ["10.9.8.7/32", "fd00::7/128"]);
            let routes = settings.routes.iter();
            let routes = routes.map(|route| (&*route.dest, &*route.source, route.scope));
            let mut routes: Vec<_> = routes.collect();
            routes.sort_unstable();
            let expected = [
                ("10.1.2.0/24", "10.9.8.7", 253),
                ("fd01::1/128", "fd00::7", 253),
            ];
            assert_eq!(routes, expected);
        });
    }

    #[test]
    fn routes_that_the_protocol_cannot_tell_are_passed_on_as_they_are() {
        in_a_pods_namespace(|| {
            for line in [
                "ip address add 10.9.8.7/24 dev eth0",
                "ip -6 address add fd00::7/64 dev eth0 nodad",
                "ip route add default via 10.9.8.1",
                "ip -6 route add default via fd00::1",
                "ip route add 10.7.0.0/16 dev eth0 scope link src 10.9.8.7 mtu 1300",
            ] {
                run(line);
            }
            let settings = connect().unwrap().1;
            let linked = settings.routes.iter().find(|route| route.mtu == 1300);
            let linked = linked.unwrap();
            assert_eq!((linked.scope, &*linked.source), (253, "10.9.8.7"));
            assert_eq!(settings.routes.len(), 3, "{:?}", settings.routes);
            assert_eq!(settings.exact, ExactRoutes::default());
            disconnect().unwrap();
            taps_go();
            let routes = [
                "default via 10.9.8.2 metric 200",
                "10.1.0.0/16 nexthop via 10.9.8.2 nexthop via 10.9.8.3",
                "blackhole 10.2.0.0/16",
                "10.3.0.0/16 via 10.9.8.2 table 100",
                "fd01::/64 via fd00::2 table 1000",
                "10.4.0.0/16 via 10.9.8.2 tos 0x10",
                "10.5.0.0/16 via inet6 fd00::2 dev eth0",
                "10.6.0.0/16 via 10.9.8.2 advmss 1000",
                "unreachable fd02::/64",
            ];
            let rules = [
                "from 10.9.8.7 table 100",
                "not fwmark 0x10/0xf0 iif eth0 table 1000",
            ];
            let mut families = routes.map(|route| (route.contains("fd0"), route));
            families[6].0 = false;
            for (is_v6, route) in families {
                let family = if is_v6 { "-6" } else { "-4" };
                run(&format!("ip {family} route add {route}"));
            }
            for rule in rules {
                run(&format!("ip rule add {rule}"));
            }
            run("ip -6 rule add from fd00::7 table 100 pref 50");
            let settings = connect().unwrap().1;
            assert_eq!(settings.routes.len(), 3, "{:?}", settings.routes);
            let exact = settings.exact;
            assert_eq!((exact.routes.len(), exact.rules.len()), (9, 3));
            let names = exact.interfaces.iter().map(|it| it.name.as_str());
            assert_eq!(names.collect::<Vec<_>>(), ["eth0", "lo"]);
            // What was typed here and made bytes again is what the kernel said.
            let raw = raw(26).into_iter().chain(raw(34)).collect::<Vec<_>>();
            for payload in exact.routes.iter().chain(&exact.rules) {
                assert!(raw.contains(payload), "{payload:?}");
            }
            disconnect().unwrap();
            taps_go();
        });
    }

    /// The payloads of all messages of this kind that the kernel lists, of both families.
    fn raw(kind: u16) -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut socket =
                netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE).unwrap();
            socket.bind_auto().unwrap();
            let mut request = [0; 28];
            request[0] = 28;
            request[4..6].copy_from_slice(&kind.to_ne_bytes());
            request[6..8].copy_from_slice(&0x301_u16.to_ne_bytes());
            request[16] = u8::try_from(family).unwrap();
            socket.send(&request, 0).unwrap();
            'answers: loop {
                let (datagram, _) = socket.recv_from_full().unwrap();
                let mut rest = &datagram[..];
                while let Some(len) = rest.first_chunk().map(|len| u32::from_ne_bytes(*len)) {
                    let len = usize::try_from(len).unwrap();
                    if rest[4] == 3 {
                        break 'answers;
                    }
                    payloads.push(rest[16..len].to_vec());
                    rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
                }
            }
        }
        payloads
    }
}
