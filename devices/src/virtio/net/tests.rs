use std::fs::File;
use std::io::Read;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use virtio_bindings::virtio_net::*;

use super::tap::HEADER_LEN;
use super::{Net, NetConfig, NetError, Offloads, Tap, TapError};
use crate::virtio::testing::{Buffer, Guest, lifecycle};
use crate::virtio::{Limits, Rate, VirtioDevice};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A device of `pairs` pairs and the far ends of its taps.
fn device(pairs: usize, offloads: Offloads) -> (Net, Vec<UnixDatagram>) {
    let (taps, hosts): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| {
            let (tap, host) = UnixDatagram::pair().unwrap();
            tap.set_nonblocking(true).unwrap();
            host.set_nonblocking(true).unwrap();
            (Tap::pretend(OwnedFd::from(tap)), host)
        })
        .unzip();
    let net = Net::new(NetConfig {
        taps,
        mac: MAC,
        mtu: Some(1400),
        queue_size: 256,
        offloads,
        rates: Limits::default(),
    });
    (net.unwrap(), hosts)
}

fn plain() -> Offloads {
    Offloads {
        csum: false,
        tso: false,
        uso: false,
    }
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.resize(HEADER_LEN + len, fill);
    frame
}

#[test]
fn the_driver_reads_the_mac_the_link_and_the_mtu() {
    let (net, _hosts) = device(2, plain());
    let mut guest = Guest::new(net);
    let config = guest.config::<12>(0);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 2, 0, 0x78, 5]);
}

#[test]
fn a_frame_goes_out_in_one_piece_however_it_lies() {
    let (net, hosts) = device(1, plain());
    let mut guest = Guest::live(net);
    let bytes = frame(300, 7);
    let parts = [
        Buffer::Out(bytes[..5].to_vec()),
        Buffer::Out(bytes[5..100].to_vec()),
        Buffer::Out(bytes[100..].to_vec()),
    ];
    assert_eq!(guest.request(TX, &parts), Some(vec![]));
    let mut received = [0; 1000];
    let count = hosts[0].recv(&mut received).unwrap();
    assert_eq!(received[..count], bytes);
    assert_eq!(guest.counters().bytes_out.get(), 312);
}

#[test]
fn a_frame_that_is_none_or_in_too_many_pieces_is_lost_and_counted() {
    let (net, hosts) = device(1, plain());
    let mut guest = Guest::live(net);
    for buffers in [
        vec![Buffer::Out(vec![0; HEADER_LEN])],
        vec![Buffer::In(100)],
        vec![Buffer::Out(vec![0; 100]); 8],
    ] {
        assert_eq!(guest.request(TX, &buffers), Some(vec![]));
    }
    guest
        .add_by(
            crate::virtio::testing::Table::Indirect,
            TX,
            &vec![Buffer::Out(vec![0; 20]); 70],
        )
        .unwrap();
    guest.kick(TX);
    guest.settle();
    assert_eq!(guest.counters().errors.get(), 3);
    let mut received = [0; 1000];
    assert_eq!(hosts[0].recv(&mut received).unwrap(), 800);
    assert!(hosts[0].recv(&mut received).is_err());
}

#[test]
fn a_frame_comes_in_with_the_number_of_its_buffers() {
    let (net, hosts) = device(1, plain());
    let mut guest = Guest::live(net);
    // The largest frame of this MTU needs three of these.
    for _ in 0..6 {
        guest.add(RX, &[Buffer::In(600)]).unwrap();
    }
    guest.kick(RX);
    guest.settle();
    hosts[0].send(&frame(1000, 9)).unwrap();
    guest.settle();
    let first = guest.take(RX).unwrap();
    let second = guest.take(RX).unwrap();
    assert_eq!((first.len(), second.len()), (600, 412));
    assert_eq!(first[10..12], [2, 0]);
    assert!(
        first[HEADER_LEN..]
            .iter()
            .chain(&second)
            .all(|byte| *byte == 9)
    );
    assert_eq!(guest.take(RX), None);
    hosts[0].send(&frame(10, 3)).unwrap();
    guest.settle();
    let third = guest.take(RX).unwrap();
    assert_eq!((third.len(), third[10]), (22, 1));
}

#[test]
fn frames_wait_for_buffers_without_waking_the_loop() {
    let (net, hosts) = device(1, plain());
    let mut guest = Guest::live(net);
    hosts[0].send(&frame(100, 1)).unwrap();
    hosts[0].send(&frame(100, 2)).unwrap();
    guest.settle();
    assert!(guest.counters().queue_full.get() > 0);
    for fill in [1, 2] {
        guest.add(RX, &[Buffer::In(2000)]).unwrap();
        guest.kick(RX);
        guest.settle();
        assert_eq!(guest.take(RX).unwrap()[HEADER_LEN..], [fill; 100]);
    }
}

