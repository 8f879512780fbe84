//! A disk as its driver sees it, against the image as the host sees it.

mod model;

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::request::MAX_TRANSFER;
use super::*;
use crate::virtio::testing::{Buffer, Guest, Table, lifecycle};
use crate::virtio::{Limits, Rate};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Sectors of the test image.
const SECTORS: u8 = 64;
const END: u64 = SECTORS as u64;

fn image() -> TempFile {
    let image = TempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS)
        .flat_map(|sector| vec![sector + 1; 512])
        .collect();
    fs::write(image.as_path(), bytes).unwrap();
    image
}

fn config(path: &Path) -> BlkConfig {
    BlkConfig {
        path: PathBuf::from(path),
        readonly: false,
        direct: false,
        queues: 1,
        queue_size: 16,
        serial: "disk-7".into(),
        rates: Limits::default(),
        name: "blk0".into(),
    }
}

fn disk(image: &TempFile) -> Guest {
    Guest::live(Blk::open(config(image.as_path())).unwrap())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Makes a request and returns its status and what it read.
fn ask(guest: &mut Guest, kind: u32, sector: u64, data: &[Buffer]) -> (u8, Vec<u8>) {
    let mut buffers = vec![Buffer::Out(header(kind, sector))];
    buffers.extend_from_slice(data);
    buffers.push(Buffer::In(1));
    let mut answer = guest.request(0, &buffers).unwrap();
    (answer.pop().unwrap(), answer)
}

fn status(guest: &mut Guest, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    ask(guest, kind, sector, data).0
}

#[test]
fn what_is_on_the_disk_is_read() {
    let image = image();
    let mut guest = disk(&image);
    let (status, bytes) = ask(&mut guest, IN, 3, &[Buffer::In(512), Buffer::In(1024)]);
    assert_eq!(status, OK);
    assert_eq!(bytes, [vec![4; 512], vec![5; 512], vec![6; 512]].concat());
    assert_eq!(guest.counters().bytes_in.get(), 1536);
}

#[test]
fn what_is_written_is_on_the_disk() {
    let image = image();
    let mut guest = disk(&image);
    let data = [Buffer::Out(vec![0xaa; 300]), Buffer::Out(vec![0xbb; 212])];
    assert_eq!(status(&mut guest, OUT, END - 1, &data), OK);
    assert_eq!(status(&mut guest, FLUSH, 0, &[]), OK);
    let bytes = fs::read(image.as_path()).unwrap();
    assert_eq!(
        bytes[bytes.len() - 512..],
        [vec![0xaa; 300], vec![0xbb; 212]].concat()
    );
    assert_eq!(guest.counters().bytes_out.get(), 512);
}

#[test]
fn a_request_by_an_indirect_table_is_answered() {
    let image = image();
    let mut guest = disk(&image);
    let buffers = [Buffer::Out(header(IN, 0)), Buffer::In(512), Buffer::In(1)];
    guest.add_by(Table::Indirect, 0, &buffers).unwrap();
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.take(0).unwrap(), [vec![1; 512], vec![OK]].concat());
}

#[test]
fn a_header_in_pieces_is_read() {
    let image = image();
    let mut guest = disk(&image);
    let header = header(IN, 1);
    let buffers = [
        Buffer::Out(header[..5].to_vec()),
        Buffer::Out(header[5..].to_vec()),
        Buffer::In(513),
    ];
    assert_eq!(
        guest.request(0, &buffers).unwrap(),
        [vec![2; 512], vec![OK]].concat()
    );
}

#[test]
fn many_requests_are_answered_with_one_interrupt() {
    let image = image();
    let mut guest = disk(&image);
    let request = [Buffer::Out(header(IN, 0)), Buffer::In(512), Buffer::In(1)];
    let heads = [(); 5].map(|()| guest.add(0, &request).unwrap());
    guest.kick(0);
    guest.settle();
    assert_eq!(heads.map(|_| guest.take_used(0).unwrap().0), heads);
    assert!(
        guest.interrupts() <= 2,
        "a batch interrupts once, or twice if it takes long"
    );
}

