//! The balloon, with all the queues that it can have.

use crate::driver::{BUFFERS, Buffer, CONFIG, Driver, LARGE, LARGE_BYTES, Subject};
use crate::rig::RAM_BYTES;
use crate::suite;

use Buffer::{InAt, Out, OutAt};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const REPORTING: u16 = 3;

#[derive(Debug)]
pub(crate) struct Balloon;

impl Subject for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn id(&self) -> u32 {
        5
    }

    fn queues(&self) -> u16 {
        4
    }

    /// Statistics and reports of free pages.
    fn features(&self) -> u64 {
        1 << 1 | 1 << 5
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let ram = &driver.puppet().ram;
        ram.write(LARGE, &[0x77; 4096]);
        let number = page(LARGE).to_le_bytes().to_vec();
        driver
            .send(INFLATE, &[Out(number.clone())], after)
            .answer(after);
        assert_eq!(
            ram.bytes(LARGE, 4096),
            [0; 4096],
            "{after}: it was not taken"
        );
        driver.send(DEFLATE, &[Out(number)], after).answer(after);
        ram.write(LARGE, &[0x77; 4096]);
        driver
            .send(REPORTING, &[InAt(LARGE, 4096)], after)
            .answer(after);
        assert_eq!(
            ram.bytes(LARGE, 4096),
            [0; 4096],
            "{after}: it was not taken"
        );
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (INFLATE, vec![Out(page(LARGE).to_le_bytes().to_vec())])
    }

    fn looked_at(&self) -> Vec<u16> {
        vec![INFLATE, DEFLATE, REPORTING]
    }
}

fn page(address: u64) -> u32 {
    u32::try_from(address >> 12).expect("it is below 16 TiB")
}

fn numbers(numbers: &[u32]) -> Vec<Buffer> {
    vec![Out(numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect())]
}

pub(crate) fn options() -> Vec<String> {
    let balloon = "size=1M,deflate_on_oom=on,free_page_reporting=on";
    vec!["--balloon".into(), balloon.into()]
}

#[test]
fn the_balloon() {
    suite::run(
        |_| options(),
        &Balloon,
        |driver| pages(driver) + reports(driver) + statistics(driver) + configuration(driver),
    );
}

/// Page numbers that are outside RAM, or many, or what the queues themselves are in.
fn pages(driver: &Driver<'_>) -> usize {
    let rings = page(Driver::areas(INFLATE)[0]);
    let end = page(RAM_BYTES);
    let cases: [(&str, Vec<Buffer>); 17] = [
        ("no number", vec![Out(Vec::new())]),
        ("three bytes", vec![Out(vec![0; 3])]),
        ("a number and a half", vec![Out(vec![0xff; 6])]),
        ("the page behind RAM", numbers(&[end])),
        ("the last number", numbers(&[u32::MAX])),
        (
            "the last numbers",
            numbers(&[u32::MAX, u32::MAX - 1, 0xffff_0000]),
        ),
        ("a page of a window", numbers(&[page(0xc000_0000)])),
        ("the local APIC's page", numbers(&[page(0xfee0_0000)])),
        (
            "pages across the end of RAM",
            numbers(&[end - 1, end, end + 1]),
        ),
        ("one page a hundred times", numbers(&[page(LARGE); 100])),
        (
            "pages and none in turn",
            numbers(&[page(LARGE), u32::MAX, page(LARGE) + 1, end].repeat(60)),
        ),
        (
            "pages backwards",
            numbers(
                &(0..500)
                    .rev()
                    .map(|at| page(LARGE) + at)
                    .collect::<Vec<_>>(),
            ),
        ),
        ("64 KiB of numbers", vec![OutAt(LARGE, 64 << 10)]),
        (
            "more than 64 KiB of numbers",
            vec![OutAt(LARGE, (64 << 10) + 4)],
        ),
        ("32 MiB of numbers", vec![OutAt(LARGE, 32 << 20)]),
        ("room for numbers", vec![InAt(LARGE, 4096)]),
        ("the numbers' own page", numbers(&[page(BUFFERS)])),
    ];
    let mut count = 0;
    for queue in [INFLATE, DEFLATE] {
        for (name, request) in &cases {
            // Of the numbers' own page nothing remains to be compared.
            driver.lay(queue, request);
            driver.publish(queue, 0);
            assert!(driver.kick_and_await(queue, 1, name), "{name}");
            driver.recover(name);
            count += 1;
        }
        // The device gives away what it reads: it finds zeros, or goes on.
        for area in 0..3 {
            let name = "the queue's own pages";
            driver.lay(queue, &numbers(&[rings + [0, 5, 8][area]]));
            driver.publish(queue, 0);
            driver.kick(queue);
            driver.rig.client();
            driver.start();
            driver.subject.good(driver, name);
            count += 1;
        }
    }
    count
}

fn reports(driver: &Driver<'_>) -> usize {
    let cases: [(&str, Vec<Buffer>); 7] = [
        ("a report of a byte", vec![InAt(LARGE, 1)]),
        ("a report of less than a page", vec![InAt(LARGE + 1, 4096)]),
        ("a report across pages", vec![InAt(LARGE + 1, 3 * 4096)]),
        ("a report of 32 MiB", vec![InAt(LARGE, 32 << 20)]),
        ("one page in eight", vec![InAt(LARGE, 4096); 8]),
        ("a report that is readable", vec![OutAt(LARGE, 4096)]),
        (
            "the last page of RAM",
            vec![InAt(LARGE + LARGE_BYTES - 4096, 4096)],
        ),
    ];
    let count = cases.len();
    for (name, request) in cases {
        driver.send(REPORTING, &request, name).answer(name);
        driver.recover(name);
    }
    count
}

/// The buffer stays with the device until that wants another.
fn statistics(driver: &Driver<'_>) -> usize {
    let cases: [(&str, Vec<Buffer>); 7] = [
        ("no statistics", vec![Out(Vec::new())]),
        ("a statistic of five bytes", vec![Out(vec![0; 5])]),
        ("statistics that do not exist", vec![Out(vec![0xff; 100])]),
        ("one statistic a thousand times", vec![Out(vec![0; 10_000])]),
        ("32 MiB of statistics", vec![OutAt(LARGE, 32 << 20)]),
        ("room for statistics", vec![InAt(LARGE, 4096)]),
        (
            "two buffers of statistics",
            vec![Out(vec![1; 10]), Out(vec![2; 10])],
        ),
    ];
    let count = cases.len();
    for (name, request) in cases {
        for _ in 0..2 {
            driver.lay(STATISTICS, &request);
            driver.publish(STATISTICS, 0);
            driver.kick(STATISTICS);
        }
        driver.rig.client();
        driver.recover(name);
        driver.start();
    }
    count
}

/// Writes of `actual` in all widths and places.
fn configuration(driver: &Driver<'_>) -> usize {
    let mut count = 0;
    for offset in 0..16 {
        for width in [1, 2, 4, 8] {
            let at = CONFIG + offset;
            let write = driver.register(at, u64::MAX).width(width);
            driver.puppet().run(&[write, driver.read(at).width(width)]);
            count += 1;
        }
        driver.recover("writes of the configuration space");
    }
    assert_eq!(
        driver.get(CONFIG),
        256,
        "the device says how many pages it wants"
    );
    count
}