#[test]
fn buffers_in_hand_survive_a_move_to_another_device() {
    let (net, _hosts) = device(1, plain());
    let mut guest = Guest::live(net);
    guest.add(RX, &[Buffer::In(600)]).unwrap();
    guest.kick(RX);
    guest.settle();
    let (net, hosts) = device(1, plain());
    let mut guest = guest.move_to(|| net);
    guest.transport.resume().unwrap();
    for _ in 0..2 {
        guest.add(RX, &[Buffer::In(600)]).unwrap();
    }
    guest.kick(RX);
    guest.settle();
    hosts[0].send(&frame(700, 5)).unwrap();
    guest.settle();
    assert_eq!(guest.take(RX).unwrap().len(), 600);
    assert_eq!(guest.take(RX).unwrap().len(), 112);
}

#[test]
fn work_is_left_to_the_other_side_only_as_configured() {
    let bit = |feature: u32| 1_u64 << feature;
    let (net, _hosts) = device(1, plain());
    let all = bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_HOST_TSO4);
    assert_eq!(net.features() & all, 0);
    let segments_alone = Offloads {
        csum: false,
        ..Offloads::default()
    };
    assert_eq!(device(1, segments_alone).0.features() & all, 0);
    assert_eq!(device(1, Offloads::default()).0.features() & all, all);
    assert_eq!(device(1, plain()).0.features() & bit(VIRTIO_NET_F_MQ), 0);
    assert_ne!(device(2, plain()).0.features() & bit(VIRTIO_NET_F_MQ), 0);
}

#[test]
fn no_work_is_left_to_a_driver_before_it_accepts_it() {
    let run = |arguments: &str| {
        let status = Command::new("ip").args(arguments.split(' ')).status();
        assert!(status.unwrap().success(), "ip {arguments}");
    };
    std::thread::spawn(move || {
        own_network();
        let taps = Tap::open("early0", 1).unwrap();
        let mut tap = File::from(OwnedFd::from(taps[0].try_clone().unwrap()));
        let net = Net::new(NetConfig {
            taps,
            mac: MAC,
            mtu: None,
            queue_size: 16,
            offloads: Offloads::default(),
            rates: Limits::default(),
        });
        let _net = net.unwrap();
        run("address add 192.0.2.1/24 dev early0");
        run("link set early0 up");
        run("neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev early0");
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.send_to(b"early", "192.0.2.2:9").unwrap();
        let mut frame = [0; 2000];
        // Linux sends frames of IPv6 by itself.
        let len = loop {
            let len = tap.read(&mut frame).unwrap();
            if frame[HEADER_LEN + 12..HEADER_LEN + 14] == [8, 0] {
                break len;
            }
        };
        assert!(frame[..len].ends_with(b"early"));
        assert_eq!(frame[0], 0, "its checksum was left to the guest");
    })
    .join()
    .unwrap();
}

#[test]
fn each_pair_has_its_queue_and_the_driver_says_how_many_it_uses() {
    let (net, hosts) = device(2, plain());
    let mut guest = Guest::live(net);
    assert_eq!(guest.request(3, &[Buffer::Out(frame(50, 2))]), Some(vec![]));
    assert_eq!(hosts[1].recv(&mut [0; 100]).unwrap(), 62);
    let mut command = |bytes: &[u8]| {
        let answer = guest.request(4, &[Buffer::Out(bytes.to_vec()), Buffer::In(1)]);
        answer.unwrap()
    };
    assert_eq!(command(&[4, 0, 2, 0]), [0]);
    for bad in [&[4, 0, 3, 0][..], &[4, 0, 0, 0], &[1, 0, 1, 0], &[4, 0]] {
        assert_eq!(command(bad), [1], "{bad:?}");
    }
}

#[test]
fn a_restored_device_has_as_many_pairs_in_use() {
    std::thread::spawn(|| {
        own_network();
        let make = || {
            let taps = Tap::open("pairs0", 2).unwrap();
            let last = taps[1].try_clone().unwrap();
            let net = Net::new(NetConfig {
                taps,
                mac: MAC,
                mtu: None,
                queue_size: 16,
                offloads: plain(),
                rates: Limits::default(),
            });
            (net.unwrap(), last)
        };
        let (net, last) = make();
        let mut guest = Guest::live(net);
        assert!(!last.is_attached());
        let command = [Buffer::Out(vec![4, 0, 2, 0]), Buffer::In(1)];
        assert_eq!(guest.request(4, &command), Some(vec![0]));
        assert!(last.is_attached());
        let state = guest.transport.state().device;
        let (net, last) = make();
        let mut guest = guest.move_to(|| net);
        guest.transport.resume().unwrap();
        assert!(last.is_attached());

        let error = device(1, plain()).0.restore(state).unwrap_err();
        let why = "its guest uses more queue pairs than there are";
        assert_eq!(error.to_string(), why);
    })
    .join()
    .unwrap();
}

