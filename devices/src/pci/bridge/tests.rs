use proptest::prelude::*;

use super::*;
use crate::pci::COMMAND;

const WINDOW: Range<u64> = 0xe000_0000..0xe010_0000;
const LEN: u64 = 0x8000;

/// A function that remembers where it is, and reads as its number.
#[derive(Debug)]
struct Probe {
    number: u8,
    /// By which it is on the bus.
    device: Option<u8>,
    config: ConfigSpace,
    at: Option<u64>,
    moves: usize,
}

impl BusDevice for Probe {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.number);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

impl Function for Probe {
    fn read_config(&mut self, register: usize) -> u32 {
        self.config.read(register)
    }

    fn write_config(&mut self, register: usize, value: u32, mask: u32) {
        self.config.write(register, value, mask);
    }

    fn bar_len(&self) -> u64 {
        LEN
    }

    fn wanted(&self) -> Option<u64> {
        self.config.memory()
    }

    fn moved(&mut self, address: Option<u64>) {
        assert!(
            address.is_none() || self.at.is_none(),
            "it is taken away first"
        );
        self.at = address;
        self.moves += 1;
    }

    fn placed(&mut self, device: Option<u8>) {
        self.device = device;
    }
}

struct Bench {
    bridge: Bridge,
    memory: Arc<Bus>,
    probes: Vec<Arc<Mutex<Probe>>>,
}

fn probe(number: u8) -> Arc<Mutex<Probe>> {
    let identity = Identity {
        vendor: 0x1af4,
        device: 0x1040 + u16::from(number),
        ..IDENTITY
    };
    Arc::new(Mutex::new(Probe {
        number,
        device: None,
        config: ConfigSpace::new(identity).with_bar(u32::try_from(LEN).unwrap()),
        at: None,
        moves: 0,
    }))
}

fn line() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

fn bench(count: u8) -> Bench {
    let memory = Arc::new(Bus::new());
    let mut bridge = Bridge::new(memory.clone(), WINDOW, line());
    let probes: Vec<_> = (1..=count).map(probe).collect();
    for probe in &probes {
        bridge.add(probe.clone(), None).unwrap();
    }
    Bench {
        bridge,
        memory,
        probes,
    }
}

impl Bench {
    fn select(&mut self, device: u32, register: usize) {
        let register = u32::try_from(register * 4).unwrap();
        let address = 1 << 31 | device << 11 | register;
        self.bridge.write(0, &address.to_le_bytes());
    }

    fn read(&mut self, device: u32, register: usize) -> u32 {
        self.select(device, register);
        let mut data = [0; 4];
        self.bridge.read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, device: u32, register: usize, value: u32) {
        self.select(device, register);
        self.bridge.write(DATA, &value.to_le_bytes());
    }

    /// Who answers at an address.
    fn answers(&self, address: u64) -> Option<u8> {
        let mut data = [0];
        self.memory.read(address, &mut data).then_some(data[0])
    }

    fn places(&self) -> Vec<Option<u64>> {
        let at = |probe: &Arc<Mutex<Probe>>| probe.lock().unwrap().at;
        self.probes.iter().map(at).collect()
    }
}

#[test]
fn a_kernel_finds_the_bridge_as_linux_looks_for_it() {
    let mut bench = bench(1);
    // arch/x86/pci/direct.c, pci_check_type1.
    bench.bridge.write(3, &[1]);
    let mut before = [0; 4];
    bench.bridge.read(0, &mut before);
    assert_eq!(before, [0; 4], "a byte is no access to the address");
    bench.bridge.write(0, &0x8000_0000_u32.to_le_bytes());
    let mut address = [0; 4];
    bench.bridge.read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
    assert_eq!(bench.read(0, 2) >> 16, 0x0600);
    assert_eq!(bench.read(0, 3) >> 16, 0, "each device has one function");
}

#[test]
fn what_is_not_there_reads_as_ones() {
    let mut bench = bench(1);
    assert_eq!(bench.read(1, 0), 0x1041_1af4);
    let absent = [
        1 << 31 | 2 << 11,
        1 << 31 | 31 << 11,
        1 << 31 | 1 << 11 | 1 << 8,
        1 << 31 | 1 << 16 | 1 << 11,
        1 << 11,
    ];
    for address in absent {
        bench.bridge.write(0, &u32::to_le_bytes(address));
        let mut data = [0; 4];
        bench.bridge.read(DATA, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}");
        bench.bridge.write(DATA, &[0; 4]);
    }
}

