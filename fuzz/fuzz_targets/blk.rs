//! Any guest at a disk, which keeps its size.
#![no_main]

use std::path::PathBuf;

use devices::virtio::Limits;
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::testing::{Step, survive};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempfile::TempFile;

const LEN: u64 = 1 << 16;

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (readonly, steps) = input;
    let image = TempFile::new().unwrap();
    image.as_file().set_len(LEN).unwrap();
    let disk = Blk::open(BlkConfig {
        path: PathBuf::from(image.as_path()),
        readonly,
        direct: false,
        queues: 2,
        queue_size: 16,
        serial: "x".into(),
        rates: Limits::default(),
        name: "blk0".into(),
    })
    .unwrap();
    survive(disk, &[0, 1], steps);
    assert_eq!(image.as_file().metadata().unwrap().len(), LEN);
});
