//! Any sequence of requests does to the disk what it does to a model of it.

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Read {
        sector: u64,
        count: u32,
    },
    Write {
        sector: u64,
        count: u32,
        byte: u8,
    },
    Zero {
        sector: u64,
        count: u32,
        unmap: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    // A little beyond the disk, so that some fail.
    let place = || (0..END + 4, 0..6u32);
    prop_oneof![
        place().prop_map(|(sector, count)| Op::Read { sector, count }),
        (place(), any::<u8>()).prop_map(|((sector, count), byte)| Op::Write {
            sector,
            count,
            byte
        }),
        (place(), any::<bool>()).prop_map(|((sector, count), unmap)| Op::Zero {
            sector,
            count,
            unmap
        }),
    ]
}

/// Where the range lies in the model, if inside.
fn place(model: &mut [u8], sector: u64, count: u32) -> Option<&mut [u8]> {
    let (start, len) = (usize::try_from(sector).ok()? * 512, count as usize * 512);
    model.get_mut(start..start + len)
}

fn expected(place: Option<&mut [u8]>, change: impl FnOnce(&mut [u8])) -> u8 {
    place.map_or(IOERR, |bytes| {
        change(bytes);
        OK
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_sequence_of_requests_leaves_disk_and_model_alike(ops in prop::collection::vec(op(), 1..40)) {
        let image = image();
        let mut model = fs::read(image.as_path()).unwrap();
        let mut guest = disk(&image);
        for op in ops {
            match op {
                Op::Read { sector, count } => {
                    let (got, bytes) = ask(&mut guest, IN, sector, &[Buffer::In(count * 512)]);
                    let mut want = vec![0; count as usize * 512];
                    let status = expected(place(&mut model, sector, count), |bytes| want.copy_from_slice(bytes));
                    prop_assert_eq!((got, bytes), (status, want));
                }
                Op::Write { sector, count, byte } => {
                    let data = vec![byte; count as usize * 512];
                    let got = status(&mut guest, OUT, sector, &[Buffer::Out(data)]);
                    let want = expected(place(&mut model, sector, count), |bytes| bytes.fill(byte));
                    prop_assert_eq!(got, want);
                }
                Op::Zero { sector, count, unmap } => {
                    let ranges = range(sector, count, unmap.into());
                    let got = status(&mut guest, WRITE_ZEROES, 0, &[Buffer::Out(ranges)]);
                    let want = expected(place(&mut model, sector, count), |bytes| bytes.fill(0));
                    prop_assert_eq!(got, want);
                }
            }
        }
        prop_assert_eq!(fs::read(image.as_path()).unwrap(), model);
    }
}
