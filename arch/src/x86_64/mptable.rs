//! The MP table: tells a kernel without ACPI which CPUs exist and how
//! interrupts are wired (Intel MultiProcessor Specification 1.4, chapter 4).
//!
//! One entry a CPU (all of them present; Linux boots as many as `maxcpus=`
//! allows and can bring the others up later), one ISA bus, one IOAPIC, sixteen
//! and eight interrupt sources wired straight to its 24 pins, and two local
//! interrupt entries.

use thiserror::Error;
use vm_memory::{Address, Bytes, GuestMemoryError, GuestMemoryMmap};

use super::layout::{IOAPIC_START, LOCAL_APIC_START, MPTABLE_END, MPTABLE_START};

/// Highest number of CPUs the table can name: APIC ids are one byte, 255 means
/// all, and one is the IOAPIC's.
pub const MAX_CPUS: u8 = 254;

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_PINS: u8 = 24;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Family 6 and an on-chip APIC and FPU: all that is ever read of it.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

const FLOATING_POINTER_BYTES: u32 = 16;
const HEADER_BYTES: usize = 44;

/// Why the MP table could not be written.
#[derive(Debug, Error)]
pub enum MptableError {
    /// More CPUs than APIC ids.
    #[error("{0} vCPUs do not fit into an MP table: at most {MAX_CPUS}")]
    TooManyCpus(u8),
    /// Guest RAM does not reach that far.
    #[error("write the MP table at {:#x}", MPTABLE_START.raw_value())]
    Write(#[source] GuestMemoryError),
}

/// Writes the table for `cpus` CPUs (1 to [`MAX_CPUS`]) to [`MPTABLE_START`].
pub fn write(memory: &GuestMemoryMmap, cpus: u8) -> Result<(), MptableError> {
    if cpus > MAX_CPUS {
        return Err(MptableError::TooManyCpus(cpus));
    }
    let bytes = table(cpus);
    debug_assert!(bytes.len() as u64 <= MPTABLE_END.raw_value() - MPTABLE_START.raw_value());
    memory
        .write_slice(&bytes, MPTABLE_START)
        .map_err(MptableError::Write)
}

/// Floating pointer structure and configuration table, ready to be written.
fn table(cpus: u8) -> Vec<u8> {
    let (entries, count) = entries(cpus);
    let config_start = u32::try_from(MPTABLE_START.raw_value())
        .expect("the MP table lies below 1 MiB")
        + FLOATING_POINTER_BYTES;

    let mut bytes = Vec::with_capacity(16 + HEADER_BYTES + entries.len());
    // 4.1 MP Floating Pointer Structure
    bytes.extend_from_slice(b"_MP_");
    bytes.extend_from_slice(&config_start.to_le_bytes());
    bytes.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    seal(&mut bytes, 10);

    // 4.2 MP Configuration Table Header
    let length = u16::try_from(HEADER_BYTES + entries.len()).expect("254 CPUs need 5.3 KiB");
    let mut config = Vec::with_capacity(usize::from(length));
    config.extend_from_slice(b"PCMP");
    config.extend_from_slice(&length.to_le_bytes());
    config.extend_from_slice(&[SPEC_1_4, 0]);
    config.extend_from_slice(b"PODVMM  ");
    config.extend_from_slice(b"POD VM      ");
    config.extend_from_slice(&[0; 6]); // no OEM table
    config.extend_from_slice(&count.to_le_bytes());
    config.extend_from_slice(&LOCAL_APIC_START.to_le_bytes());
    config.extend_from_slice(&[0; 4]); // no extended table
    config.extend_from_slice(&entries);
    seal(&mut config, 7);

    bytes.extend_from_slice(&config);
    bytes
}

/// The base table entries (4.3) in the order of their types, and their number.
fn entries(cpus: u8) -> (Vec<u8>, u16) {
    let ioapic_id = cpus;
    let mut bytes = Vec::new();
    let mut count = 0_u16;
    let mut push = |entry: &[u8]| {
        bytes.extend_from_slice(entry);
        count += 1;
    };

    for cpu in 0..cpus {
        let flags = if cpu == 0 {
            CPU_ENABLED | CPU_BOOTSTRAP
        } else {
            CPU_ENABLED
        };
        let mut entry = [0_u8; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, cpu, APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&CPU_SIGNATURE.to_le_bytes());
        entry[8..12].copy_from_slice(&CPU_FEATURES.to_le_bytes());
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IOAPIC_START.to_le_bytes();
    push(&[ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1, a, b, c, d]);
    for pin in 0..IOAPIC_PINS {
        push(&[ENTRY_INTERRUPT, INTERRUPT_INT, 0, 0, 0, pin, ioapic_id, pin]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, 0, 0, 0, 0]);
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);
    (bytes, count)
}

/// Sets the byte at `checksum_at` so that all bytes sum to zero.
fn seal(bytes: &mut [u8], checksum_at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[checksum_at] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_structures_sum_to_zero() {
        let bytes = table(2);
        assert_eq!((sum(&bytes[..16]), sum(&bytes[16..])), (0, 0));
    }

    #[test]
    fn every_cpu_is_present_and_the_first_boots() {
        let bytes = table(3);
        let cpus: Vec<_> = bytes[16 + HEADER_BYTES..]
            .chunks(20)
            .take(3)
            .map(|e| (e[1], e[3]))
            .collect();
        assert_eq!(cpus, [(0, 3), (1, 1), (2, 1)]);
    }

    #[test]
    fn header_length_and_count_match_the_entries() {
        let bytes = table(5);
        let length = u16::from_le_bytes([bytes[20], bytes[21]]);
        let count = u16::from_le_bytes([bytes[16 + 34], bytes[16 + 35]]);
        assert_eq!(usize::from(length), bytes.len() - 16);
        assert_eq!(count, 5 + 1 + 1 + 24 + 2);
    }

    #[test]
    fn the_largest_table_fits_its_area() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write(&memory, MAX_CPUS).unwrap();
        assert!(table(MAX_CPUS).len() < 0x1_0000);
    }

    #[test]
    fn more_cpus_than_apic_ids_are_refused() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        assert!(matches!(
            write(&memory, 255),
            Err(MptableError::TooManyCpus(255))
        ));
    }

    #[test]
    fn ram_that_ends_before_the_table_is_an_error() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(matches!(write(&memory, 1), Err(MptableError::Write(_))));
    }
}
