//! Any guest at a share, and any FUSE requests: they stay inside, and descriptors are bounded.
#![no_main]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use arbitrary::{Arbitrary, Result, Unstructured};
use devices::virtio::fs::{Cache, Fs, FsConfig};
use devices::virtio::testing::{Buffer, Guest, Step, survive};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

const DESCRIPTORS: usize = 32;

#[derive(Debug, Arbitrary)]
enum Input {
    Steps(Vec<Step>),
    Requests(Vec<Request>),
}

/// A FUSE request whose length may be a lie.
#[derive(Debug)]
struct Request {
    bytes: Vec<u8>,
    room: u32,
}

impl<'a> Arbitrary<'a> for Request {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut body = Vec::new();
        while u.ratio(4, 5)? && body.len() < 400 {
            let names: [&[u8]; 8] = [
                b"f\0",
                b"d\0",
                b"l\0",
                b"new\0",
                b"..\0",
                b"../secret\0",
                b"user.x\0",
                b"/\0",
            ];
            match u.int_in_range(0..=3)? {
                0 => body.extend_from_slice(u.choose(&names)?),
                1 => body.extend_from_slice(&u.int_in_range(0..=9u64)?.to_le_bytes()),
                2 => body.extend_from_slice(&u.int_in_range(0..=0x1ff_u32)?.to_le_bytes()),
                _ => body.push(u.arbitrary()?),
            }
        }
        let honest = u32::try_from(40 + body.len()).expect("short");
        let len = if u.ratio(15, 16)? {
            honest
        } else {
            u.arbitrary()?
        };
        let nodeid = if u.ratio(15, 16)? {
            u.int_in_range(0..=9)?
        } else {
            u.arbitrary()?
        };
        let mut bytes = Vec::with_capacity(40 + body.len());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&u.int_in_range(0..=55u32)?.to_le_bytes());
        bytes.extend_from_slice(&1u64.to_le_bytes());
        bytes.extend_from_slice(&u64::to_le_bytes(nodeid));
        bytes.resize(40, 0);
        bytes.extend_from_slice(&body);
        let room = if u.ratio(7, 8)? {
            4096
        } else {
            u.int_in_range(0..=200)?
        };
        Ok(Self { bytes, room })
    }
}

fn share(folder: &Path) -> Fs {
    let config = FsConfig {
        tag: "share".into(),
        folder: folder.into(),
        readonly: false,
        cache: Cache::Auto,
        writeback: false,
        queues: 1,
        queue_size: 128,
        descriptors: DESCRIPTORS,
        name: "fs0".into(),
    };
    Fs::new(config).unwrap()
}

fuzz_target!(|input: Input| {
    let outside = TempDir::new().unwrap();
    let folder = outside.as_path().join("share");
    let secret = outside.as_path().join("secret");
    fs::create_dir_all(folder.join("d")).unwrap();
    fs::write(folder.join("f"), b"x").unwrap();
    fs::write(&secret, b"secret").unwrap();
    symlink("../secret", folder.join("l")).unwrap();
    match input {
        Input::Steps(steps) => survive(share(&folder), steps),
        Input::Requests(requests) => {
            let mut guest = Guest::live(share(&folder));
            for Request { bytes, room } in requests {
                let buffers = [Buffer::Out(bytes), Buffer::In(room)];
                guest
                    .request(1, &buffers)
                    .expect("every request comes back");
            }
            let open = fs::read_dir("/proc/self/fd").unwrap();
            let inside = open
                .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
                .filter(|target| target.starts_with(&folder));
            assert!(inside.count() <= DESCRIPTORS + 1);
        }
    }
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(outside.as_path()).unwrap().count(), 2);
});