#[test]
fn a_request_outside_the_disk_fails() {
    let image = image();
    let mut guest = disk(&image);
    let sector = || Buffer::In(512);
    let statuses = [
        status(&mut guest, IN, END, &[sector()]),
        status(&mut guest, IN, END - 1, &[sector(), sector()]),
        status(&mut guest, IN, u64::MAX, &[sector()]),
        status(&mut guest, IN, u64::MAX / 512, &[sector()]),
        status(&mut guest, OUT, END, &[Buffer::Out(vec![0; 512])]),
        status(&mut guest, DISCARD, 0, &[Buffer::Out(range(END, 1, 0))]),
        status(
            &mut guest,
            WRITE_ZEROES,
            0,
            &[Buffer::Out(range(u64::MAX, u32::MAX, 0))],
        ),
    ];
    assert_eq!(statuses, [IOERR; 7]);
    assert_eq!(guest.counters().errors.get(), 7);
    assert_eq!(fs::metadata(image.as_path()).unwrap().len(), END * 512);
}

#[test]
fn an_empty_transfer_at_the_end_succeeds() {
    let image = image();
    let mut guest = disk(&image);
    assert_eq!(status(&mut guest, IN, END, &[]), OK);
    assert_eq!(status(&mut guest, OUT, END, &[]), OK);
}

#[test]
fn a_transfer_of_odd_length_fails() {
    let image = image();
    let mut guest = disk(&image);
    assert_eq!(status(&mut guest, IN, 0, &[Buffer::In(511)]), IOERR);
    assert_eq!(
        status(&mut guest, OUT, 0, &[Buffer::Out(vec![0; 513])]),
        IOERR
    );
}

#[test]
fn a_failed_read_leaves_nothing_unwritten() {
    let image = image();
    let mut guest = disk(&image);
    let stale = vec![0xff; 1 << 20];
    guest
        .ram()
        .write_slice(&stale, GuestAddress(4 << 20))
        .unwrap();
    let (status, bytes) = ask(&mut guest, IN, END, &[Buffer::In(1024)]);
    assert_eq!((status, bytes), (IOERR, vec![0; 1024]));
}

#[test]
fn a_disk_that_shrank_behind_our_back_fails_reads() {
    let image = image();
    let mut guest = disk(&image);
    image.as_file().set_len(512).unwrap();
    assert_eq!(status(&mut guest, IN, 1, &[Buffer::In(512)]), IOERR);
    assert_eq!(status(&mut guest, IN, 0, &[Buffer::In(512)]), OK);
}

/// Names the same 4 MiB so often that there is room for `mib` of data, and asks for `kind`. Returns the
/// status and how many bytes are said to be written.
fn ask_with_room(image: &TempFile, kind: u32, mib: u16) -> (u8, usize) {
    let mut guest = disk(image);
    const DATA: u64 = 12 << 20;
    const TABLE: u64 = 8 << 20;
    const HEADER: u64 = TABLE - 64;
    const STATUS: u64 = TABLE - 1;
    let count = mib / 4;
    let ram = guest.ram();
    ram.write_slice(&header(kind, 0), GuestAddress(HEADER))
        .unwrap();
    ram.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    ram.write_obj(0xff_u8, GuestAddress(DATA)).unwrap();
    guest.write_descriptor(TABLE, 0, HEADER, 16, VRING_DESC_F_NEXT, 1);
    let flags = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE;
    for index in 1..=count {
        guest.write_descriptor(TABLE, index, DATA, 4 << 20, flags, index + 1);
    }
    guest.write_descriptor(TABLE, count + 1, STATUS, 1, VRING_DESC_F_WRITE, 0);
    let [table, _, used] = guest.areas(0);
    let len = (u32::from(count) + 2) * 16;
    guest.write_descriptor(table, 0, TABLE, len, VRING_DESC_F_INDIRECT, 0);
    guest.publish(0, 0);
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.take(0).map(|_| ()), Some(()));
    let written: u32 = ram.read_obj(GuestAddress(used + 8)).unwrap();
    let status = ram.read_obj(GuestAddress(STATUS)).unwrap();
    let untouched = ram.read_obj::<u8>(GuestAddress(DATA)).unwrap() == 0xff;
    assert_eq!(untouched, written == 0);
    (status, written as usize)
}

