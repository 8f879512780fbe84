//! Guests that write anything anywhere: every device must survive them without a panic, come back from
//! each turn soon, and serve a driver afterwards that notifies it only when it asks for that.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use super::balloon::{Balloon, BalloonConfig};
use super::blk::{Blk, BlkConfig};
use super::console::{Console, Port};
use super::mem::Mem;
use super::net::{Net, NetConfig, Offloads, Tap};
use super::rng::Rng;
use super::testing::{
    Access, Guest, NUMBERS, QUEUES, RAM_LEN, Step, Wiring, survive, survive_on, survive_on_bus,
};
use super::vsock::{Vsock, VsockConfig};
use super::{GuestRam, Limits, Memory};
use crate::host::{Input, Output};

/// Addresses that are mostly somewhere, and now and then nowhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..RAM_LEN,
        // The first queues' areas and the edge between the two regions.
        4 => 0x1_0000..0x4_0000u64,
        2 => RAM_LEN / 2 - 16..RAM_LEN / 2 + 16,
        1 => RAM_LEN - 16..RAM_LEN + 16,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..64u32, 2 => Just(16), 2 => Just(512), 2 => 0..0x1_0000u32, 1 => any::<u32>()]
}

/// Where a buffer lies that is named often.
fn often() -> impl Strategy<Value = u64> {
    prop_oneof![Just(NUMBERS), address()]
}

fn long() -> impl Strategy<Value = u32> {
    prop_oneof![3 => (10..24u32).prop_map(|order| 1 << order), 1 => length()]
}

/// Few bytes, mostly as they occur in headers.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        prop::collection::vec(prop_oneof![4 => 0..16u8, 1 => any::<u8>()], 0..40),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    let describe = (0..QUEUES, 0..18u16, address(), length(), 0..8u32, 0..18u16);
    prop_oneof![
        2 => (0..0x200u64, 0..9usize).prop_map(|(offset, width)| Step::Read { offset, width }),
        2 => (0..0x200u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::Write { offset, data }),
        2 => (0..0x50u32, any::<u32>())
            .prop_map(|(index, value)| Step::Register { register: index * 4, value }),
        1 => (0..0x50u32, 0..256u32)
            .prop_map(|(index, value)| Step::Register { register: index * 4, value }),
        3 => (address(), bytes()).prop_map(|(start, bytes)| Step::Ram { start, bytes }),
        12 => describe.prop_map(|(queue, index, start, len, flags, next)| {
            Step::Describe { queue, index, start, len, flags, next }
        }),
        4 => (0..4u32, often(), long(), 0..550u16, 0..550u16).prop_map(
            |(queue, start, len, readable, writable)| {
                Step::Repeat { queue, start, len, readable, writable }
            }
        ),
        8 => (queue.clone(), 0..18u16).prop_map(|(queue, head)| Step::Publish { queue, head }),
        1 => (queue.clone(), any::<u16>()).prop_map(|(queue, value)| Step::Index { queue, value }),
        8 => queue.clone().prop_map(|queue| Step::Kick { queue }),
        3 => (any::<u64>(), 0..7u32)
            .prop_map(|(features, order)| Step::Start { features: features | 1 << 32, size: 1 << order }),
        2 => (queue, 0..3u32, any::<u32>(), 0..40u32)
            .prop_map(|(queue, area, start, size)| Step::Relocate { queue, area, start, size }),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => Just(Step::Drain),
    ]
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..60)
}

fn access() -> impl Strategy<Value = Access> {
    let data = || prop::collection::vec(any::<u8>(), 1..9);
    let device = 0..4_u32;
    let target = (0..2_u32, 0..0x8004_u32, 0..4_u32);
    let config = (device.clone(), 0..64_usize, 0..4_u64, data());
    let offset = (0..8_u64, 0..0x80_u64).prop_map(|(page, offset)| page << 12 | offset);
    prop_oneof![
        1 => (0..9_u64, data()).prop_map(|(offset, data)| Access::Port { offset, data }),
        2 => config.prop_map(|(device, register, first, data)| {
            Access::Config { device, register, first, data }
        }),
        1 => (device.clone(), 0..48_u32, 0..8_u32)
            .prop_map(|(device, at, command)| Access::Place { device, at, command }),
        2 => (device, target, any::<u32>()).prop_map(|(device, (bar, offset, order), value)| {
            Access::Reach { device, target: [bar, offset, 1 << order], value }
        }),
        3 => (0..2_usize, offset, data())
            .prop_map(|(function, offset, data)| Access::Memory { function, offset, data }),
        1 => (0..2_usize).prop_map(|function| Access::Request { function }),
    ]
}

