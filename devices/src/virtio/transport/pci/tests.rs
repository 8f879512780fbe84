//! The transport as a driver sees it, good or bad.

use proptest::prelude::*;

use super::*;
use crate::pci::testing::Recorder;
use crate::pci::{BAR, COMMAND};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Buffer, Guest, LIVE, Plug, Wiring};

const MSIX: usize = 16;
const CAPABILITIES: usize = 13;

fn guest() -> Guest {
    let mut guest = Guest::new_on(Wiring::Pci, Rng::new());
    guest.start(u64::MAX, 16);
    guest
}

fn parts(guest: &mut Guest) -> (&mut PciTransport, Arc<Recorder>) {
    match &mut guest.transport {
        Plug::Pci(transport, host) => (transport, host.clone()),
        Plug::Mmio(_) => panic!("it is on PCI"),
    }
}

fn get<const N: usize>(guest: &mut Guest, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    parts(guest).0.read(offset, &mut data);
    data
}

fn put(guest: &mut Guest, offset: u64, data: &[u8]) {
    parts(guest).0.write(offset, data);
}

fn bad(guest: &Guest) -> u64 {
    guest.counters().bad_accesses.get()
}

#[test]
fn a_driver_walks_the_capabilities_as_linux_does() {
    let mut guest = Guest::new_on(Wiring::Pci, Rng::new());
    let (transport, _) = parts(&mut guest);
    assert_eq!(transport.read_config(0), 0x1044_1af4);
    assert_eq!(transport.read_config(2) & 0xff, 1, "its revision");
    assert_eq!(transport.read_config(3) >> 16 & 0xff, 0, "a type 0 header");
    assert_eq!(transport.read_config(15) >> 8 & 0xff, 0, "no INTx");
    let mut found = Vec::new();
    let mut next = transport.read_config(CAPABILITIES) & 0xfc;
    while next != 0 {
        let first = usize::try_from(next / 4).unwrap();
        let [id, link, len, kind] = transport.read_config(first).to_le_bytes();
        if id == 9 {
            let word = |at| transport.config.read(first + at);
            found.push((kind, len, word(1), word(2), word(3)));
        }
        next = link.into();
    }
    let expected = [
        (1, 16, 0, 0, 0x38),
        (3, 16, 0, 0x1000, 1),
        (4, 16, 0, 0x2000, 0x1000),
        (2, 20, 0, 0x3000, 0x1000),
        (5, 20, 0, 0, 0),
    ];
    assert_eq!(found, expected);
}

#[test]
fn registers_take_their_own_width_alone() {
    let mut guest = guest();
    let before = bad(&guest);
    assert_eq!(get(&mut guest, 0x12), [1, 0], "it has one queue");
    assert_eq!(get(&mut guest, 0x14), [u8::try_from(LIVE).unwrap()]);
    assert_eq!(get(&mut guest, 0x20), 0x1_0000_u64.to_le_bytes());
    assert_eq!(bad(&guest), before);
    for (offset, len) in [
        (0x14, 4),
        (0x12, 4),
        (0x21, 4),
        (0x38, 2),
        (0x1000, 4),
        (0x3000, 2),
        (0x7000, 4),
    ] {
        parts(&mut guest).0.read(offset, &mut vec![0; len]);
    }
    for (offset, len) in [
        (0x14, 2),
        (0x04, 4),
        (0x12, 2),
        (0x1000, 1),
        (0x5000, 8),
        (0x6000, 4),
        (0x3002, 2),
    ] {
        put(&mut guest, offset, &vec![0; len]);
    }
    assert_eq!(bad(&guest), before + 14);
    assert_eq!(guest.status(), LIVE);
}