#[test]
fn the_window_takes_every_width_at_every_offset() {
    let mut bench = bench(1);
    bench.select(1, 0);
    let whole = 0x1041_1af4_u32.to_le_bytes();
    for offset in 0..8_u64 {
        for len in 1..=8_usize {
            let mut data = vec![0; len];
            bench.bridge.read(offset, &mut data);
            let start = usize::try_from(offset).unwrap();
            let expected = match start.checked_sub(4) {
                Some(start) if start + len <= 4 => whole[start..start + len].to_vec(),
                None if (offset, len) == (0, 4) => vec![0, 8, 0, 0x80],
                _ => vec![0xff; len],
            };
            assert_eq!(data, expected, "{len} bytes at {offset}");
        }
    }
    // The bytes of the command alone.
    bench.select(1, COMMAND);
    bench.bridge.write(DATA + 1, &[0xff]);
    assert_eq!(bench.read(1, COMMAND) & 0xffff, 0x400);
    bench.select(1, COMMAND);
    bench.bridge.write(DATA, &[0x02]);
    assert_eq!(bench.read(1, COMMAND) & 0xffff, 0x402);
}

#[test]
fn a_bar_answers_where_it_is_moved_to_while_it_is_to() {
    let mut bench = bench(2);
    let first = bench.read(1, BAR);
    assert_eq!([first, bench.read(2, BAR)], [0xe000_8000, 0xe001_0000]);
    assert_eq!(bench.answers(first.into()), None, "memory is off");
    bench.write(1, COMMAND, 2);
    bench.write(2, COMMAND, 2);
    assert_eq!(
        [bench.answers(0xe000_8000), bench.answers(0xe001_7fff)],
        [Some(1), Some(2)]
    );
    bench.write(1, BAR, 0xe008_0000);
    assert_eq!(
        [bench.answers(0xe000_8000), bench.answers(0xe008_0000)],
        [None, Some(1)]
    );
    bench.write(1, COMMAND, 0);
    assert_eq!(bench.answers(0xe008_0000), None);
    let moves = bench.probes[0].lock().unwrap().moves;
    bench.write(1, COMMAND, 0);
    assert_eq!(bench.probes[0].lock().unwrap().moves, moves);
}

#[test]
fn of_two_bars_at_one_place_the_lower_device_answers() {
    let mut bench = bench(3);
    (1..=3).for_each(|device| bench.write(device, COMMAND, 2));
    bench.write(1, BAR, 0xe001_0000);
    assert_eq!(bench.answers(0xe001_0000), Some(1));
    assert_eq!(bench.places(), [Some(0xe001_0000), None, Some(0xe001_8000)]);
    bench.write(1, BAR, 0xe000_0000);
    assert_eq!(
        bench.answers(0xe001_0000),
        Some(2),
        "its place is free again"
    );
}

#[test]
fn a_bar_outside_the_window_answers_nowhere() {
    let mut bench = bench(1);
    let window: Arc<Mutex<dyn BusDevice>> = probe(9);
    bench.memory.insert(0xc000_0000, 0x1000, window).unwrap();
    bench.write(1, COMMAND, 2);
    for start in [
        0,
        0x10_0000,
        0xc000_0000,
        0xdfff_8000,
        0xe010_0000,
        0xfee0_0000,
        0xffff_8000,
    ] {
        bench.write(1, BAR, start);
        assert_eq!(bench.places(), [None], "{start:#x}");
        assert_eq!(bench.answers(0xc000_0000), Some(9));
    }
    bench.write(1, BAR, 0xe00f_8000);
    assert_eq!(bench.places(), [Some(0xe00f_8000)]);
}

#[test]
fn a_full_bus_takes_no_more() {
    let mut bench = bench(31);
    assert_eq!(bench.bridge.add(probe(0), None), Err(AddError::Full));
    assert_eq!(bench.read(31, 0) >> 16, 0x1040 + 31);
}

