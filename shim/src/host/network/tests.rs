use super::*;
use protocol::netlink::Message;
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
        // What is passed on is what the kernel said.
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
    let netlink = &mut open().unwrap();
    let listed = [address::V4, address::V6].map(|family| {
        let mut fixed = [0; 12];
        fixed[0] = family;
        netlink.list(&Message::new(kind, &fixed)).unwrap()
    });
    listed.concat()
}
