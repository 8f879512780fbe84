//! General and system registers at the moment a kernel is entered.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::Entry;
use super::layout::{GDT_START, PAGE_TABLES_START, PVH_INFO_START, ZERO_PAGE_START};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads 1.
const RFLAGS_RESERVED: u64 = 2;

const PAGE_PRESENT_WRITABLE: u64 = 0x3;
const PAGE_2_MIB: u64 = 1 << 7;

/// Selectors the 64-bit boot protocol requires: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// General registers at `entry`.
pub(super) fn general(entry: Entry) -> kvm_regs {
    let regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        // The PVH boot protocol: EBX holds the address of hvm_start_info.
        Entry::Pvh(start) => kvm_regs {
            rip: start.raw_value(),
            rbx: PVH_INFO_START.raw_value(),
            ..regs
        },
        // Linux x86 boot protocol, "64-bit Boot Protocol": RSI holds the zero page.
        Entry::Linux64(start) => kvm_regs {
            rip: start.raw_value(),
            rsi: ZERO_PAGE_START.raw_value(),
            ..regs
        },
    }
}

/// System registers at `entry`, on top of what KVM set (`reset`).
pub(super) fn system(entry: Entry, reset: kvm_sregs) -> kvm_sregs {
    let long_mode = matches!(entry, Entry::Linux64(_));
    let mut sregs = reset;
    sregs.cs = segment(
        CODE,
        if long_mode {
            Kind::Code64
        } else {
            Kind::Code32
        },
    );
    let data = segment(DATA, Kind::Data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, Kind::Task);
    sregs.gdt.base = GDT_START.raw_value();
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long_mode {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = PAGE_TABLES_START.raw_value();
        sregs.cr4 = CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    sregs
}

/// Writes the tables that [`system`] points at: the GDT, and for the 64-bit
/// boot protocol page tables that map the first GiB onto itself.
pub(super) fn write_tables(entry: Entry, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let code = if matches!(entry, Entry::Linux64(_)) {
        Kind::Code64
    } else {
        Kind::Code32
    };
    let kinds = [(CODE, code), (DATA, Kind::Data), (TASK, Kind::Task)];
    for (selector, kind) in kinds {
        let at = GDT_START.unchecked_add(u64::from(selector));
        memory.write_obj(descriptor(&segment(selector, kind)), at)?;
    }
    if matches!(entry, Entry::Linux64(_)) {
        write_page_tables(memory)?;
    }
    Ok(())
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pdpt = PAGE_TABLES_START.unchecked_add(0x1000);
    let directory = PAGE_TABLES_START.unchecked_add(0x2000);
    memory.write_obj(pdpt.raw_value() | PAGE_PRESENT_WRITABLE, PAGE_TABLES_START)?;
    memory.write_obj(directory.raw_value() | PAGE_PRESENT_WRITABLE, pdpt)?;
    let mut entries = [0_u8; 0x1000];
    for (slot, page) in entries.chunks_exact_mut(8).zip(0_u64..) {
        slot.copy_from_slice(&(page << 21 | PAGE_PRESENT_WRITABLE | PAGE_2_MIB).to_le_bytes());
    }
    memory.write_slice(&entries, GuestAddress(directory.raw_value()))
}

#[derive(Clone, Copy)]
enum Kind {
    Code32,
    Code64,
    Data,
    Task,
}

/// A flat segment: base 0, limit 4 GiB.
fn segment(selector: u16, kind: Kind) -> kvm_segment {
    let flat = kvm_segment {
        selector,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    match kind {
        Kind::Code32 => kvm_segment {
            type_: 0xb,
            db: 1,
            ..flat
        },
        Kind::Code64 => kvm_segment {
            type_: 0xb,
            l: 1,
            ..flat
        },
        Kind::Data => kvm_segment {
            type_: 0x3,
            db: 1,
            ..flat
        },
        Kind::Task => kvm_segment {
            type_: 0xb,
            s: 0,
            g: 0,
            limit: 0x67,
            ..flat
        },
    }
}

/// The GDT entry that describes `segment` (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let limit = u64::from(limit);
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: GuestAddress = GuestAddress(0x100_0000);

    #[test]
    fn descriptors_have_the_bits_the_manual_draws() {
        assert_eq!(
            descriptor(&segment(CODE, Kind::Code64)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(CODE, Kind::Code32)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(DATA, Kind::Data)),
            0x00cf_9300_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(TASK, Kind::Task)),
            0x0000_8b00_0000_0067
        );
    }

    #[test]
    fn pvh_enters_in_protected_mode_without_paging() {
        let sregs = system(Entry::Pvh(START), kvm_sregs::default());
        assert_eq!((sregs.cr0 & CR0_PG, sregs.efer, sregs.cs.l), (0, 0, 0));
        assert_eq!(general(Entry::Pvh(START)).rbx, PVH_INFO_START.raw_value());
    }

    #[test]
    fn the_64_bit_protocol_enters_in_long_mode() {
        let sregs = system(Entry::Linux64(START), kvm_sregs::default());
        assert_eq!(
            (sregs.cr0 & CR0_PG, sregs.efer, sregs.cs.l),
            (CR0_PG, EFER_LME | EFER_LMA, 1)
        );
        assert_eq!(
            general(Entry::Linux64(START)).rsi,
            ZERO_PAGE_START.raw_value()
        );
    }

    #[test]
    fn page_tables_map_the_first_gib_onto_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
        write_tables(Entry::Linux64(START), &memory).unwrap();
        let last: u64 = memory
            .read_obj(PAGE_TABLES_START.unchecked_add(0x2ff8))
            .unwrap();
        assert_eq!(last, (511 << 21) | 0x83);
    }
}