#[test]
fn frames_beyond_the_limit_wait_in_both_directions_and_none_is_lost() {
    let (tap, host) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let rate = Rate {
        size: 2,
        one_time_burst: 0,
        refill_time: Duration::from_millis(400),
    };
    let net = Net::new(NetConfig {
        taps: vec![Tap::pretend(tap.into())],
        mac: MAC,
        mtu: None,
        queue_size: 16,
        offloads: plain(),
        rates: Limits {
            bandwidth: None,
            operations: Some(rate),
        },
    });
    let mut guest = Guest::live(net.unwrap());
    for _ in 0..4 {
        guest.add(TX, &[Buffer::Out(frame(20, 1))]).unwrap();
        guest.add(RX, &[Buffer::In(2000)]).unwrap();
        host.send(&frame(30, 1)).unwrap();
    }
    guest.kick(TX);
    guest.kick(RX);
    guest.settle();
    let moved = |guest: &Guest| (4 - guest.in_flight(TX), 4 - guest.in_flight(RX));
    let taken = |guest: &mut Guest| {
        while guest.take(TX).is_some() || guest.take(RX).is_some() {}
        moved(guest)
    };
    assert_eq!(taken(&mut guest), (2, 2));
    while taken(&mut guest) != (4, 4) {
        std::thread::sleep(Duration::from_millis(5));
        guest.settle();
    }
}

#[test]
fn a_reset_gives_no_new_tokens() {
    let (tap, host) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let rate = Rate {
        size: 3,
        one_time_burst: 0,
        refill_time: Duration::from_secs(1000),
    };
    let net = Net::new(NetConfig {
        taps: vec![Tap::pretend(tap.into())],
        mac: MAC,
        mtu: None,
        queue_size: 16,
        offloads: plain(),
        rates: Limits {
            bandwidth: None,
            operations: Some(rate),
        },
    });
    let mut guest = Guest::live(net.unwrap());
    for _ in 0..2 {
        for _ in 0..2 {
            guest.add(TX, &[Buffer::Out(frame(20, 1))]).unwrap();
        }
        guest.kick(TX);
        guest.settle();
        guest.start(u64::MAX, 16);
    }
    let sent = std::iter::from_fn(|| host.recv(&mut [0; 100]).ok());
    assert_eq!(sent.count(), 3);
}

#[test]
fn the_device_lives_through_pause_and_reset() {
    let (tap, host) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let net = || {
        Net::new(NetConfig {
            taps: vec![Tap::pretend(tap.try_clone().unwrap().into())],
            mac: MAC,
            mtu: None,
            queue_size: 16,
            offloads: plain(),
            rates: Limits::default(),
        })
        .unwrap()
    };
    lifecycle(net, |guest| {
        assert_eq!(
            guest.request(TX, &[Buffer::Out(frame(20, 1))]),
            Some(vec![])
        );
        assert_eq!(host.recv(&mut [0; 100]).unwrap(), 32);
        // What an earlier turn left in hand goes first.
        guest.add(RX, &[Buffer::In(2000)]).unwrap();
        guest.kick(RX);
        guest.settle();
        host.send(&frame(30, 1)).unwrap();
        guest.settle();
        assert_eq!(guest.take(RX).unwrap().len(), 42);
    });
}

#[test]
fn what_cannot_be_a_tap_is_refused() {
    for name in ["", "a/b", "sixteen-letters-", "tap%d", ".."] {
        let error = Tap::open(name, 1).unwrap_err();
        assert!(matches!(error, TapError::Name(_)), "{error}");
    }
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = Tap::inherit(file.into()).unwrap_err();
    assert!(error.to_string().ends_with("is not a tap"), "{error}");
    let none = Net::new(NetConfig {
        taps: Vec::new(),
        mac: MAC,
        mtu: None,
        queue_size: 256,
        offloads: plain(),
        rates: Limits::default(),
    });
    assert!(matches!(none, Err(NetError::Pairs(0))));
}

/// A network namespace of this thread's own.
fn own_network() {
    // SAFETY: it changes nothing but which network this thread sees.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        result, 0,
        "these tests make network namespaces: run as root"
    );
}

#[test]
fn a_tap_is_made_shared_by_its_queues_and_gone_with_them() {
    let seen = |name: &str| {
        let links = std::fs::read_to_string("/proc/thread-self/net/dev");
        links.unwrap().contains(name)
    };
    std::thread::spawn(move || {
        own_network();
        let taps = Tap::open("podtap0", 2).unwrap();
        assert_eq!(taps[1].name().unwrap(), "podtap0");
        assert!(seen("podtap0"));
        let again = Tap::open("podtap0", 1).unwrap_err();
        assert!(again.to_string().contains("podtap0"), "{again}");
        let inherited = Tap::inherit(taps[0].try_clone().unwrap().into()).unwrap();
        inherited.set_offloads(0x7).unwrap();
        taps[1].set_attached(false).unwrap();
        taps[1].set_attached(false).unwrap();
        taps[1].set_attached(true).unwrap();
        drop((taps, inherited));
        assert!(!seen("podtap0"));
    })
    .join()
    .unwrap();
}
