//! The kernel's interfaces, addresses, routes, neighbours and traffic control (rtnetlink(7)), of this
//! thread's network namespace.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use protocol::agent::types::Route;

use super::Found;

/// All frames, whatever they carry (linux/if_ether.h).
const ETH_P_ALL: u16 = 0x0003;
/// `struct tc_u32_sel` of linux/pkt_cls.h: what matches is final (TC_U32_TERMINAL), and the one key
/// looks at no bit.
const ANY_FRAME: [u8; 32] = {
    let mut selector = [0; 32];
    selector[0] = 1;
    selector[2] = 1;
    selector
};
const TCA_U32_SEL: u16 = 5;
/// The priority of the only filter there is.
const PRIORITY: u32 = 1;

/// Who is where on a link.
#[derive(Debug)]
pub(super) struct Neighbor {
    /// The number of the link.
    pub(super) index: u32,
    pub(super) address: IpAddr,
    pub(super) lladdr: Vec<u8>,
    /// The neighbor's state, by the kernel's number.
    pub(super) state: u16,
}

/// An address of a link.
#[derive(Debug)]
pub(super) struct Address {
    /// The number of the link.
    pub(super) index: u32,
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
    /// The other end, if it is one of a pair: the prefix is that one's.
    pub(super) peer: Option<IpAddr>,
}

/// A route that the kernel did not make by itself.
#[derive(Debug)]
pub(super) struct FoundRoute {
    /// The number of the link.
    pub(super) index: Option<u32>,
    pub(super) route: Route,
    /// All of it as the kernel lists it, if it has something that a [`Route`] cannot have.
    pub(super) exact: Option<Vec<u8>>,
}

/// A socket to ask by.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks, and returns all that is answered up to the acknowledgement or the end of the list.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                let message = message.map_err(io::Error::other)?;
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(answers),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }

    /// The interfaces that carry Ethernet frames.
    pub(super) fn links(&mut self) -> io::Result<Vec<Found>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.ask(request, NLM_F_DUMP)?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => found(&link),
            _ => None,
        });
        Ok(links.collect())
    }

    pub(super) fn index_of(&mut self, name: &str) -> io::Result<u32> {
        let links = self.links()?;
        let link = links.iter().find(|link| link.name == name);
        link.map(|link| link.index)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")))
    }

    /// The addresses of links, without those of one link alone, which each kernel makes by itself.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.ask(request, NLM_F_DUMP)?;
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => address(&message),
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// The routes of all tables. Those the kernel makes by itself it makes in the guest too.
    pub(super) fn routes(&mut self) -> io::Result<Vec<FoundRoute>> {
        let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        let answers = self.ask(request, NLM_F_DUMP)?;
        let routes = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(message) => route(&message),
            _ => None,
        });
        Ok(routes.collect())
    }

    /// The rules by which tables of routes are chosen, as the kernel lists them, without those that each
    /// kernel has.
    pub(super) fn rules(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RuleMessage::default();
            request.header.family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRule(request), NLM_F_DUMP)?;
            rules.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRule(message) => rule(&message),
                _ => None,
            }));
        }
        Ok(rules)
    }

    /// The neighbors that a user or a program set, not those that the kernel found.
    pub(super) fn neighbors(&mut self) -> io::Result<Vec<Neighbor>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let answers = self.ask(request, NLM_F_DUMP)?;
        let neighbors = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => neighbor(&message),
            _ => None,
        });
        Ok(neighbors.collect())
    }

    pub(super) fn set_up(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes.push(LinkAttribute::Mtu(mtu));
        self.ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK)?;
        Ok(())
    }

    /// Moves a link to another network namespace, where it is down and has the same name.
    pub(super) fn move_to(&mut self, index: u32, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes
            .push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
        self.ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK)?;
        Ok(())
    }

    /// Sends all frames that arrive at `from` out by `to`.
    pub(super) fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let create = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.ask(
            RouteNetlinkMessage::NewQueueDiscipline(ingress(from)),
            create,
        )?;
        self.ask(
            RouteNetlinkMessage::NewTrafficFilter(filter(from, to)),
            create,
        )?;
        Ok(())
    }

    /// Takes away what [`Self::redirect`] made of `from`, if it did.
    pub(super) fn remove_ingress(&mut self, from: u32) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelQueueDiscipline(ingress(from));
        match self.ask(request, NLM_F_ACK) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                Ok(())
            }
            answer => answer.map(drop),
        }
    }
}

