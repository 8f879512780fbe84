//! Any guest at the balloon.
#![no_main]

use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::testing::{Step, survive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (free_page_reporting, steps) = input;
    let balloon = Balloon::new(BalloonConfig {
        size: 1 << 20,
        deflate_on_oom: true,
        free_page_reporting,
    })
    .unwrap();
    balloon.handle().statistics();
    survive(balloon, &[0, 1], steps);
});
