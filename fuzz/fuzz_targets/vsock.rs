//! Any guest at vsock, with callers on the host.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use devices::virtio::testing::{Step, survive};
use devices::virtio::vsock::{Vsock, VsockConfig};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

fuzz_target!(|steps: Vec<Step>| {
    let folder = TempDir::new().unwrap();
    let socket = folder.as_path().join("vsock");
    let vsock = Vsock::new(VsockConfig {
        cid: 3,
        socket: socket.clone(),
    })
    .unwrap();
    let mut callers: Vec<_> = (0..3)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    for caller in &mut callers {
        caller.write_all(b"CONNECT 1\nand more").unwrap();
    }
    survive(vsock, steps);
});