#[test]
fn room_that_a_refused_request_offers_is_left_alone() {
    let image = image();
    assert_eq!(ask_with_room(&image, 99, 1024), (UNSUPP, 0));
    assert_eq!(ask_with_room(&image, IN, 4), (IOERR, 0));
}

#[test]
fn a_transfer_is_carried_out_or_refused_by_its_length() {
    let image = TempFile::new().unwrap();
    image.as_file().set_len(1 << 30).unwrap();
    let longest = usize::try_from(MAX_TRANSFER).unwrap();
    let mib = u16::try_from(longest >> 20).unwrap();
    assert_eq!(ask_with_room(&image, IN, mib), (OK, longest + 1));
    assert_eq!(ask_with_room(&image, IN, mib + 4), (IOERR, 0));
}

#[test]
fn an_unknown_request_is_unsupported() {
    let image = image();
    let mut guest = disk(&image);
    assert_eq!(status(&mut guest, 99, 0, &[]), UNSUPP);
    assert_eq!(status(&mut guest, u32::MAX, 0, &[Buffer::In(512)]), UNSUPP);
}

#[test]
fn a_request_with_a_short_header_fails_and_one_without_status_is_dropped() {
    let image = image();
    let mut guest = disk(&image);
    assert_eq!(
        guest.request(0, &[Buffer::Out(vec![0; 15]), Buffer::In(1)]),
        Some(vec![IOERR])
    );
    assert_eq!(guest.request(0, &[Buffer::In(1)]), Some(vec![IOERR]));
    assert_eq!(
        guest.request(0, &[Buffer::Out(header(FLUSH, 0))]),
        Some(vec![])
    );
    assert_eq!(guest.counters().bad_chains.get(), 1);
}

