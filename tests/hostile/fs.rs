//! A share: requests of FUSE that are none, names that lead elsewhere, and files without end.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use tests::podvmm::kvm_is_here;

use crate::driver::{Buffer, Driver, LARGE, Subject, Verdict};
use crate::rig::{Rig, plain};
use crate::suite;

use Buffer::{In, InAt, Out, OutAt};

const HIGH_PRIORITY: u16 = 0;
const REQUESTS: u16 = 1;
const ROOT: u64 = 1;
const CONTENT: &[u8] = b"what is in the share";
const SECRET: &[u8] = b"what is beside it";

// Operations (Linux, include/uapi/linux/fuse.h).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;

#[derive(Debug)]
struct Share;

/// An answer: 0 or a negative errno, and what follows the header.
#[derive(Debug)]
struct Answer {
    error: i32,
    body: Vec<u8>,
}

impl Answer {
    fn u64(&self, at: usize) -> u64 {
        let bytes = self.body[at..at + 8].try_into().expect("it has 8 bytes");
        u64::from_le_bytes(bytes)
    }
}

/// The header of a request and its body.
fn request(op: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).expect("it is short");
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(op.to_le_bytes());
    bytes.extend(u64::from(op).to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// The body of READ, WRITE and READDIR.
fn transfer(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut bytes = longs(&[handle, offset]);
    bytes.extend(words(&[size, 0, 0, 0, 0, 0]));
    bytes
}

/// Asks, and checks what every answer has to be like.
fn ask(driver: &Driver<'_>, op: u32, node: u64, body: &[u8], what: &str) -> Answer {
    let bytes = driver.send(REQUESTS, &[Out(request(op, node, body)), In(4096)], what);
    let Verdict::Answered(written, bytes) = bytes else {
        panic!("fs: {what}: the device asks for a reset");
    };
    if matches!(op, FORGET | BATCH_FORGET | 36) {
        return Answer {
            error: 0,
            body: Vec::new(),
        };
    }
    let len = u32::from_le_bytes(bytes[..4].try_into().expect("it has 4 bytes"));
    assert_eq!(len, written, "fs: {what}");
    assert_eq!(
        bytes[8..16],
        u64::from(op).to_le_bytes(),
        "fs: {what}: another request's answer"
    );
    let error = i32::from_le_bytes(bytes[4..8].try_into().expect("it has 4 bytes"));
    assert!((-600..=0).contains(&error), "fs: {what}: error {error}");
    let body = bytes[16..len as usize].to_vec();
    assert!(error == 0 || body.is_empty(), "fs: {what}");
    Answer { error, body }
}

fn lookup(driver: &Driver<'_>, name: &str, what: &str) -> u64 {
    let answer = ask(
        driver,
        LOOKUP,
        ROOT,
        &[name.as_bytes(), b"\0"].concat(),
        what,
    );
    assert_eq!(answer.error, 0, "fs: {what}: {name}");
    answer.u64(0)
}

fn open(driver: &Driver<'_>, node: u64, flags: i32, what: &str) -> Answer {
    ask(driver, OPEN, node, &words(&[flags.unsigned_abs(), 0]), what)
}

impl Subject for Share {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn id(&self) -> u32 {
        26
    }

    fn queues(&self) -> u16 {
        2
    }

    fn begin(&self, driver: &Driver<'_>) {
        let answer = ask(driver, INIT, 0, &words(&[7, 38, 0x2_0000, 0]), "INIT");
        assert_eq!(answer.error, 0);
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let node = lookup(driver, "inside", after);
        let handle = open(driver, node, libc::O_RDONLY, after);
        assert_eq!(handle.error, 0, "fs: {after}");
        let handle = handle.u64(0);
        let read = ask(driver, READ, node, &transfer(handle, 0, 100), after);
        assert_eq!(read.body, CONTENT, "fs: {after}");
        ask(driver, RELEASE, node, &longs(&[handle, 0, 0]), after);
        ask(driver, FORGET, node, &longs(&[1]), after);
        let request = [Out(request(FORGET, 99, &longs(&[1])))];
        driver.send(HIGH_PRIORITY, &request, after).answer(after);
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        let name = request(LOOKUP, ROOT, b"inside\0");
        (REQUESTS, vec![Out(name), In(256)])
    }

    fn looked_at(&self) -> Vec<u16> {
        vec![HIGH_PRIORITY, REQUESTS]
    }
}

fn options(folder: &Path) -> Vec<String> {
    let share = folder.join("share");
    fs::create_dir_all(share.join("folder")).expect("there is room");
    fs::write(share.join("inside"), CONTENT).expect("there is room");
    fs::write(share.join("scratch"), CONTENT).expect("there is room");
    fs::write(folder.join("secret"), SECRET).expect("there is room");
    symlink("../secret", share.join("link")).expect("links are possible");
    symlink("..", share.join("up")).expect("links are possible");
    let options = format!("tag=share,shared_dir={}", plain(&share));
    vec!["--fs".into(), options]
}

#[test]
fn a_share() {
    suite::on_each(options, share_files);
}

fn share_files(rig: Rig) {
    let inside = rig.folder.path().join("share/inside");
    let secret = rig.folder.path().join("secret");
    let rig = rig.keeps(&inside).keeps(&secret);
    suite::run_in(rig, &Share, |driver| {
        operations(driver)
            + lengths(driver)
            + names(driver)
            + links(driver)
            + numbers(driver)
            + handles(driver)
    });
}

/// Each operation, and those that do not exist, of files that do not exist, with bodies that make no sense.
fn operations(driver: &Driver<'_>) -> usize {
    let bodies: [&[u8]; 5] = [&[], &[0; 8], &[0; 160], &[0xff; 160], b"x\0y\0z"];
    let mut count = 0;
    for op in (0..=56).chain([100, 4096, 0x8000_0000, u32::MAX]) {
        for node in [0, 7, 1 << 40, u64::MAX] {
            for (index, body) in bodies.into_iter().enumerate() {
                let what = format!("operation {op} of {node:#x} with body {index}");
                ask(driver, op, node, body, &what);
                count += 1;
            }
        }
        // The share itself, with what cannot be meant.
        ask(
            driver,
            op,
            ROOT,
            &[0xff; 20],
            &format!("operation {op} of the share"),
        );
        count += 1;
        driver.recover(&format!("operation {op}"));
        driver.start();
    }
    count
}

/// Headers that say another length than there is, and chains that lack something.
fn lengths(driver: &Driver<'_>) -> usize {
    let whole = request(LOOKUP, ROOT, b"inside\0");
    let mut cases: Vec<(String, Vec<Buffer>)> = Vec::new();
    for len in 0..40 {
        let part = whole[..len].to_vec();
        cases.push((format!("{len} bytes of a header"), vec![Out(part), In(256)]));
    }
    for len in [0, 1, 39, 40, 46, 48, 4096, 0x8000_0000, u32::MAX] {
        let mut bytes = whole.clone();
        bytes[..4].copy_from_slice(&u32::to_le_bytes(len));
        cases.push((
            format!("a header that says {len}"),
            vec![Out(bytes), In(256)],
        ));
    }
    for room in [0, 1, 15, 16, 17, 143, 144] {
        cases.push((
            format!("room of {room}"),
            vec![Out(whole.clone()), In(room)],
        ));
    }
    let more: [(&str, Vec<Buffer>); 6] = [
        ("no room", vec![Out(whole.clone())]),
        ("nothing but room", vec![In(4096)]),
        (
            "a request in eight parts",
            whole.chunks(7).map(|part| Out(part.to_vec())).collect(),
        ),
        (
            "32 MiB of room",
            vec![Out(whole.clone()), InAt(LARGE, 32 << 20)],
        ),
        (
            "32 MiB to read",
            vec![Out(whole.clone()), OutAt(LARGE, 30 << 20), In(256)],
        ),
        (
            "a MiB to read",
            vec![Out(whole), OutAt(LARGE, 1 << 20), In(256)],
        ),
    ];
    cases.extend(more.map(|(name, request)| (name.to_owned(), request)));
    let count = cases.len();
    for (name, request) in cases {
        driver.send(REQUESTS, &request, &name).answer(&name);
        driver.recover(&name);
    }
    count
}

/// Names that are none, for each operation that takes one.
fn names(driver: &Driver<'_>) -> usize {
    let long = [b'n'; 256];
    let longer = [b'n'; 3000];
    let names: [&[u8]; 12] = [
        b"",
        b".",
        b"..",
        b"/",
        b"../secret",
        b"folder/x",
        b"/etc/passwd",
        b"up/secret",
        b"folder/",
        b"./inside",
        &long,
        &longer,
    ];
    let fronts: [(u32, &[u8]); 8] = [
        (LOOKUP, &[]),
        (UNLINK, &[]),
        (SYMLINK, &[]),
        (MKNOD, &[0; 16]),
        (MKDIR, &[0; 8]),
        (LINK, &[0; 8]),
        (CREATE, &[0; 16]),
        (RENAME, &[1, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (op, front) in fronts {
        for name in names {
            let what = format!("operation {op} of {:?}", String::from_utf8_lossy(name));
            let ended = [name, b"\0target\0"].concat();
            // The first has no end, whatever it is.
            for name in [b"inside", name, &ended] {
                let answer = ask(driver, op, ROOT, &[front, name].concat(), &what);
                assert_ne!(answer.error, 0, "fs: {what}");
            }
        }
        driver.recover(&format!("names for operation {op}"));
    }
    fronts.len() * names.len() * 3
}

/// Links that lead out of the share are the guest's to follow, not the host's.
fn links(driver: &Driver<'_>) -> usize {
    let made = [&b"made\0"[..], b"../secret\0"].concat();
    assert_eq!(ask(driver, SYMLINK, ROOT, &made, "a link").error, 0);
    for name in ["link", "up", "made"] {
        let node = lookup(driver, name, "a link");
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_DIRECTORY,
        ] {
            let answer = open(driver, node, flags, name);
            assert_ne!(answer.error, 0, "fs: {name} was opened");
        }
        let below = ask(driver, LOOKUP, node, b"secret\0", name);
        assert_ne!(below.error, 0, "fs: something is below {name}");
        let dir = ask(driver, OPENDIR, node, &words(&[0, 0]), name);
        assert_ne!(dir.error, 0, "fs: {name} was opened");
        assert_eq!(ask(driver, READLINK, node, &[], name).error, 0);
        driver.recover(name);
    }
    24
}

/// Offsets, sizes and handles that are too large, of a file and a folder that are open.
fn numbers(driver: &Driver<'_>) -> usize {
    let node = lookup(driver, "scratch", "numbers");
    let handle = open(driver, node, libc::O_RDWR, "numbers").u64(0);
    let folder = ask(driver, OPENDIR, ROOT, &words(&[0, 0]), "numbers").u64(0);
    let mut cases: Vec<(u32, u64, Vec<u8>)> = Vec::new();
    for offset in [0, 1 << 40, i64::MAX.unsigned_abs(), 1 << 63, u64::MAX] {
        for size in [0, 1, 4096, 1 << 20, u32::MAX] {
            for handle in [handle, folder, 0, 99, u64::MAX] {
                for op in [READ, WRITE, READDIR, READDIRPLUS] {
                    cases.push((op, node, transfer(handle, offset, size)));
                }
            }
        }
    }
    for value in [1 << 62, 1 << 63, u64::MAX] {
        let size = [&words(&[8, 0])[..], &longs(&[0, value]), &[0; 64]].concat();
        cases.push((SETATTR, node, size));
        cases.push((
            FALLOCATE,
            node,
            [longs(&[handle, value, value]), words(&[0, 0])].concat(),
        ));
        cases.push((
            LSEEK,
            node,
            [longs(&[handle, value]), words(&[0, 0])].concat(),
        ));
        let copy = longs(&[handle, 0, node, handle, value, value, u64::MAX]);
        cases.push((COPY_FILE_RANGE, node, copy));
        cases.push((RELEASE, node, longs(&[value, 0, 0])));
        cases.push((FORGET, value, longs(&[value])));
        cases.push((FORGET, node, longs(&[value])));
    }
    for whence in [3, 4, 5, 99, u32::MAX] {
        cases.push((
            LSEEK,
            node,
            [longs(&[handle, 0]), words(&[whence, 0])].concat(),
        ));
    }
    for count in [0, 1, 1000, u32::MAX] {
        cases.push((
            BATCH_FORGET,
            0,
            [words(&[count, 0]), longs(&[1, 1, 7, 7])].concat(),
        ));
    }
    for size in [0, 1, 0x1_0000, 0x1_0001, u32::MAX] {
        let name = b"user.x\0value";
        cases.push((GETXATTR, node, [&words(&[size, 0])[..], name].concat()));
        cases.push((
            SETXATTR,
            node,
            [&words(&[size, u32::MAX])[..], name].concat(),
        ));
    }
    for (major, minor) in [
        (0, 0),
        (6, 0),
        (7, 0),
        (7, 30),
        (7, 99),
        (8, 0),
        (u32::MAX, u32::MAX),
    ] {
        cases.push((INIT, 0, words(&[major, minor, u32::MAX, u32::MAX])));
    }
    cases.push((GETATTR, node, [words(&[1, 0]), longs(&[u64::MAX])].concat()));
    let count = cases.len();
    for (index, (op, node, body)) in cases.into_iter().enumerate() {
        let what = format!("case {index} of numbers, operation {op}");
        ask(driver, op, node, &body, &what);
        if index % 10 == 0 {
            driver.recover(&what);
        }
    }
    driver.start();
    count
}

/// Opened without end, files are refused at some point and closed with the session.
fn handles(driver: &Driver<'_>) -> usize {
    let before = driver.rig.descriptors();
    let node = lookup(driver, "scratch", "many files");
    let opened =
        (0..3000).take_while(|_| open(driver, node, libc::O_RDONLY, "many files").error == 0);
    let opened = opened.count();
    assert!(opened > 100, "{opened} files");
    let grown = driver.rig.descriptors() - before;
    assert!(
        grown <= opened + 16,
        "{grown} descriptors for {opened} files"
    );
    driver.start();
    assert!(driver.rig.descriptors() <= before + 4);
    driver.subject.good(driver, "many files");
    1
}

/// A share is held to its rate on the real thread, filter of system calls and all.
#[test]
fn a_share_is_held_to_its_rate() {
    if !kvm_is_here() {
        return;
    }
    let rig = Rig::boot(|folder| {
        let mut all = options(folder);
        all[1].push_str(",ops_size=20,ops_refill_time=100");
        all
    });
    let rig = suite::warmed(rig, &Share);
    let driver = Driver::new(&rig, &Share);
    let start = Instant::now();
    driver.start();
    for _ in 0..100 {
        lookup(&driver, "inside", "its rate");
    }
    // 20 are saved up, and 200 come in a second.
    let least = Duration::from_millis(400);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    rig.finish();
}

/// What podvmm may have for each file that a guest knows, with the longest name, and for each that it has open.
const NODE: u64 = 768;
const HANDLE: u64 = 256;

/// A guest that knows many files of long names, and has as many open as it may.
#[test]
fn files_that_a_guest_knows_take_no_more_than_is_said() {
    if !kvm_is_here() {
        return;
    }
    let files = 20_000_u64;
    let rig = Rig::boot(|folder| {
        let all = options(folder);
        let many = folder.join("share/many");
        fs::create_dir(&many).expect("there is room");
        for number in 0..files {
            fs::write(many.join(format!("{number:0>255}")), []).expect("there is room");
        }
        all
    });
    let mut rig = suite::warmed(rig, &Share);
    let driver = Driver::new(&rig, &Share);
    driver.start();
    let before = rig.private_bytes();
    let folder = lookup(&driver, "many", "many names");
    let open_folder = ask(&driver, OPENDIR, folder, &words(&[0, 0]), "many names").u64(0);
    let mut offset = 0;
    let mut known = 0;
    loop {
        let room = 1 << 20;
        let list = request(READDIRPLUS, folder, &transfer(open_folder, offset, room));
        let list = [Out(list), InAt(LARGE, room + 16)];
        driver.send(REQUESTS, &list, "many names");
        let len = driver.puppet().ram.u32(LARGE);
        let answer = driver.puppet().ram.bytes(LARGE, len as usize);
        let mut rest = &answer[16..];
        if rest.is_empty() {
            break;
        }
        // An entry is what LOOKUP answers, and then inode, offset, length of the name, kind and name.
        while let Some((entry, after)) = rest.split_at_checked(128 + 24) {
            let long = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("8"));
            known += u64::from(long(0) > ROOT);
            offset = long(128 + 8);
            let name = usize::try_from(long(128 + 16) & 0xffff_ffff).expect("it is short");
            rest = &after[name.next_multiple_of(8).min(after.len())..];
        }
    }
    assert!(known >= files, "{known} of {files} files are known");
    let grown = rig.private_bytes().saturating_sub(before);
    println!(
        "fs: {known} files take {} bytes each, {NODE} at most",
        grown / known
    );
    assert!(grown <= known * NODE, "{grown} bytes for {known} files");

    let before = rig.private_bytes();
    let node = lookup(&driver, "scratch", "many handles");
    let opened = std::iter::repeat_with(|| open(&driver, node, libc::O_RDONLY, "many handles"));
    let opened = opened.take_while(|answer| answer.error == 0).count() as u64;
    let grown = rig.private_bytes().saturating_sub(before);
    println!(
        "fs: {opened} open files take {} bytes each, {HANDLE} at most",
        grown / opened
    );
    assert!(grown <= opened * HANDLE, "{grown} bytes for {opened} files");
    driver.start();
    Share.good(&driver, "many files");
    // The allocator keeps what was freed, for the next ones.
    rig.take_stock();
    rig.finish();
}
