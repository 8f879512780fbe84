use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK;

use super::{Mem, MemHandle, MemorySizes};
use crate::virtio::testing::{Buffer, Guest, lifecycle};
use crate::virtio::{DeviceState, GuestRam, Memory};

const START: GuestAddress = GuestAddress(1 << 32);
const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 16;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fn region() -> Memory {
    let len = usize::try_from(BLOCK * BLOCKS).unwrap();
    Memory::new(GuestRam::from_ranges(&[(START, len)]).unwrap())
}

fn mem() -> Mem {
    let mem = Mem::new(region(), START, BLOCK * BLOCKS).unwrap();
    mem.handle().request(4 * BLOCK).unwrap();
    mem
}

fn live() -> (Guest, MemHandle, Memory) {
    let memory = region();
    let mem = Mem::new(memory.clone(), START, BLOCK * BLOCKS).unwrap();
    let handle = mem.handle();
    handle.request(4 * BLOCK).unwrap();
    let mut guest = Guest::live(mem);
    guest.settle();
    guest.interrupts();
    (guest, handle, memory)
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Type and state of the response.
fn ask(guest: &mut Guest, kind: u16, block: u64, count: u16) -> (u16, u16) {
    let out = request(kind, START.0 + block * BLOCK, count);
    let answer = guest
        .request(0, &[Buffer::Out(out), Buffer::In(10)])
        .unwrap();
    let word = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
    (word(0), word(8))
}

fn sizes(requested: u64, plugged: u64) -> MemorySizes {
    MemorySizes {
        requested: requested * BLOCK,
        plugged: plugged * BLOCK,
    }
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let (mut guest, handle, _) = live();
    assert_eq!(ask(&mut guest, PLUG, 1, 3), (0, 0));
    assert_eq!(handle.sizes(), sizes(4, 3));
    assert_eq!(ask(&mut guest, PLUG, 5, 2), (1, 0), "more than requested");
    assert_eq!(ask(&mut guest, PLUG, 3, 1), (3, 0), "plugged already");
    assert_eq!(ask(&mut guest, STATE, 1, 3), (0, 0));
    assert_eq!(ask(&mut guest, STATE, 8, 3), (0, 1));
    assert_eq!(ask(&mut guest, STATE, 0, 3), (0, 2));
    assert_eq!(ask(&mut guest, UNPLUG, 0, 2), (3, 0), "unplugged already");
    assert_eq!(ask(&mut guest, UNPLUG, 2, 2), (0, 0));
    assert_eq!(handle.sizes(), sizes(4, 1));
    assert_eq!(ask(&mut guest, UNPLUG_ALL, 0, 0), (0, 0));
    assert_eq!(handle.sizes(), sizes(4, 0));
}

#[test]
fn what_lies_outside_the_region_is_refused() {
    let (mut guest, handle, _) = live();
    for (block, count) in [(15, 2), (16, 1), (0, 0), (0, 17), (u64::MAX / BLOCK, 1)] {
        let block = block % (u64::MAX / BLOCK - START.0 / BLOCK);
        assert_eq!(
            ask(&mut guest, PLUG, block, count),
            (3, 0),
            "{block} {count}"
        );
    }
    for address in [START.0 + 1, 0, u64::MAX, START.0 - BLOCK] {
        let buffers = [Buffer::Out(request(PLUG, address, 1)), Buffer::In(10)];
        assert_eq!(guest.request(0, &buffers).unwrap()[0], 3, "{address:#x}");
    }
    assert_eq!(ask(&mut guest, 99, 0, 1), (3, 0));
    assert_eq!(handle.sizes(), sizes(4, 0));
}

#[test]
fn a_request_cut_short_or_without_room_for_its_response_changes_nothing() {
    let (mut guest, handle, _) = live();
    let short = [Buffer::Out(vec![0; 23]), Buffer::In(10)];
    assert_eq!(guest.request(0, &short), Some(vec![]));
    let no_room = [Buffer::Out(request(PLUG, START.0, 1)), Buffer::In(9)];
    assert_eq!(guest.request(0, &no_room), Some(vec![]));
    assert_eq!(handle.sizes(), sizes(4, 0));
    assert_eq!(guest.counters().errors.get(), 2);
}

#[test]
fn the_driver_is_told_of_another_size() {
    let (mut guest, handle, _) = live();
    handle.request(6 * BLOCK - 1).unwrap();
    guest.settle();
    assert_eq!(guest.interrupts(), 1);
    let field = |guest: &mut Guest, at| u64::from_le_bytes(guest.config::<8>(at));
    assert_eq!(field(&mut guest, 0), BLOCK);
    assert_eq!(field(&mut guest, 16), START.0);
    assert_eq!(field(&mut guest, 24), BLOCKS * BLOCK);
    assert_eq!(field(&mut guest, 48), 6 * BLOCK);
    handle.request(BLOCKS * BLOCK + 1).unwrap_err();
}

#[test]
fn plugged_memory_is_zero_and_keeps_what_is_written_until_it_is_unplugged() {
    let (mut guest, _, memory) = live();
    let ram = memory.memory();
    let at = GuestAddress(START.0 + BLOCK);
    assert_eq!(ask(&mut guest, PLUG, 1, 1), (0, 0));
    assert_eq!(ram.read_obj::<u64>(at).unwrap(), 0);
    ram.write_obj(7_u64, at).unwrap();
    assert_eq!(ram.read_obj::<u64>(at).unwrap(), 7);
    assert_eq!(ask(&mut guest, UNPLUG, 1, 1), (0, 0));
    assert_eq!(ask(&mut guest, PLUG, 1, 1), (0, 0));
    assert_eq!(ram.read_obj::<u64>(at).unwrap(), 0);
}

#[test]
fn touching_all_of_the_unplugged_region_uses_one_block() {
    let (_guest, _, memory) = live();
    let ram = memory.memory();
    for block in 0..BLOCKS {
        ram.write_obj(block, GuestAddress(START.0 + block * BLOCK))
            .unwrap();
    }
    let first: u64 = ram.read_obj(START).unwrap();
    assert_eq!(first, BLOCKS - 1, "unplugged blocks share their memory");
}

#[test]
fn the_device_lives_through_pause_and_reset() {
    lifecycle(mem, |guest| {
        assert_eq!(ask(guest, UNPLUG_ALL, 0, 0), (0, 0));
        assert_eq!(ask(guest, PLUG, 3, 2), (0, 0));
        assert_eq!(ask(guest, STATE, 3, 2), (0, 0));
    });
}

#[test]
fn what_is_plugged_survives_a_move_and_a_reset() {
    let mut guest = Guest::live(mem());
    assert_eq!(ask(&mut guest, PLUG, 3, 2), (0, 0));
    let state = guest.transport.state();
    let DeviceState::Mem(state) = state.device() else {
        panic!("a state of another kind");
    };
    let plugged = state.plugged(BLOCKS * BLOCK);
    assert_eq!(
        plugged,
        Some(std::iter::once(3 * BLOCK..5 * BLOCK).collect())
    );
    assert_eq!(state.plugged(100 * BLOCKS * BLOCK), None);
    let mut guest = guest.move_to(mem);
    guest.transport.resume().unwrap();
    assert_eq!(ask(&mut guest, STATE, 3, 2), (0, 0));
    guest.start(u64::MAX, 16);
    assert_eq!(ask(&mut guest, STATE, 3, 2), (0, 0));
    assert_eq!(ask(&mut guest, STATE, 2, 1), (0, 1));
}

#[test]
fn a_restored_guest_hears_of_a_size_only_if_it_has_another() {
    for (requested, interrupts) in [(2, 0), (3, 1)] {
        let (mut guest, handle, _) = live();
        handle.request(requested * BLOCK).unwrap();
        guest.settle();
        assert_eq!(ask(&mut guest, PLUG, 3, 2), (0, 0));
        guest.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
        let mut guest = guest.move_to(|| {
            let device = mem();
            device.handle().request(requested * BLOCK).unwrap();
            device
        });
        guest.transport.resume().unwrap();
        guest.settle();
        assert_eq!(guest.interrupts(), interrupts, "{requested}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked, no more is plugged than requested, and the model agrees.
    #[test]
    fn no_guest_gets_more_than_requested(
        steps in prop::collection::vec((0..5u16, 0..20u64, 0..6u16, 0..9u64), 1..40),
    ) {
        let (mut guest, handle, _) = live();
        let mut model = [false; 16];
        for (kind, block, count, target) in steps {
            if kind == 4 {
                handle.request(target * BLOCK).unwrap();
                continue;
            }
            let before = model;
            let (response, _) = ask(&mut guest, kind, block, count);
            let range = usize::try_from(block).unwrap()..usize::try_from(block).unwrap() + usize::from(count);
            match (kind, response) {
                (UNPLUG_ALL, 0) => model = [false; 16],
                (PLUG | UNPLUG, 0) => model[range].fill(kind == PLUG),
                _ => {}
            }
            let count = model.iter().filter(|&&plugged| plugged).count() as u64;
            let MemorySizes { requested, plugged } = handle.sizes();
            prop_assert_eq!(plugged, count * BLOCK);
            prop_assert!(plugged <= requested || model == before || kind != PLUG);
        }
    }
}