#[test]
fn a_queue_has_what_the_driver_has_written_until_it_is_enabled() {
    let mut guest = Guest::new_on(Wiring::Pci, Rng::new());
    guest.negotiate(u64::MAX);
    assert_eq!(get(&mut guest, 0x18), [16, 0], "its largest size");
    put(&mut guest, 0x18, &[8, 0]);
    put(&mut guest, 0x20, &0x1234_5678_9abc_def0_u64.to_le_bytes());
    assert_eq!(get(&mut guest, 0x18), [8, 0]);
    assert_eq!(get(&mut guest, 0x24), 0x1234_5678_u32.to_le_bytes());
    put(&mut guest, 0x1c, &[1, 0]);
    put(&mut guest, 0x1c, &[0, 0]);
    put(&mut guest, 0x18, &[16, 0]);
    assert_eq!(get(&mut guest, 0x1c), [1, 0], "only a reset disables it");
    assert_eq!(get(&mut guest, 0x18), [8, 0]);
    put(&mut guest, 0x16, &[1, 0]);
    assert_eq!(get(&mut guest, 0x18), [0, 0], "there is no other queue");
    assert_eq!(get(&mut guest, 0x1e), [1, 0]);
}

#[test]
fn vectors_that_do_not_exist_are_none() {
    let mut guest = guest();
    assert_eq!(get(&mut guest, 0x10), [0, 0]);
    assert_eq!(get(&mut guest, 0x1a), [1, 0]);
    put(&mut guest, 0x1a, &[2, 0]);
    assert_eq!(get(&mut guest, 0x1a), [0xff, 0xff]);
    put(&mut guest, 0x16, &[9, 0]);
    put(&mut guest, 0x1a, &[0, 0]);
    assert_eq!(
        get(&mut guest, 0x1a),
        [0xff, 0xff],
        "there is no such queue"
    );
    guest.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(get(&mut guest, 0x10), [0xff, 0xff], "a reset forgets them");
}

#[test]
fn each_queue_sends_its_own_message_and_the_configuration_another() {
    let mut guest = guest();
    guest.request(0, &[Buffer::In(8)]).unwrap();
    let (transport, host) = parts(&mut guest);
    let sent = |host: &Recorder, vector: u16| host.record().events[&vector].read().unwrap_or(0);
    assert_eq!([sent(&host, 0), sent(&host, 1)], [0, 1]);
    transport.controls.session.interrupt.notify_config();
    assert_eq!([sent(&host, 0), sent(&host, 1)], [1, 0]);
    assert_eq!(host.record().messages.len(), 2);
}

#[test]
fn the_isr_status_says_why_and_is_cleared_when_it_is_read() {
    let mut guest = guest();
    guest.request(0, &[Buffer::In(8)]).unwrap();
    parts(&mut guest)
        .0
        .controls
        .session
        .interrupt
        .notify_config();
    assert_eq!(get(&mut guest, 0x1000), [3]);
    assert_eq!(get(&mut guest, 0x1000), [0]);
    // Without MSI-X the status register has it, too.
    guest.request(0, &[Buffer::In(8)]).unwrap();
    let (transport, _) = parts(&mut guest);
    assert_eq!(transport.read_config(COMMAND) >> 19 & 1, 0);
    transport.write_config(MSIX, 0, 0xffff_0000);
    assert_eq!(transport.read_config(COMMAND) >> 19 & 1, 1);
    assert_eq!(guest.interrupts(), 0, "there are no messages");
}

