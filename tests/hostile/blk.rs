//! Disks: one that may be written, and one that may not.

use std::fs;
use std::path::Path;

use crate::driver::{Buffer, Driver, LARGE, Subject, Verdict};
use crate::rig::{Rig, plain};
use crate::suite;

use Buffer::{In, InAt, Out, OutAt};

const DISK_BYTES: usize = 1 << 20;
const SECTORS: u64 = DISK_BYTES as u64 / 512;

// Requests (virtio 1.3 §5.2.6) and what becomes of them.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) readonly: bool,
}

impl Subject for Disk {
    fn name(&self) -> &'static str {
        if self.readonly {
            "blk, read-only"
        } else {
            "blk"
        }
    }

    fn id(&self) -> u32 {
        2
    }

    fn queues(&self) -> u16 {
        2
    }

    fn looked_at(&self) -> Vec<u16> {
        vec![0, 1]
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        for queue in [0, 1] {
            let request = [Out(header(ID, 0)), In(20), In(1)];
            let bytes = driver.send(queue, &request, after).answer(after);
            assert_eq!(bytes, *b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "{after}");
        }
        if self.readonly {
            let bytes = driver.send(0, &read(3), after).answer(after);
            assert_eq!(bytes[..512], content()[3 * 512..4 * 512], "{after}");
            assert_eq!(bytes[512], OK, "{after}");
        }
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (0, read(3))
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn read(sector: u64) -> Vec<Buffer> {
    vec![Out(header(READ, sector)), In(512), In(1)]
}

/// What the disk holds.
fn content() -> Vec<u8> {
    (0..DISK_BYTES)
        .map(|at| at.to_le_bytes()[usize::from(at % 512 == 0)] ^ 0x3c)
        .collect()
}

pub(crate) fn boot(folder: &Path, access: &str) -> Vec<String> {
    fs::write(folder.join("disk"), content()).expect("there is room");
    fs::write(folder.join("neighbour"), [7; 4096]).expect("there is room");
    let disk = plain(&folder.join("disk")).to_owned();
    let options = format!("path={disk},queues=2{access}");
    vec!["--disk".into(), options]
}

#[test]
fn a_readonly_disk() {
    suite::on_each(|folder| boot(folder, ",readonly=on"), read_a_disk);
}

fn read_a_disk(rig: Rig) {
    let files = ["disk", "neighbour"].map(|name| rig.folder.path().join(name));
    let rig = rig.keeps(&files[0]).keeps(&files[1]);
    suite::run_in(rig, &Disk { readonly: true }, |driver| {
        let refused = [
            (
                "a write",
                vec![Out(header(WRITE, 0)), Out(vec![0; 512]), In(1)],
                Some(FAILED),
            ),
            ("a discard", ranged(DISCARD, &[(0, 8, 0)]), Some(FAILED)),
            ("zeroes", ranged(ZEROES, &[(0, 8, 0)]), Some(FAILED)),
            (
                "zeroes to unmap",
                ranged(ZEROES, &[(0, 8, 1)]),
                Some(FAILED),
            ),
            (
                "a write of nothing",
                vec![Out(header(WRITE, 0)), In(1)],
                Some(FAILED),
            ),
        ];
        requests(driver, refused) + requests(driver, reads()) + requests(driver, odd())
    });
}

#[test]
fn a_disk() {
    suite::on_each(|folder| boot(folder, ""), write_to_a_disk);
}

fn write_to_a_disk(rig: Rig) {
    let disk = rig.folder.path().join("disk");
    let neighbour = rig.folder.path().join("neighbour");
    suite::run_in(rig.keeps(&neighbour), &Disk { readonly: false }, |driver| {
        let count = requests(driver, writes())
            + requests(driver, discards())
            + requests(driver, reads())
            + requests(driver, odd());
        let len = fs::metadata(driver.rig.folder.path().join("disk")).map(|disk| disk.len());
        assert_eq!(len.ok(), Some(DISK_BYTES as u64), "a disk keeps its size");
        count
    });
    assert!(!disk.exists(), "the folder goes with the rig");
}

/// A request, and the status that it gets; none if there is nowhere to put it.
type Case = (&'static str, Vec<Buffer>, Option<u8>);

fn requests(driver: &Driver<'_>, cases: impl IntoIterator<Item = Case>) -> usize {
    let mut count = 0;
    for (name, request, expected) in cases {
        let Verdict::Answered(written, bytes) = driver.send(0, &request, name) else {
            panic!("blk: {name}: the device asks for a reset");
        };
        match expected {
            Some(status) => assert_eq!(bytes.last(), Some(&status), "blk: {name}"),
            None => assert_eq!(written, 0, "blk: {name}"),
        }
        driver.recover(name);
        count += 1;
    }
    count
}

/// Reads beyond the disk, and of lengths that are none.
fn reads() -> Vec<Case> {
    let at = |sector, len| vec![Out(header(READ, sector)), In(len), In(1)];
    vec![
        ("the last sector", at(SECTORS - 1, 512), Some(OK)),
        ("the sector behind the last", at(SECTORS, 512), Some(FAILED)),
        (
            "the last sector and one more",
            at(SECTORS - 1, 1024),
            Some(FAILED),
        ),
        ("a sector far behind", at(1 << 40, 512), Some(FAILED)),
        (
            "a sector whose offset is 0 again",
            at(1 << 55, 512),
            Some(FAILED),
        ),
        ("the last number's sector", at(u64::MAX, 512), Some(FAILED)),
        (
            "a sector before the last number",
            at(u64::MAX - 1, 1024),
            Some(FAILED),
        ),
        ("a byte less than a sector", at(0, 511), Some(FAILED)),
        ("a byte more than a sector", at(0, 513), Some(FAILED)),
        ("one byte", at(0, 1), Some(FAILED)),
        ("no byte", at(0, 0), Some(OK)),
        ("no byte behind the disk", at(SECTORS + 1, 0), Some(FAILED)),
        (
            "all of the disk",
            vec![Out(header(READ, 0)), InAt(LARGE, 1 << 20), In(1)],
            Some(OK),
        ),
        (
            "more than the disk",
            vec![Out(header(READ, 0)), InAt(LARGE, 1 << 21), In(1)],
            Some(FAILED),
        ),
        (
            "32 MiB",
            vec![Out(header(READ, 0)), InAt(LARGE, 32 << 20), In(1)],
            Some(FAILED),
        ),
        (
            "16 MiB and a sector",
            vec![Out(header(READ, 0)), InAt(LARGE, (16 << 20) + 512), In(1)],
            Some(FAILED),
        ),
        (
            "a sector in odd pieces",
            vec![Out(header(READ, 0)), In(100), In(411), In(1), In(1)],
            Some(OK),
        ),
        (
            "a sector with its status",
            vec![Out(header(READ, 0)), In(513)],
            Some(OK),
        ),
        (
            "the status alone",
            vec![Out(header(READ, 0)), In(1)],
            Some(OK),
        ),
        (
            "room that is readable",
            vec![Out(header(READ, 0)), Out(vec![0; 512]), In(1)],
            Some(OK),
        ),
        ("no room for the status", vec![Out(header(READ, 0))], None),
        (
            "a header of zeros elsewhere",
            vec![OutAt(0x70_0000, 16), In(512), In(1)],
            Some(OK),
        ),
    ]
}

/// Headers that are none, and requests that do not exist.
fn headers() -> Vec<Case> {
    let mut cases = Vec::new();
    for len in 0..16 {
        cases.push((
            "a header that is too short",
            vec![Out(vec![0; len]), In(512), In(1)],
            Some(FAILED),
        ));
    }
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        0x100,
        0x8000_0000,
        u32::MAX,
    ] {
        cases.push((
            "a request that does not exist",
            vec![Out(header(kind, 0)), In(512), In(1)],
            Some(UNSUPPORTED),
        ));
    }
    cases
}

/// Requests that say more than they need, or less.
fn odd() -> Vec<Case> {
    let mut cases = headers();
    cases.extend(vec![
        ("nothing but room", vec![In(512), In(1)], Some(FAILED)),
        (
            "a header in four parts",
            vec![
                Out(vec![0; 4]),
                Out(vec![0; 4]),
                Out(vec![0; 4]),
                Out(vec![0; 4]),
                In(512),
                In(1),
            ],
            Some(OK),
        ),
        ("a flush", vec![Out(header(FLUSH, 0)), In(1)], Some(OK)),
        (
            "a flush with a sector",
            vec![Out(header(FLUSH, u64::MAX)), In(1)],
            Some(OK),
        ),
        (
            "a flush with data",
            vec![Out(header(FLUSH, 0)), OutAt(LARGE, 32 << 20), In(1)],
            Some(OK),
        ),
        (
            "a flush with room",
            vec![Out(header(FLUSH, 0)), In(4096), In(1)],
            Some(OK),
        ),
        ("a flush without room", vec![Out(header(FLUSH, 0))], None),
        (
            "a name without room",
            vec![Out(header(ID, 0)), In(1)],
            Some(OK),
        ),
        (
            "a name in a byte",
            vec![Out(header(ID, 0)), In(1), In(1)],
            Some(OK),
        ),
        (
            "a name in 19 bytes",
            vec![Out(header(ID, 0)), In(19), In(1)],
            Some(OK),
        ),
        (
            "a name in a page",
            vec![Out(header(ID, 0)), In(4096), In(1)],
            Some(OK),
        ),
        (
            "a name in 32 MiB",
            vec![Out(header(ID, 0)), InAt(LARGE, 32 << 20), In(1)],
            Some(OK),
        ),
        ("no range", ranged(DISCARD, &[]), Some(FAILED)),
        (
            "half a range",
            vec![Out(header(DISCARD, 0)), Out(vec![0; 8]), In(1)],
            Some(FAILED),
        ),
        (
            "17 discards",
            ranged(DISCARD, &[(0, 1, 0); 17]),
            Some(FAILED),
        ),
        (
            "5 ranges of zeroes",
            ranged(ZEROES, &[(0, 1, 0); 5]),
            Some(FAILED),
        ),
    ]);
    cases
}

/// Ranges: sector, sectors, flags.
fn ranged(kind: u32, ranges: &[(u64, u32, u32)]) -> Vec<Buffer> {
    let mut bytes = Vec::new();
    for (sector, count, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    vec![Out(header(kind, 0)), Out(bytes), In(1)]
}

fn writes() -> Vec<Case> {
    let at = |sector, len| vec![Out(header(WRITE, sector)), Out(vec![1; len]), In(1)];
    vec![
        ("a write to the last sector", at(SECTORS - 1, 512), Some(OK)),
        ("a write behind the disk", at(SECTORS, 512), Some(FAILED)),
        (
            "a write across the end",
            at(SECTORS - 1, 1024),
            Some(FAILED),
        ),
        ("a write far behind", at(1 << 55, 512), Some(FAILED)),
        (
            "a write at the last number",
            at(u64::MAX, 512),
            Some(FAILED),
        ),
        ("a write of half a sector", at(0, 256), Some(FAILED)),
        ("a write of nothing", at(0, 0), Some(OK)),
        (
            "a write of room",
            vec![Out(header(WRITE, 0)), In(512), In(1)],
            Some(OK),
        ),
        (
            "a write of 32 MiB",
            vec![Out(header(WRITE, 0)), OutAt(LARGE, 32 << 20), In(1)],
            Some(FAILED),
        ),
        (
            "a write of the disk",
            vec![Out(header(WRITE, 0)), OutAt(LARGE, 1 << 20), In(1)],
            Some(OK),
        ),
        (
            "a write from page 0",
            vec![Out(header(WRITE, 0)), OutAt(0, 4096), In(1)],
            Some(OK),
        ),
    ]
}

fn discards() -> Vec<Case> {
    vec![
        ("a discard", ranged(DISCARD, &[(8, 8, 0)]), Some(OK)),
        ("16 discards", ranged(DISCARD, &[(8, 8, 0); 16]), Some(OK)),
        (
            "a discard of nothing",
            ranged(DISCARD, &[(8, 0, 0)]),
            Some(OK),
        ),
        (
            "a discard to unmap",
            ranged(DISCARD, &[(8, 8, 1)]),
            Some(UNSUPPORTED),
        ),
        (
            "a discard with all flags",
            ranged(DISCARD, &[(8, 8, u32::MAX)]),
            Some(UNSUPPORTED),
        ),
        (
            "a discard behind the disk",
            ranged(DISCARD, &[(SECTORS, 1, 0)]),
            Some(FAILED),
        ),
        (
            "a discard across the end",
            ranged(DISCARD, &[(SECTORS - 1, 2, 0)]),
            Some(FAILED),
        ),
        (
            "a discard of all numbers",
            ranged(DISCARD, &[(0, u32::MAX, 0)]),
            Some(FAILED),
        ),
        (
            "a discard at the last number",
            ranged(DISCARD, &[(u64::MAX, 1, 0)]),
            Some(FAILED),
        ),
        (
            "a second discard behind the disk",
            ranged(DISCARD, &[(8, 8, 0), (SECTORS, 1, 0)]),
            Some(FAILED),
        ),
        ("zeroes", ranged(ZEROES, &[(16, 8, 0)]), Some(OK)),
        ("zeroes to unmap", ranged(ZEROES, &[(16, 8, 1)]), Some(OK)),
        (
            "zeroes with a flag that does not exist",
            ranged(ZEROES, &[(16, 8, 2)]),
            Some(UNSUPPORTED),
        ),
        (
            "zeroes behind the disk",
            ranged(ZEROES, &[(SECTORS, 8, 0)]),
            Some(FAILED),
        ),
        (
            "zeroes of more than may be",
            ranged(ZEROES, &[(0, (1 << 15) + 1, 0)]),
            Some(FAILED),
        ),
        (
            "four ranges of zeroes",
            ranged(ZEROES, &[(16, 8, 0); 4]),
            Some(OK),
        ),
    ]
}
