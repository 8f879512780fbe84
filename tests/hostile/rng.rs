//! The entropy device.

use crate::driver::{Buffer, Driver, LARGE};
use crate::suite;

#[derive(Debug)]
pub(crate) struct Rng;

impl crate::driver::Subject for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u32 {
        4
    }

    fn queues(&self) -> u16 {
        1
    }

    fn good(&self, driver: &Driver<'_>, after: &str) {
        let bytes = driver.send(0, &[Buffer::In(32)], after).answer(after);
        assert_ne!(bytes, [0xa5; 32], "rng: {after}: nothing was written");
    }

    fn request(&self) -> (u16, Vec<Buffer>) {
        (0, vec![Buffer::In(32)])
    }
}

#[test]
fn the_entropy_device() {
    suite::run(|_| Vec::new(), &Rng, requests);
}

/// Requests that are well-formed chains, and how many bytes may be said to be written.
fn requests(driver: &Driver<'_>) -> usize {
    use Buffer::{In, InAt, Out, OutAt};
    let cases: [(&str, Vec<Buffer>, u32); 9] = [
        ("nothing to write", vec![Out(vec![1; 16])], 0),
        ("one byte", vec![In(1)], 1),
        ("both", vec![Out(vec![1; 16]), In(7)], 7),
        ("eight bytes in eight", vec![In(1); 8], 8),
        ("more than it gives", vec![InAt(LARGE, 1 << 20)], 64 << 10),
        ("32 MiB", vec![InAt(LARGE, 32 << 20)], 64 << 10),
        (
            "the same page many times",
            vec![InAt(LARGE, 4096); 8],
            32 << 10,
        ),
        ("all RAM to read", vec![OutAt(0, 64 << 20)], 0),
        (
            "much to read, and one byte",
            vec![OutAt(0, 64 << 20), In(1)],
            1,
        ),
    ];
    let count = cases.len();
    for (name, request, most) in cases {
        let crate::driver::Verdict::Answered(written, _) = driver.send(0, &request, name) else {
            panic!("rng: {name}: the device asks for a reset");
        };
        assert_eq!(written, most, "rng: {name}");
        driver.recover(name);
    }
    count
}