#[test]
fn notifications_are_watched_where_the_bar_is() {
    let mut guest = guest();
    let (transport, host) = parts(&mut guest);
    let watched = || host.record().watched.keys().copied().collect::<Vec<_>>();
    assert_eq!(watched(), [0xe000_3000]);
    transport.moved(None);
    assert!(watched().is_empty());
    transport.moved(Some(0xe010_0000));
    assert_eq!(watched(), [0xe010_3000]);
    // One that the host did not take is as good.
    guest.add(0, &[Buffer::In(4)]).unwrap();
    put(&mut guest, 0x3000, &[0, 0]);
    guest.settle();
    assert_eq!(guest.take(0).unwrap().len(), 4);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let mut guest = guest();
    let (transport, _) = parts(&mut guest);
    let first = transport.config.read(CAPABILITIES);
    assert_eq!(first, 0x40);
    // The last capability, behind MSI-X and four others of virtio.
    let at = 16 + 3 + 4 + 4 + 4 + 5;
    assert_eq!(transport.read_config(at).to_le_bytes()[3], 5);
    let mut access = |bar: u32, offset: u32, len: u32| {
        transport.write_config(at + 1, bar, 0xff);
        transport.write_config(at + 2, offset, u32::MAX);
        transport.write_config(at + 3, len, u32::MAX);
        transport.read_config(at + 4)
    };
    assert_eq!(access(0, 0x14, 1), LIVE);
    assert_eq!(access(0, 0x12, 2), 1);
    assert_eq!(access(0, 0x20, 4), 0x1_0000);
    for (bar, offset, len) in [
        (1, 0x14, 1),
        (0, 0x8000, 4),
        (0, 0x7ffe, 4),
        (0, 1, 2),
        (0, 0, 3),
        (0, u32::MAX, 4),
        (0, 0, 0),
    ] {
        access(bar, offset, len);
    }
    access(0, 0x14, 1);
    transport.write_config(at + 4, 0, u32::MAX);
    assert_eq!(guest.status(), 0, "a reset");
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let state = guest().transport.state();
    let refusal = |spoil: &dyn Fn(&mut PciState)| {
        let mut state = state.clone();
        spoil(state.pci.as_mut().unwrap());
        let mut guest = Guest::new_on(Wiring::Pci, Rng::new());
        guest.transport.restore(state).unwrap_err().to_string()
    };
    let why = StateError::Pci.to_string();
    assert_eq!(refusal(&|pci| pci.registers[0] ^= 1), why);
    assert_eq!(refusal(&|pci| pci.registers.truncate(63)), why);
    assert_eq!(refusal(&|pci| pci.vectors.0 = 2), why);
    assert_eq!(refusal(&|pci| pci.vectors.1.push(0)), why);
    assert_eq!(refusal(&|pci| pci.table.truncate(1)), why);
    let other = StateError::Transport.to_string();
    let mut guest = Guest::new(Rng::new());
    assert_eq!(
        guest.transport.restore(state).unwrap_err().to_string(),
        other
    );
    let mmio = Guest::live(Rng::new()).transport.state();
    let mut guest = Guest::new_on(Wiring::Pci, Rng::new());
    assert_eq!(
        guest.transport.restore(mmio).unwrap_err().to_string(),
        other
    );
}

#[test]
fn messages_come_again_after_a_restore() {
    let mut guest = guest();
    guest.request(0, &[Buffer::In(8)]).unwrap();
    assert_eq!(guest.interrupts(), 1);
    let mut guest = guest.move_to(Rng::new);
    guest.transport.resume().unwrap();
    assert_eq!(guest.interrupts(), 1, "one may have been on its way");
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!(guest.interrupts(), 0);
}

proptest! {
    #[test]
    fn any_accesses_of_bar_and_configuration_space_are_survived(
        accesses in prop::collection::vec(
            (0..0x8100_u64, prop::collection::vec(any::<u8>(), 0..17), 0..70_usize, any::<u32>(), any::<u32>()),
            0..80,
        )
    ) {
        let mut guest = guest();
        for (offset, data, register, value, mask) in accesses {
            let (transport, _) = parts(&mut guest);
            transport.write_config(register, value, mask);
            transport.read_config(register);
            transport.write(offset % 0x40, &data);
            transport.write(offset, &data);
            transport.read(offset, &mut data.clone());
            prop_assert_eq!(transport.read_config(0), 0x1044_1af4);
            prop_assert_eq!(transport.read_config(BAR) & 0x7fff, 0);
        }
        let (transport, _) = parts(&mut guest);
        transport.write_config(BAR, 0xe000_0000, u32::MAX);
        transport.moved(None);
        guest.start(u64::MAX, 16);
        prop_assert_eq!(guest.status(), LIVE);
        prop_assert_eq!(guest.request(0, &[Buffer::In(8)]).unwrap().len(), 8);
    }
}