fn disk(image: &TempFile, readonly: bool) -> Blk {
    Blk::open(BlkConfig {
        path: PathBuf::from(image.as_path()),
        readonly,
        direct: false,
        queues: 2,
        queue_size: 16,
        serial: "x".into(),
        rates: Limits::default(),
        name: "blk0".into(),
    })
    .unwrap()
}

fn console() -> Console {
    let (stdin, mut host) = io::pipe().unwrap();
    host.write_all(&[b'x'; 4096]).unwrap();
    let port = |input: Option<OwnedFd>| Port {
        name: "port".into(),
        console: input.is_some(),
        input: input.map(|fd| Input::new(fd).unwrap()),
        output: Some(Output::sink(Box::new(io::sink()))),
    };
    let console = Console::new(vec![port(Some(stdin.into())), port(None)]).unwrap();
    console.handle().resize(80, 25);
    console
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn the_entropy_device_survives_any_guest(steps in steps()) {
        survive(Rng::new(), &[0], steps);
    }

    #[test]
    fn the_entropy_device_survives_any_guest_over_pci(steps in steps()) {
        survive_on(Wiring::Pci, Rng::new(), &[0], steps);
    }

    #[test]
    fn a_pci_bus_survives_any_guest(accesses in prop::collection::vec(access(), 1..80)) {
        let config = BalloonConfig { size: 0, deflate_on_oom: true, free_page_reporting: true };
        let balloon = Guest::new_on(Wiring::Pci, Balloon::new(config).unwrap());
        survive_on_bus([Guest::new_on(Wiring::Pci, Rng::new()), balloon], accesses);
    }

    #[test]
    fn a_disk_survives_any_guest_and_keeps_its_size(
        steps in steps(),
        readonly in any::<bool>(),
        wiring in prop::sample::select(&Wiring::ALL[..]),
    ) {
        let image = TempFile::new().unwrap();
        image.as_file().set_len(1 << 16).unwrap();
        survive_on(wiring, disk(&image, readonly), &[0, 1], steps);
        prop_assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 16);
    }

    #[test]
    fn a_network_device_survives_any_guest(steps in steps()) {
        let (taps, hosts): (Vec<_>, Vec<_>) = (0..2)
            .map(|_| {
                let (tap, host) = UnixDatagram::pair().unwrap();
                tap.set_nonblocking(true).unwrap();
                (Tap::pretend(tap.into()), host)
            })
            .unzip();
        hosts[0].send(&[7; 200]).unwrap();
        hosts[1].send(&[7; 3]).unwrap();
        let net = Net::new(NetConfig {
            taps,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            queue_size: 16,
            offloads: Offloads::default(),
            rates: Limits::default(),
        });
        survive(net.unwrap(), &[1, 3, 4], steps);
    }

    #[test]
    fn vsock_survives_any_guest(steps in steps()) {
        let folder = TempDir::new().unwrap();
        let socket = folder.as_path().join("vsock");
        let vsock = Vsock::new(VsockConfig { cid: 3, socket: socket.clone() }).unwrap();
        let mut callers: Vec<_> = (0..3).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        for caller in &mut callers {
            caller.write_all(b"CONNECT 1\nand more").unwrap();
        }
        survive(vsock, &[1], steps);
    }

    #[test]
    fn the_memory_device_survives_any_guest(steps in steps()) {
        let (start, len) = (GuestAddress(1 << 32), 32 << 20);
        let memory = Memory::new(GuestRam::from_ranges(&[(start, len)]).unwrap());
        let mem = Mem::new(memory, start, len as u64).unwrap();
        mem.handle().request(8 << 20).unwrap();
        let handle = mem.handle();
        survive(mem, &[0], steps);
        prop_assert!(handle.sizes().plugged <= 8 << 20);
    }

    #[test]
    fn the_balloon_survives_any_guest(steps in steps(), free_page_reporting in any::<bool>()) {
        let config = BalloonConfig { size: 1 << 20, deflate_on_oom: true, free_page_reporting };
        let balloon = Balloon::new(config).unwrap();
        balloon.handle().statistics();
        survive(balloon, &[0, 1], steps);
    }

    #[test]
    fn the_console_survives_any_guest(steps in steps()) {
        survive(console(), &[1, 3, 5], steps);
    }
}
