use proptest::prelude::*;

use super::*;
use protocol::netlink::Message;

fn links() -> Vec<Link> {
    vec![Link {
        index: 7,
        name: "eth0".into(),
        ..Link::default()
    }]
}

fn route(dest: &str, gateway: &str, family: IpFamily) -> Route {
    Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        family: family.into(),
        ..Route::default()
    }
}

#[test]
fn a_route_without_destination_is_the_default_one() {
    let parsed = parse_route(&route("", "10.0.0.1", IpFamily::V4), &links()).unwrap();
    assert_eq!(parsed.destination, None);
    assert_eq!(parsed.gateway, "10.0.0.1".parse().ok());
    assert_eq!(parsed.interface, Some(7));
    let parsed = parse_route(&route("fd00::/8", "", IpFamily::V6), &links()).unwrap();
    assert_eq!(parsed.family, address::V6);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |route| parse_route(&route, &links()).unwrap_err().to_string();
    assert_eq!(
        refused(route("fd00::/8", "", IpFamily::V4)),
        "\"fd00::/8\" is no address"
    );
    let mut lost = route("", "", IpFamily::V4);
    lost.device = "eth9".into();
    assert_eq!(refused(lost.clone()), "Link not found (Name: eth9)");
    let status = Status::from(parse_route(&lost, &links()).unwrap_err());
    assert_eq!(status.code, Code::NotFound);
    lost.device = "eth0".into();
    lost.scope = 256;
    assert_eq!(refused(lost), "scope 256 is out of range");
    let neighbour = ArpNeighbor::default();
    let error = parse_neighbour(&neighbour, &links()).unwrap_err();
    assert_eq!(error.to_string(), "toIPAddress is missing");
}

#[test]
fn names_are_those_the_kernel_takes() {
    for good in ["eth0", "a", "fifteen-letters", "x.1"] {
        assert!(is_name(good), "{good}");
    }
    for bad in [
        "",
        ".",
        "..",
        "a b",
        "a/b",
        "a:1",
        "sixteen-letters!",
        "a\0",
    ] {
        assert!(!is_name(bad), "{bad}");
    }
}

/// Tests an interface in a network of its own, where the user may have one.
#[test]
fn an_interface_becomes_what_the_host_says() {
    let done = std::thread::spawn(|| {
        // SAFETY: it changes nothing but which network this thread sees.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("SKIPPED: networks of their own need root");
            return;
        }
        become_what_the_host_says();
    });
    done.join().unwrap();
}

