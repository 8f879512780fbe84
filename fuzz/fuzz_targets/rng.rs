//! Any guest at the entropy device.
#![no_main]

use devices::virtio::rng::Rng;
use devices::virtio::testing::{Step, survive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| survive(Rng::new(), &[0], steps));
