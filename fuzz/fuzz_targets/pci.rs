//! Any guest at a PCI bus: at the bridge's ports, and at the configuration space and the BARs of two functions.
#![no_main]

use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::rng::Rng;
use devices::virtio::testing::{Access, Guest, Wiring, survive_on_bus};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|accesses: Vec<Access>| {
    let config = BalloonConfig {
        size: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let balloon = Guest::new_on(Wiring::Pci, Balloon::new(config).unwrap());
    survive_on_bus([Guest::new_on(Wiring::Pci, Rng::new()), balloon], accesses);
});
