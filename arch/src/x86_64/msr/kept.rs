//! Which model-specific registers a snapshot keeps.
//!
//! KVM lists all that may hold state (KVM_GET_MSR_INDEX_LIST), for any guest it can run. Of those
//! podvmm's guests have no counters, no VMs of their own and no interfaces of Hyper-V, and KVM refuses
//! to set some of what it says of them: they are left out. The others are kept. Of those some are
//! vital: without its own value a guest would not go on as it was. One that KVM does not take back
//! ends the restore; of any other a warning is enough, so that one that a future KVM adds to its list
//! does not keep guests from coming back that never used it.

use std::ops::RangeInclusive;

/// Registers that no guest uses.
const UNUSED: [RangeInclusive<u32>; 11] = [
    // Intel's counters: events and values, fixed ones, global control, what they can do, sampling,
    // its buffer, and full-width values (Intel SDM volume 4, 2.1).
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x345..=0x345,
    0x38d..=0x390,
    0x3f1..=0x3f2,
    0x4c1..=0x4c8,
    // What VMX can do.
    0x480..=0x493,
    // Hyper-V's, with its debugger's and its timers'.
    0x4000_0000..=0x4000_01ff,
    // AMD's counters: the first four, and (with some more) those of cores.
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

/// More unused registers that stand alone: Intel's debug store, AMD's global counter control, and
/// what an AMD guest's own guests need.
const UNUSED_ONES: [u32; 7] = [
    0x600,
    0xc000_0104,
    0xc000_0300,
    0xc000_0301,
    0xc000_0302,
    0xc000_0303,
    0xc001_0117,
];

/// Registers without which a guest does not go on as it was.
const VITAL: [RangeInclusive<u32>; 20] = [
    // Time stamp counter, its adjustment, and the deadline of its timer.
    0x10..=0x10,
    0x3b..=0x3b,
    0x6e0..=0x6e0,
    // KVM's clock by its old numbers; its clock, asynchronous page faults, stolen time, end of
    // interrupts, polling, and migration (kvm/x86/msr.rst).
    0x11..=0x12,
    0x4b56_4d00..=0x4b56_4d08,
    // Speculation: control, what the CPU is free of, TSX, and AMD's virtual control.
    0x48..=0x48,
    0x10a..=0x10a,
    0x122..=0x122,
    0xc001_011f..=0xc001_011f,
    // How long user space may wait; whether it may use CPUID.
    0xe1..=0xe1,
    0x140..=0x140,
    // SYSENTER; what is enabled of the CPU.
    0x174..=0x176,
    0x1a0..=0x1a0,
    // Memory types.
    0x200..=0x20f,
    0x250..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    // State of XSAVE's that supervisors have, and MPX.
    0xda0..=0xda0,
    0xd90..=0xd90,
    // SYSCALL, bases, and the number of the CPU.
    0xc000_0081..=0xc000_0103,
];

/// Memory type range registers (Intel SDM volume 3, 12.11), which KVM's list leaves out.
fn memory_types() -> impl Iterator<Item = u32> {
    let variable = 0x200..0x210;
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..0x270);
    variable.chain(fixed).chain([super::IA32_MTRR_DEF_TYPE])
}

/// The registers that a snapshot keeps where KVM lists `indices`.
pub(in super::super) fn kept(indices: &[u32]) -> Vec<u32> {
    let listed = indices.iter().copied();
    let more = memory_types().filter(|index| !indices.contains(index));
    listed
        .filter(|index| !is_unused(*index))
        .chain(more)
        .collect()
}

fn is_unused(index: u32) -> bool {
    UNUSED_ONES.contains(&index) || UNUSED.iter().any(|range| range.contains(&index))
}

/// Whether a guest cannot go on if KVM does not take register `index` as it was.
pub(super) fn is_vital(index: u32) -> bool {
    VITAL.iter().any(|range| range.contains(&index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_are_kept_once() {
        let indices = kept(&[0x10, 0x250]);
        assert_eq!(indices.len(), 1 + 16 + 11 + 1);
        assert_eq!(indices[..2], [0x10, 0x250]);
    }

    #[test]
    fn counters_hyper_v_and_what_guests_of_guests_need_are_left_out() {
        let left_out = [
            0xc1,
            0x186,
            0x309,
            0x345,
            0x38f,
            0x3f1,
            0x480,
            0x491,
            0x600,
            0x4000_0000,
            0x4000_0106,
            0x4000_00f1,
            0xc001_0000,
            0xc001_0207,
            0xc000_0300,
            0xc001_0117,
        ];
        assert_eq!(kept(&left_out), kept(&[]));
    }

    #[test]
    fn what_is_vital_is_kept() {
        let unused = VITAL.into_iter().flatten().filter(|it| is_unused(*it));
        assert_eq!(unused.collect::<Vec<u32>>(), Vec::<u32>::new());
    }

    #[test]
    fn a_register_that_is_not_known_is_kept_and_not_vital() {
        // IA32_POWER_CTL, SMBASE, the microcode's revision, and one of no CPU.
        for index in [0x1fc, 0x9e, 0x8b, 0x7ff] {
            assert!(kept(&[index]).contains(&index));
            assert!(!is_vital(index));
        }
    }
}