#[test]
fn the_serial_is_twenty_bytes() {
    let image = image();
    let mut guest = disk(&image);
    let (got, id) = ask(&mut guest, GET_ID, 0, &[Buffer::In(20)]);
    assert_eq!(
        (got, &id[..]),
        (OK, &b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
    );
    let (got, id) = ask(&mut guest, GET_ID, 0, &[Buffer::In(4)]);
    assert_eq!((got, &id[..]), (OK, &b"disk"[..]));
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zero() {
    let image = image();
    let mut guest = disk(&image);
    let two = Buffer::Out([range(1, 1, 0), range(3, 2, 0)].concat());
    assert_eq!(status(&mut guest, WRITE_ZEROES, 0, &[two]), OK);
    let unmapped = Buffer::Out(range(6, 1, UNMAP));
    assert_eq!(status(&mut guest, WRITE_ZEROES, 0, &[unmapped]), OK);
    assert_eq!(
        status(&mut guest, DISCARD, 0, &[Buffer::Out(range(8, 8, 0))]),
        OK
    );
    assert_eq!(
        status(&mut guest, DISCARD, 0, &[Buffer::Out(range(8, 0, 0))]),
        OK
    );
    let bytes = fs::read(image.as_path()).unwrap();
    let firsts: Vec<u8> = bytes
        .chunks(512)
        .take(8)
        .map(|sector| sector[511])
        .collect();
    assert_eq!(firsts, [1, 0, 3, 0, 0, 6, 0, 8]);
    assert_eq!(bytes.len() as u64, END * 512);
}

#[test]
fn odd_ranges_and_flags_are_refused() {
    let image = image();
    let mut guest = disk(&image);
    let mut ranges = |kind, bytes: Vec<u8>| status(&mut guest, kind, 0, &[Buffer::Out(bytes)]);
    assert_eq!(ranges(DISCARD, range(0, 1, UNMAP)), UNSUPP);
    assert_eq!(ranges(WRITE_ZEROES, range(0, 1, 2)), UNSUPP);
    assert_eq!(ranges(DISCARD, vec![0; 15]), IOERR);
    assert_eq!(ranges(DISCARD, vec![]), IOERR);
    assert_eq!(ranges(DISCARD, range(0, 0, 0).repeat(17)), IOERR);
    assert_eq!(ranges(DISCARD, range(0, 0, 0).repeat(16)), OK);
    assert_eq!(ranges(DISCARD, range(0, u32::MAX, 0)), IOERR);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let image = image();
    let before = fs::read(image.as_path()).unwrap();
    let readonly = BlkConfig {
        readonly: true,
        ..config(image.as_path())
    };
    let mut guest = Guest::live(Blk::open(readonly).unwrap());
    let zeroes = Buffer::Out(range(0, 1, 0));
    assert_eq!(
        status(&mut guest, OUT, 0, &[Buffer::Out(vec![0; 512])]),
        IOERR
    );
    assert_eq!(
        status(&mut guest, DISCARD, 0, std::slice::from_ref(&zeroes)),
        IOERR
    );
    assert_eq!(status(&mut guest, WRITE_ZEROES, 0, &[zeroes]), IOERR);
    assert_eq!(status(&mut guest, OUT, 0, &[]), IOERR);
    assert_eq!(status(&mut guest, FLUSH, 0, &[]), OK);
    assert_eq!(status(&mut guest, IN, 0, &[Buffer::In(512)]), OK);
    assert_eq!(fs::read(image.as_path()).unwrap(), before);
}

#[test]
fn requests_beyond_the_limit_wait_and_are_carried_out_at_the_end() {
    let image = image();
    let rate = Rate {
        size: 2048,
        one_time_burst: 0,
        refill_time: std::time::Duration::from_secs(1000),
    };
    let disk = BlkConfig {
        queues: 2,
        rates: Limits {
            bandwidth: Some(rate),
            operations: None,
        },
        ..config(image.as_path())
    };
    let mut guest = Guest::live(Blk::open(disk).unwrap());
    for queue in [0, 1] {
        for _ in 0..3 {
            let request = [Buffer::Out(header(IN, 0)), Buffer::In(1024), Buffer::In(1)];
            guest.add(queue, &request).unwrap();
        }
        guest.kick(queue);
    }
    guest.settle();
    let mut done = 0;
    while guest.take(0).is_some() || guest.take(1).is_some() {
        done += 1;
    }
    assert_eq!(done, 2, "of both queues together");
    guest.transport.drain();
    while guest.take(0).is_some() || guest.take(1).is_some() {
        done += 1;
    }
    assert_eq!(done, 6);
}

#[test]
fn a_reset_gives_no_new_tokens() {
    let image = image();
    let rate = Rate {
        size: 1,
        one_time_burst: 0,
        refill_time: std::time::Duration::from_secs(1000),
    };
    let mut disk = config(image.as_path());
    disk.rates.operations = Some(rate);
    let mut guest = Guest::live(Blk::open(disk).unwrap());
    assert_eq!(status(&mut guest, IN, 0, &[Buffer::In(512)]), OK);
    guest.start(u64::MAX, 16);
    let request = [Buffer::Out(header(IN, 0)), Buffer::In(512), Buffer::In(1)];
    assert_eq!(guest.request(0, &request), None);
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let image = image();
    let mut guest = Guest::new(
        Blk::open(BlkConfig {
            queues: 3,
            ..config(image.as_path())
        })
        .unwrap(),
    );
    assert_eq!(u64::from_le_bytes(guest.config(0)), END);
    assert_eq!(u32::from_le_bytes(guest.config(12)), 14);
    assert_eq!(u32::from_le_bytes(guest.config(20)), 512);
    assert_eq!(u16::from_le_bytes(guest.config(34)), 3);
    assert_eq!(guest.config::<8>(60), [0; 8]);
    assert_eq!(guest.config::<1>(56), [1]);
    assert_eq!(guest.transport.kicks().len(), 3);
}

#[test]
fn a_driver_may_use_fewer_queues_than_there_are() {
    let image = image();
    let disk = Blk::open(BlkConfig {
        queues: 4,
        ..config(image.as_path())
    })
    .unwrap();
    let mut guest = Guest::new(disk);
    guest.negotiate(u64::MAX);
    guest.set_up_queues(16);
    guest.write(0x30, 2);
    guest.write(0x44, 0);
    guest.write(0x70, crate::virtio::testing::LIVE);
    assert_eq!(guest.status(), crate::virtio::testing::LIVE);
    assert_eq!(guest.runner.running(), 3);
    assert_eq!(status(&mut guest, IN, 0, &[Buffer::In(512)]), OK);
}

#[test]
fn the_disk_lives_through_pause_and_reset() {
    let image = image();
    let disk = || Blk::open(config(image.as_path())).unwrap();
    lifecycle(disk, |guest| {
        assert_eq!(status(guest, OUT, 1, &[Buffer::Out(vec![9; 512])]), OK);
        assert_eq!(ask(guest, IN, 1, &[Buffer::In(512)]), (OK, vec![9; 512]));
    });
}

#[test]
fn an_image_in_use_is_refused_unless_both_only_read() {
    let image = image();
    let readonly = BlkConfig {
        readonly: true,
        ..config(image.as_path())
    };
    let first = Blk::open(readonly.clone()).unwrap();
    let second = Blk::open(readonly).unwrap();
    let error = Blk::open(config(image.as_path())).unwrap_err();
    assert!(
        error.to_string().ends_with("is in use by another process"),
        "{error}"
    );
    drop((first, second));
    let writer = Blk::open(config(image.as_path())).unwrap();
    let readonly = BlkConfig {
        readonly: true,
        ..config(image.as_path())
    };
    assert!(matches!(
        Blk::open(readonly.clone()),
        Err(BlkError::Busy { .. })
    ));
    drop(writer);
    Blk::open(readonly).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let image = image();
    image.as_file().set_len(1000).unwrap();
    let path = image.as_path().to_path_buf();
    let errors = [
        BlkConfig {
            path: "/nonexistent/disk.img".into(),
            ..config(&path)
        },
        BlkConfig {
            path: "/dev/null".into(),
            ..config(&path)
        },
        BlkConfig {
            path: "/tmp".into(),
            readonly: true,
            ..config(&path)
        },
        config(&path),
        BlkConfig {
            serial: "123456789012345678901".into(),
            ..config(&path)
        },
        BlkConfig {
            queues: 0,
            ..config(&path)
        },
        BlkConfig {
            queues: 17,
            ..config(&path)
        },
        BlkConfig {
            queue_size: 2,
            ..config(&path)
        },
        BlkConfig {
            queue_size: 100,
            ..config(&path)
        },
    ]
    .map(|config| Blk::open(config).unwrap_err().to_string());
    let odd = format!(
        "{} is 1000 bytes long, which is not a multiple of 512",
        path.display()
    );
    assert_eq!(
        errors,
        [
            "open disk image /nonexistent/disk.img",
            "/dev/null is neither a regular file nor a block device",
            "/tmp is neither a regular file nor a block device",
            &odd,
            "disk serial \"123456789012345678901\" is longer than 20 bytes",
            "a disk has 1 to 16 queues, not 0",
            "a disk has 1 to 16 queues, not 17",
            "a disk's queue size is a power of two from 4 to 1024, not 2",
            "a disk's queue size is a power of two from 4 to 1024, not 100",
        ]
    );
}

/// Where the host has direct access, memory of any alignment works.
#[test]
fn direct_access_takes_memory_of_any_alignment() {
    let image = image();
    let direct = BlkConfig {
        direct: true,
        ..config(image.as_path())
    };
    let disk = Blk::open(direct).expect("the host's temporary directory has direct access");
    let mut guest = Guest::live(disk);
    let block = u32::from_le_bytes(guest.config(20));
    let (half, rest) = (block / 2 + 16, block / 2 - 16);
    let data = [
        Buffer::Out(vec![1; half as usize]),
        Buffer::Out(vec![2; rest as usize]),
    ];
    assert_eq!(status(&mut guest, OUT, 0, &data), OK);
    let (got, bytes) = ask(&mut guest, IN, 0, &[Buffer::In(rest), Buffer::In(half)]);
    assert_eq!(got, OK);
    assert_eq!(
        bytes,
        [vec![1; half as usize], vec![2; rest as usize]].concat()
    );
}
