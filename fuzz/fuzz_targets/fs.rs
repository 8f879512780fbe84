//! Any guest at a share, and any FUSE requests: they stay inside, descriptors are bounded, and nothing
//! is open but files and folders.
#![no_main]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use arbitrary::{Arbitrary, Result, Unstructured};
use devices::virtio::Limits;
use devices::virtio::fs::{Cache, Fs, FsConfig};
use devices::virtio::testing::{Buffer, Guest, Step, survive};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

/// Few, so that files without names soon have no room.
const DESCRIPTORS: usize = 8;

#[derive(Debug, Arbitrary)]
enum Input {
    Steps(Vec<Step>),
    Requests(Vec<Request>),
    Acts(Vec<Act>),
}

/// A request that makes sense, about a few names in the share's root and the first nodes there were.
#[derive(Debug, Arbitrary)]
enum Act {
    Create { name: u8 },
    Make { name: u8, kind: u8 },
    Look { name: u8 },
    Remove { name: u8 },
    Move { names: [u8; 2] },
    Link { node: u8, name: u8 },
    Forget { node: u8 },
    Open { node: u8 },
    Close { handle: u8 },
}

impl Act {
    fn request(&self) -> Request {
        let word = |number: u32| number.to_le_bytes().to_vec();
        let long = |number: u8| u64::from(number).to_le_bytes().to_vec();
        let name = |name: &u8| vec![b'a' + name % 3, 0];
        let node = |node: &u8| u64::from(2 + node % 16);
        // O_RDWR, and as well O_CREAT.
        let (read_write, create) = (word(2), word(0o102));
        let (opcode, nodeid, body) = match self {
            Self::Create { name: n } => {
                (35, 1, [create, word(0o100644), word(0), word(0), name(n)])
            }
            Self::Make { name: n, kind } => {
                // S_IFIFO, S_IFCHR, S_IFREG and S_IFSOCK.
                let kind = [0o1, 0o2, 0o10, 0o14][usize::from(kind % 4)] << 12;
                (
                    8,
                    1,
                    [word(kind | 0o666), word(0), word(0), word(0), name(n)],
                )
            }
            Self::Look { name: n } => (1, 1, [name(n), vec![], vec![], vec![], vec![]]),
            Self::Remove { name: n } => (10, 1, [name(n), vec![], vec![], vec![], vec![]]),
            Self::Move { names: [old, new] } => {
                (12, 1, [long(1), name(old), name(new), vec![], vec![]])
            }
            Self::Link { node: n, name: m } => {
                let old = node(n).to_le_bytes().to_vec();
                (13, 1, [old, name(m), vec![], vec![], vec![]])
            }
            Self::Forget { node: n } => (2, node(n), [long(1), vec![], vec![], vec![], vec![]]),
            Self::Open { node: n } => (14, node(n), [read_write, word(0), vec![], vec![], vec![]]),
            Self::Close { handle } => (18, 1, [long(handle % 4), long(0), long(0), vec![], vec![]]),
        };
        let body = body.concat();
        let len = u32::try_from(40 + body.len()).expect("short");
        Request {
            bytes: request(len, opcode, nodeid, &body),
            room: 4096,
        }
    }
}

fn request(len: u32, opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40 + body.len());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&opcode.to_le_bytes());
    bytes.extend_from_slice(&1u64.to_le_bytes());
    bytes.extend_from_slice(&nodeid.to_le_bytes());
    bytes.resize(40, 0);
    bytes.extend_from_slice(body);
    bytes
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
        let bytes = request(len, u.int_in_range(0..=55)?, nodeid, &body);
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
        rates: Limits::default(),
        name: "fs0".into(),
    };
    Fs::new(config).unwrap()
}

fn serve(folder: &Path, requests: impl IntoIterator<Item = Request>) {
    let mut guest = Guest::live(share(folder));
    for Request { bytes, room } in requests {
        let buffers = [Buffer::Out(bytes), Buffer::In(room)];
        let answer = guest.request(1, &buffers);
        answer.expect("every request comes back");
        assert!(check_open(folder) <= DESCRIPTORS + 1);
    }
}

/// How many descriptors of this process are of files below `folder`, none of which is open but regular
/// files and folders.
fn check_open(folder: &Path) -> usize {
    const O_PATH: u64 = 0o10_000_000;
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let target = fs::read_link(entry.path());
        if !target.is_ok_and(|target| target.starts_with(folder)) {
            continue;
        }
        count += 1;
        let about = fs::read_to_string(Path::new("/proc/self/fdinfo").join(entry.file_name()));
        let about = about.expect("it is open");
        let flags = about.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u64::from_str_radix(flags.trim(), 8).ok());
        if flags.expect("its flags are told") & O_PATH == 0 {
            let kind = fs::metadata(entry.path()).unwrap().file_type();
            assert!(kind.is_file() || kind.is_dir(), "{kind:?} is open");
        }
    }
    count
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
        Input::Steps(steps) => survive(share(&folder), &[0, 1], steps),
        Input::Requests(requests) => serve(&folder, requests),
        Input::Acts(acts) => serve(&folder, acts.iter().map(Act::request)),
    }
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(outside.as_path()).unwrap().count(), 2);
});
