//! Any guest at a network device of two pairs, with frames waiting.
#![no_main]

use std::os::unix::net::UnixDatagram;

use devices::virtio::Limits;
use devices::virtio::net::{Net, NetConfig, Offloads, Tap};
use devices::virtio::testing::{Step, survive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| {
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
});
