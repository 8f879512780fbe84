//! The memory device: a region of which the host lets the guest plug a half.

use crate::driver::{Buffer, Driver, Subject};
use crate::puppet::Step;
use crate::suite;

use Buffer::{In, Out, OutAt};

const REGION: u64 = 1 << 32;
const REGION_BYTES: u64 = 128 << 20;
const BLOCK: u64 = 2 << 20;
/// Blocks that there are, and that may be plugged.
const BLOCKS: u16 = 64;
const MOST: u16 = 16;

// Requests (virtio 1.3 §5.15.6) and responses.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

#[derive(Debug)]
struct Mem;

impl Subject for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn id(&self) -> u32 {
        24
    }

    fn queues(&self) -> u16 {
        1
    }

    /// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
    fn features(&self) -> u64 {
        1 << 1
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        // Memory that the guest plugs holds what it writes.
        for (kind, block) in [(UNPLUG_ALL, 0), (PLUG, 1)] {
            assert_eq!(
                ask(driver, kind, REGION + block * BLOCK, 1, after),
                ACK,
                "{after}"
            );
        }
        let at = REGION + BLOCK + 8;
        let came = driver
            .puppet()
            .run(&[Step::write(at, 8, 0x1234_5678_9abc), Step::read(at, 8)]);
        assert_eq!(came[1].value, 0x1234_5678_9abc, "{after}");
        assert_eq!(
            ask(driver, UNPLUG, REGION + BLOCK, 1, after),
            ACK,
            "{after}"
        );
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (0, request(STATE, REGION, 1))
    }
}

fn request(kind: u16, address: u64, blocks: u16) -> Vec<Buffer> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    vec![Out(bytes), In(10)]
}

/// The response to a request.
fn ask(driver: &Driver<'_>, kind: u16, address: u64, blocks: u16, what: &str) -> u16 {
    let bytes = driver
        .send(0, &request(kind, address, blocks), what)
        .answer(what);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

#[test]
fn the_memory_device() {
    let options = |_: &std::path::Path| {
        let memory = "size=64M,hotplug_size=128M,hotplugged_size=32M";
        vec!["--memory".into(), memory.into()]
    };
    suite::run(options, &Mem, |driver| {
        ranges(driver) + lengths(driver) + plugged(driver)
    });
}

/// Ranges that are not of the region, for each request about one.
fn ranges(driver: &Driver<'_>) -> usize {
    let end = REGION + REGION_BYTES;
    let bad: [(u64, u16); 16] = [
        (0, 1),
        (0x10_0000, 1),
        (REGION - BLOCK, 1),
        (REGION - BLOCK, 2),
        (REGION + 1, 1),
        (REGION + 4096, 1),
        (REGION + BLOCK / 2, 1),
        (REGION, 0),
        (REGION, BLOCKS + 1),
        (REGION, u16::MAX),
        (end, 1),
        (end - BLOCK, 2),
        (end - BLOCK, u16::MAX),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, 2),
        (1 << 63, 1),
    ];
    for (address, blocks) in bad {
        for kind in [PLUG, UNPLUG, STATE] {
            let name = format!("{kind} of {blocks} blocks from {address:#x}");
            assert_eq!(ask(driver, kind, address, blocks, &name), ERROR, "{name}");
            driver.recover(&name);
        }
    }
    for kind in [4, 5, 0x100, 0x7fff, 0xffff] {
        let name = format!("request {kind}");
        assert_eq!(ask(driver, kind, REGION, 1, &name), ERROR, "{name}");
        driver.recover(&name);
    }
    3 * bad.len() + 5
}

/// Requests of which a part is missing come back without a response.
fn lengths(driver: &Driver<'_>) -> usize {
    let whole = || vec![0; 24];
    let mut cases = vec![
        vec![Out(whole())],
        vec![In(10)],
        vec![Out(whole()), In(9)],
        vec![Out(whole()), In(1)],
        vec![Out(Vec::new()), In(10)],
        vec![OutAt(0, 1 << 20), In(10)],
    ];
    cases.extend((1..24).map(|len| vec![Out(vec![0; len]), In(10)]));
    let count = cases.len();
    for (index, request) in cases.into_iter().enumerate() {
        let name = format!("request {index} that lacks something");
        let crate::driver::Verdict::Answered(written, _) = driver.send(0, &request, &name) else {
            panic!("mem: {name}: the device asks for a reset");
        };
        assert_eq!(written, 0, "{name}");
        driver.recover(&name);
    }
    count
}

/// Request, first block, blocks, and the response.
type Asked = (u16, u64, u16, u16);

/// What is plugged already, or not, or would be too much.
fn plugged(driver: &Driver<'_>) -> usize {
    let cases: [(&str, &[Asked]); 8] = [
        ("plugged twice", &[(PLUG, 0, 1, ACK), (PLUG, 0, 1, ERROR)]),
        (
            "plugged in part",
            &[(PLUG, 1, 2, ACK), (PLUG, 0, 2, ERROR), (PLUG, 2, 2, ERROR)],
        ),
        (
            "unplugged without being plugged",
            &[(UNPLUG, 0, 1, ERROR), (UNPLUG, 0, BLOCKS, ERROR)],
        ),
        (
            "unplugged in part",
            &[
                (PLUG, 0, 2, ACK),
                (UNPLUG, 1, 2, ERROR),
                (UNPLUG, 0, 2, ACK),
            ],
        ),
        (
            "more than the host wants",
            &[
                (PLUG, 0, MOST + 1, NACK),
                (PLUG, 0, MOST, ACK),
                (PLUG, 20, 1, NACK),
            ],
        ),
        ("all of the region", &[(PLUG, 0, BLOCKS, NACK)]),
        (
            "all unplugged, twice",
            &[
                (PLUG, 0, 3, ACK),
                (UNPLUG_ALL, 0, 0, ACK),
                (UNPLUG_ALL, 99, 9, ACK),
            ],
        ),
        (
            "one by one",
            &[
                (PLUG, 0, 1, ACK),
                (PLUG, 2, 1, ACK),
                (PLUG, 4, 1, ACK),
                (STATE, 0, 5, ACK),
            ],
        ),
    ];
    for (name, requests) in cases {
        ask(driver, UNPLUG_ALL, REGION, 0, name);
        for (kind, block, blocks, expected) in requests {
            let came = ask(driver, *kind, REGION + block * BLOCK, *blocks, name);
            assert_eq!(came, *expected, "{name}: {kind} of {blocks} from {block}");
        }
        driver.recover(name);
    }
    // Plugged, used and unplugged again and again, it costs the host nothing.
    for _ in 0..8 {
        ask(driver, PLUG, REGION, MOST, "again");
        let touch = Step::write(REGION, 4, 1).times(u32::from(MOST) * 32, 64 << 10);
        driver.puppet().run_one(touch);
        ask(driver, UNPLUG_ALL, REGION, 0, "again");
    }
    // What is not plugged may be touched all the same.
    let touch = Step::write(REGION, 8, u64::MAX).times(2048, 32 << 10);
    assert_eq!(driver.puppet().run_one(touch).faults, 0);
    driver.recover("touched without being plugged");
    cases.len() + 2
}
