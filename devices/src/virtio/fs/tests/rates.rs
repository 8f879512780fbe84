//! What holds a share to its limits of rate, whatever the guest asks and however.

use std::time::Duration;

use super::*;
use crate::virtio::Rate;

/// Requests of high priority.
const FIRST: usize = 0;
const QUEUES: u16 = 2;

/// A rate of so much that none comes back within a test.
fn once(size: u64) -> Option<Rate> {
    Some(Rate {
        size,
        one_time_burst: 0,
        refill_time: Duration::from_secs(1000),
    })
}

/// A share that two queues are served of, with a file of 4096 bytes whose node is 2 and whose handle
/// is the returned one.
fn client(bandwidth: Option<Rate>, operations: Option<Rate>) -> (Client, u64) {
    let mut client = Client::with(|config| {
        config.queues = QUEUES;
        config.rates = Limits {
            bandwidth,
            operations,
        };
    });
    fs::write(client.host("f"), [7; 4096]).unwrap();
    let file = client.lookup(ROOT, "f").unwrap().nodeid;
    let handle = client.open(file, OFlags::RDWR).unwrap();
    (client, handle)
}

/// Puts a request into a queue, without waiting for its answer.
fn add(client: &mut Client, queue: usize, opcode: u32, body: &[u8], room: u32) {
    let header = InHeader {
        len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
        opcode,
        unique: 1,
        nodeid: ROOT,
        ..InHeader::default()
    };
    let request = Buffer::Out([header.as_bytes(), body].concat());
    let answer = [request, Buffer::In(16 + room)];
    client.guest.add(queue, &answer).unwrap();
}

fn transfer(fh: u64, size: u32) -> TransferIn {
    TransferIn {
        fh,
        size,
        ..TransferIn::default()
    }
}

/// Has the device serve what is queued. Returns how many of the requests have come back so far.
fn done(client: &mut Client, so_far: usize) -> usize {
    for queue in 0..=usize::from(QUEUES) {
        client.guest.kick(queue);
    }
    client.guest.settle();
    let back = |client: &mut Client| {
        (0..=usize::from(QUEUES)).find_map(|queue| client.guest.take(queue).map(drop))
    };
    so_far + std::iter::from_fn(|| back(client)).count()
}

const READ: u32 = 15;
const WRITE: u32 = 16;
const GETATTR: u32 = 3;
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;
const COPY_FILE_RANGE: u32 = 47;

#[test]
fn bytes_beyond_the_limit_wait_in_all_queues_and_are_carried_out_at_the_end() {
    let (mut client, fh) = client(once(3 * 4096), None);
    let write = [transfer(fh, 4096).as_bytes(), &[9; 4096]].concat();
    for queue in [1, 2] {
        add(
            &mut client,
            queue,
            READ,
            transfer(fh, 4096).as_bytes(),
            4096,
        );
        add(&mut client, queue, WRITE, &write, 100);
        add(
            &mut client,
            queue,
            READ,
            transfer(fh, 4096).as_bytes(),
            4096,
        );
    }
    let moved = done(&mut client, 0);
    assert_eq!(moved, 3, "of both queues together");
    assert_eq!(done(&mut client, moved), 3, "a kick changes nothing");
    client.guest.transport.drain();
    assert_eq!(done(&mut client, moved), 6);
    assert_eq!(fs::read(client.host("f")).unwrap(), [9; 4096]);
}

#[test]
fn what_moves_no_bytes_is_not_held_to_the_limit_of_bytes() {
    let (mut client, fh) = client(once(4096), None);
    // At the file's end there is nothing to read, however much is asked for.
    let end = TransferIn {
        offset: 1 << 20,
        ..transfer(fh, 60_000)
    };
    for _ in 0..4 {
        add(&mut client, 1, READ, end.as_bytes(), 60_000);
        add(
            &mut client,
            1,
            GETATTR,
            GetAttrIn::default().as_bytes(),
            200,
        );
    }
    assert_eq!(done(&mut client, 0), 8);
}

#[test]
fn a_copy_within_the_host_costs_what_is_read_and_written() {
    let (mut client, fh) = client(once(8193), None);
    let (_, to) = client.create(ROOT, "to", OFlags::RDWR).unwrap();
    let copy = CopyFileRangeIn {
        fh_in: fh,
        fh_out: to,
        len: 4096,
        ..CopyFileRangeIn::default()
    };
    for _ in 0..3 {
        add(&mut client, 1, COPY_FILE_RANGE, copy.as_bytes(), 100);
    }
    assert_eq!(done(&mut client, 0), 2);
}

/// INIT, LOOKUP and OPEN of [`client`] are three requests.
const SPENT: u64 = 3;

#[test]
fn each_request_counts_also_one_without_an_answer() {
    let (mut client, _) = client(None, once(SPENT + 5));
    let forget = ForgetIn { lookups: 1 };
    for _ in 0..4 {
        add(&mut client, FIRST, FORGET, forget.as_bytes(), 0);
        add(
            &mut client,
            1,
            GETATTR,
            GetAttrIn::default().as_bytes(),
            200,
        );
    }
    assert_eq!(done(&mut client, 0), 5);
}

#[test]
fn a_request_to_forget_many_files_counts_for_each() {
    let (mut client, _) = client(None, once(SPENT + 50));
    let one = ForgetOne {
        nodeid: 1000,
        lookups: 1,
    };
    let count = BatchForgetIn {
        count: 20,
        dummy: 0,
    };
    let all = [count.as_bytes(), &one.as_bytes().repeat(20)].concat();
    for _ in 0..6 {
        add(&mut client, FIRST, BATCH_FORGET, &all, 0);
    }
    assert_eq!(done(&mut client, 0), 3);
}

#[test]
fn a_reset_gives_no_new_tokens() {
    let (mut client, _) = client(None, once(SPENT + 3));
    let ask = |client: &mut Client| {
        for _ in 0..2 {
            add(client, 1, GETATTR, GetAttrIn::default().as_bytes(), 200);
        }
        done(client, 0)
    };
    assert_eq!(ask(&mut client), 2);
    client.guest.start(u64::MAX, 16);
    assert_eq!(ask(&mut client), 1, "what was left");
}

#[test]
fn what_waits_goes_on_when_there_are_tokens_again() {
    let rate = Rate {
        size: 3,
        one_time_burst: SPENT,
        refill_time: Duration::from_millis(100),
    };
    let (mut client, _) = client(None, Some(rate));
    for _ in 0..8 {
        add(
            &mut client,
            1,
            GETATTR,
            GetAttrIn::default().as_bytes(),
            200,
        );
    }
    let mut moved = done(&mut client, 0);
    assert!(moved < 8, "{moved}");
    while moved < 8 {
        std::thread::sleep(Duration::from_millis(5));
        client.guest.settle();
        while client.guest.take(1).is_some() {
            moved += 1;
        }
    }
}
