//! Any guest at virtio-mem, which never has more than was wanted.
#![no_main]

use devices::virtio::mem::Mem;
use devices::virtio::testing::{Step, survive};
use devices::virtio::{GuestRam, Memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

const LEN: usize = 32 << 20;
const WANTED: u64 = 8 << 20;

fuzz_target!(|steps: Vec<Step>| {
    let start = GuestAddress(1 << 32);
    let memory = Memory::new(GuestRam::from_ranges(&[(start, LEN)]).unwrap());
    let mem = Mem::new(memory, start, LEN as u64).unwrap();
    let handle = mem.handle();
    handle.request(WANTED).unwrap();
    survive(mem, &[0], steps);
    assert!(handle.sizes().plugged <= WANTED);
});