fn become_what_the_host_says() {
    let netlink = &mut open().unwrap();
    // Two ends of a veth: RTM_NEWLINK with a kind.
    let kind = Message::new(0, &[]).with(1, b"veth");
    let veth = Message::new(16, &[0; 16])
        .with(3, b"first\0")
        .with_nested(18, &kind);
    if netlink.change(veth, CREATE).is_err() {
        eprintln!("SKIPPED: there is no veth");
        return;
    }
    let all = super::links(netlink).unwrap();
    let link = all.iter().find(|link| link.name == "first").unwrap();
    let other = all.iter().find(|link| link.name == "veth0").unwrap();
    // As the other end, so that there is a carrier.
    let up = Change {
        flags: UP,
        mask: UP,
        ..Change::default()
    };
    up.apply(netlink, other.index).unwrap();
    let ip = |address: &str, mask: &str| IpAddress {
        address: address.into(),
        mask: mask.into(),
        ..IpAddress::default()
    };
    let mut wanted = Interface {
        device: "eth0".into(),
        name: "veth0".into(),
        addresses: vec![ip("10.9.0.2", "24"), ip("fd09::2", "64")],
        mtu: 1400,
        hw_addr: address::hardware_text(&link.hardware).to_uppercase(),
        ..Interface::default()
    };
    for _ in 0..2 {
        assert_eq!(update_interface(wanted.clone()).unwrap(), wanted);
    }
    let listed = list_interfaces().unwrap();
    let now = listed.iter().find(|it| it.name == "veth0").unwrap();
    assert_eq!((now.mtu, now.raw_flags & UP), (1400, UP));
    assert_eq!(now.hw_addr, wanted.hw_addr.to_lowercase());
    let has = |address: &str| now.addresses.iter().any(|it| it.address == address);
    assert!(has("10.9.0.2") && (has("fd09::2") || !has_v6()), "{now:?}");
    assert!(listed.iter().any(|it| it.name == "first"), "{listed:?}");

    let mut far = route("10.8.0.0/16", "10.9.0.1", IpFamily::V4);
    let mut default = route("", "10.9.0.1", IpFamily::V4);
    let mut near = route("10.7.0.0/16", "", IpFamily::V4);
    near.scope = 253;
    default.source = "10.9.0.2".into();
    far.mtu = 1300;
    let mut six = route("", "fd09::1", IpFamily::V6);
    six.source = "fd09::2".into();
    let mut elsewhere = route("10.6.0.0/16", "10.5.0.1", IpFamily::V4);
    elsewhere.flags = 4;
    let mut routes = vec![default, far, near, six, elsewhere];
    for route in &mut routes {
        route.device = "veth0".into();
    }
    for _ in 0..2 {
        update_routes(&routes, &ExactRoutes::default()).unwrap();
    }
    let listed = list_routes().unwrap();
    for route in &routes[..3] {
        let same = |it: &&Route| it.dest == route.dest && it.gateway == route.gateway;
        let found = listed.iter().find(same).unwrap();
        assert_eq!((found.mtu, &found.device), (route.mtu, &route.device));
    }
    let neighbour = ArpNeighbor {
        to_ip_address: Some(ip("10.9.0.1", "")),
        device: "veth0".into(),
        lladdr: "02:00:00:00:00:01".into(),
        ..ArpNeighbor::default()
    };
    for _ in 0..2 {
        add_neighbours(std::slice::from_ref(&neighbour)).unwrap();
    }

    wanted.addresses = vec![ip("10.9.0.3", "24")];
    update_interface(wanted.clone()).unwrap();
    let listed = list_interfaces().unwrap();
    let now = listed.iter().find(|it| it.name == "veth0").unwrap();
    let has = |address: &str| now.addresses.iter().any(|it| it.address == address);
    assert!(has("10.9.0.3") && !has("10.9.0.2"), "{now:?}");

    let hardware = [2, 0xff, 0xff, 0xff, 0xff, 0xff];
    wanted.hw_addr = address::hardware_text(&hardware);
    // Neither end is the VMM's, so none takes it.
    let status = Status::from(update_interface(wanted.clone()).unwrap_err());
    assert_eq!(status.code, Code::NotFound);
    assert!(status.message.contains("Link not found"), "{status}");
    let change = Change {
        hardware: Some(&hardware),
        ..Change::default()
    };
    change.apply(netlink, other.index).unwrap();
    let listed = list_interfaces().unwrap();
    assert!(listed.iter().any(|it| it.hw_addr == wanted.hw_addr));
}

proptest! {
    #[test]
    fn whatever_the_host_wants_is_tried_or_refused(
        dest in "[0-9a-f:./]{0,20}", gateway in "[0-9.]{0,12}", source in "[0-9./]{0,12}",
        scope: u32, family in -1..3_i32, lladdr in "[0-9a-f:]{0,20}", state: i32, flags: i32,
    ) {
        let device = "eth0".to_owned();
        let route = Route { dest, gateway, source, scope, family, device, ..Route::default() };
        let _ = parse_route(&route, &links());
        let neighbour = ArpNeighbor {
            to_ip_address: Some(IpAddress { address: route.dest, ..IpAddress::default() }),
            device: route.device,
            lladdr,
            state,
            flags,
        };
        let _ = parse_neighbour(&neighbour, &links());
    }
}