fn found(link: &LinkMessage) -> Option<Found> {
    let is_loopback = link.header.flags.contains(LinkFlags::Loopback);
    if link.header.link_layer_type != LinkLayerType::Ether || is_loopback {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, 1500);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    Some(Found {
        index: link.header.index,
        name: name?,
        mac: mac?,
        mtu,
        no_arp: link.header.flags.contains(LinkFlags::Noarp),
        is_up: link.header.flags.contains(LinkFlags::Up),
    })
}

fn address(message: &AddressMessage) -> Option<Address> {
    if !matches!(
        message.header.scope,
        AddressScope::Universe | AddressScope::Site
    ) {
        return None;
    }
    // Of a pair of ends both are told, and the local one is the near one.
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    let address = local.or(other)?;
    Some(Address {
        index: message.header.index,
        address,
        prefix: message.header.prefix_len,
        peer: other.filter(|other| *other != address),
    })
}

fn route(message: &RouteMessage) -> Option<FoundRoute> {
    let header = &message.header;
    if header.protocol == RouteProtocol::Kernel || header.protocol == RouteProtocol::IcmpRedirect {
        return None;
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        family: i32::from(header.address_family == AddressFamily::Inet6),
        // Those that a person may set: linux/rtnetlink.h, RTNH_F_ONLINK and RTNH_F_PERVASIVE.
        flags: header.flags.bits() & 0x6,
        ..Route::default()
    };
    let mut index = None;
    let mut table = u32::from(header.table);
    let mut is_plain = header.kind == RouteType::Unicast && header.tos == 0;
    // IPv6 routes have 1024 if the user gave no metric (linux/ipv6_route.h, IP6_RT_PRIO_USER).
    let usual_metric = if route.family == 0 { 0 } else { 1024 };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Oif(value) => index = Some(*value),
            RouteAttribute::Destination(value) => {
                let prefix = header.destination_prefix_length;
                route.dest = format!("{}/{prefix}", ip(value)?);
            }
            RouteAttribute::Gateway(value) => route.gateway = ip(value)?.to_string(),
            RouteAttribute::PrefSource(value) => route.source = ip(value)?.to_string(),
            RouteAttribute::Priority(metric) => is_plain &= *metric == usual_metric,
            RouteAttribute::Source(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::EncapType(_) => is_plain = false,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = *mtu,
                        _ => is_plain = false,
                    }
                }
            }
            _ => {}
        }
    }
    is_plain &= table == u32::from(RouteHeader::RT_TABLE_MAIN);
    Some(FoundRoute {
        index,
        route,
        exact: (!is_plain).then(|| bytes(message)),
    })
}

/// A rule, unless the kernel made it: to the tables local, main and default, in this order.
fn rule(message: &RuleMessage) -> Option<Vec<u8>> {
    let header = &message.header;
    let (mut priority, mut table, mut is_plain) = (0, u32::from(header.table), true);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => is_plain = false,
        }
    }
    let is_kernels = matches!((priority, table), (0, 255) | (32766, 254) | (32767, 253))
        && (header.action, header.tos) == (RuleAction::ToTable, 0)
        && is_plain;
    (!is_kernels).then(|| bytes(message))
}

/// A message's payload as it was received.
fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbor(message: &NeighbourMessage) -> Option<Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut lladdr) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => {
                address = Some(IpAddr::from(*value));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                address = Some(IpAddr::from(*value));
            }
            NeighbourAttribute::LinkLayerAddress(value) => lladdr = Some(value.clone()),
            _ => {}
        }
    }
    let address = address.filter(|address| !address.is_multicast())?;
    Some(Neighbor {
        index: message.header.ifindex,
        address,
        lladdr: lladdr?,
        state: message.header.state.into(),
    })
}

fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::from(0xffff_fff1);
    message.header.handle = TcHandle::from(0xffff_0000);
    message.attributes.push(TcAttribute::Kind("ingress".into()));
    message
}

/// A filter that all frames match. (u32 is on more hosts than `matchall`.)
fn filter(from: u32, to: u32) -> TcMessage {
    let mut message = TcMessage::with_index(from.cast_signed());
    message.header.parent = TcHandle::from(0xffff_0000);
    message.header.info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    message.attributes = vec![
        TcAttribute::Kind("u32".into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Other(DefaultNla::new(
                TCA_U32_SEL,
                ANY_FRAME.to_vec(),
            ))),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}
