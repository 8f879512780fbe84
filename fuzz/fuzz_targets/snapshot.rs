//! Any state.json, of which nothing is believed: one that is whole but says anything, and the state
//! of a device with something else in places.
#![no_main]

mod json;

use std::fs;

use api::Restore;
use arbitrary::Arbitrary;
use devices::virtio::balloon::{Balloon, BalloonConfig};
use devices::virtio::fs::{Cache, Fs, FsConfig};
use devices::virtio::mem::Mem;
use devices::virtio::rng::Rng;
use devices::virtio::testing::{Guest, Wiring};
use devices::virtio::vsock::{Vsock, VsockConfig};
use devices::virtio::{GuestRam, Limits, Memory, VirtioDevice};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use vm_memory::GuestAddress;
use vmm::Loaded;
use vmm_sys_util::tempdir::TempDir;

use json::Change;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    device: u8,
    /// Which values of the state are to be others.
    changes: Vec<(u16, Change)>,
    state: &'a str,
}

fuzz_target!(|input: Input<'_>| {
    let folder = TempDir::new().unwrap();
    open(&folder, input.state);
    let vsock = || {
        let socket = folder.as_path().join("vsock");
        Vsock::new(VsockConfig { cid: 3, socket }).unwrap()
    };
    let wiring = Wiring::ALL[usize::from(input.device / 5 % 2)];
    match input.device % 5 {
        0 => go_on(wiring, Rng::new, &input.changes),
        1 => go_on(wiring, vsock, &input.changes),
        2 => go_on(wiring, balloon, &input.changes),
        3 => go_on(wiring, mem, &input.changes),
        _ => go_on(wiring, || share(&folder), &input.changes),
    }
});

/// A state that is whole, whatever it says.
fn open(folder: &TempDir, state: &str) {
    let at = |name: &str| folder.as_path().join(name);
    fs::write(at("config.json"), r#"{"payload":{"kernel":"/k"}}"#).unwrap();
    let head = json!({
        "magic": "podvmm snapshot",
        "arch": "x86_64",
        "version": 1,
        "length": state.len(),
        "crc32": crc32fast::hash(state.as_bytes()),
    });
    let head = head.to_string();
    let head = head.trim_end_matches('}');
    fs::write(at("state.json"), format!("{head},\"state\":{state}}}")).unwrap();
    let _ = Loaded::open(Restore::new(folder.as_path().into()));
}

/// A guest whose device has been somewhere goes on with what a file says of that.
fn go_on<D: VirtioDevice + 'static>(
    wiring: Wiring,
    make: impl Fn() -> D,
    changes: &[(u16, Change)],
) {
    let mut guest = Guest::new_on(wiring, make());
    guest.start(u64::MAX, 16);
    let mut state = serde_json::to_value(guest.transport.state()).unwrap();
    drop(guest);
    json::change(&mut state, changes);
    let Ok(state) = serde_json::from_value(state) else {
        return;
    };
    let mut guest = Guest::new_on(wiring, make());
    if guest.transport.restore(state).is_ok() {
        guest.transport.resume().unwrap();
        guest.settle();
        for queue in 0..3 {
            guest.kick(queue);
        }
        guest.settle();
        guest.transport.pause().unwrap();
        let _ = guest.transport.state();
    }
}

fn balloon() -> Balloon {
    Balloon::new(BalloonConfig {
        size: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    })
    .unwrap()
}

fn mem() -> Mem {
    let start = GuestAddress(1 << 32);
    let len = 32 << 20;
    let memory = Memory::new(GuestRam::from_ranges(&[(start, len)]).unwrap());
    Mem::new(memory, start, len as u64).unwrap()
}

fn share(folder: &TempDir) -> Fs {
    let fs = Fs::new(FsConfig {
        tag: "share".into(),
        folder: folder.as_path().into(),
        readonly: false,
        cache: Cache::Auto,
        writeback: false,
        queues: 1,
        queue_size: 16,
        descriptors: 32,
        rates: Limits::default(),
        name: "fs".into(),
    });
    fs.unwrap()
}