#[test]
fn devices_come_to_the_lowest_place_or_the_one_that_they_had() {
    let mut bench = bench(3);
    bench.bridge.remove(2);
    assert_eq!(bench.bridge.add(probe(7), Some(9)), Ok(9));
    for taken in [0, 1, 9, 32, 255] {
        let refused = bench.bridge.add(probe(0), Some(taken));
        assert_eq!(refused, Err(AddError::Place(taken)));
    }
    let again = probe(8);
    assert_eq!(bench.bridge.add(again.clone(), None), Ok(2));
    assert_eq!(again.lock().unwrap().device, Some(2));
    bench.bridge.remove(2);
    assert_eq!(again.lock().unwrap().device, None);
    bench.bridge.add(again, None).unwrap();
    assert_eq!(
        [bench.read(2, BAR), bench.read(9, BAR)],
        [0xe001_0000, 0xe004_8000]
    );
    assert_eq!(bench.read(9, 0) >> 16, 0x1047);
}

#[test]
fn a_device_that_is_removed_is_reached_no_more_and_makes_room() {
    let mut bench = bench(3);
    (1..=3).for_each(|device| bench.write(device, COMMAND, 2));
    bench.write(2, BAR, 0xe000_8000);
    assert_eq!(bench.places(), [Some(0xe000_8000), None, Some(0xe001_8000)]);
    bench.bridge.remove(1);
    assert_eq!(bench.places(), [None, Some(0xe000_8000), Some(0xe001_8000)]);
    assert_eq!(bench.read(1, 0), u32::MAX);
    bench.write(1, COMMAND, 2);
    bench.bridge.remove(1);
    bench.bridge.remove(3);
    assert_eq!(bench.answers(0xe001_8000), None);
    assert_eq!(Arc::strong_count(&bench.probes[2]), 1, "nothing keeps it");
}

#[test]
fn a_bar_that_has_no_room_in_a_devices_part_is_refused() {
    let mut bridge = Bridge::new(
        Arc::new(Bus::new()),
        WINDOW.start..WINDOW.start + 0x8_0000,
        line(),
    );
    assert_eq!(bridge.add(probe(1), None), Err(AddError::Large(LEN)));
}

#[test]
fn a_bridge_goes_on_where_another_one_was() {
    let mut first = bench(2);
    first.write(2, COMMAND, 2);
    first.write(2, BAR, 0xe004_0000);
    let state = first.bridge.state();
    let mut second = bench(2);
    for (from, to) in first.probes.iter().zip(&second.probes) {
        to.lock().unwrap().config = from.lock().unwrap().config.clone();
    }
    second.bridge.restore(state);
    assert_eq!(second.places(), first.places());
    assert_eq!(second.bridge.state(), state);
    let mut data = [0; 4];
    second.bridge.read(DATA, &mut data);
    assert_eq!(
        u32::from_le_bytes(data),
        0xe004_0000,
        "the address is selected"
    );
}

proptest! {
    #[test]
    fn any_writes_leave_each_bar_in_the_window_and_alone(
        writes in prop::collection::vec(
            (0..9_u64, prop::collection::vec(any::<u8>(), 0..6), 0..5_u32, 0..16_u32, 0..40_u32),
            0..60,
        )
    ) {
        let mut bench = bench(4);
        for (offset, data, device, register, page) in writes {
            bench.bridge.write(offset, &data);
            bench.bridge.read(offset, &mut data.clone());
            let register = if register < 8 { BAR } else { COMMAND };
            let value = if register == BAR { 0xdfff_0000 + page * 0x4000 } else { page };
            bench.write(device, register, value);
            let mut places: Vec<_> = bench.places().into_iter().flatten().collect();
            places.sort_unstable();
            for place in &places {
                prop_assert!(WINDOW.start <= *place && place + LEN <= WINDOW.end);
            }
            prop_assert!(places.windows(2).all(|two| two[0] + LEN <= two[1]));
            for (number, place) in (1..).zip(bench.places()) {
                if let Some(place) = place {
                    prop_assert_eq!(bench.answers(place), Some(number));
                }
            }
        }
    }
}
