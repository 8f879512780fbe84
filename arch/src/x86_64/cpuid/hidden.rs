//! Features that KVM supports and podvmm's guests do not get.

use kvm_bindings::kvm_cpuid_entry2;

/// Bits by leaf, subleaf and register.
const BITS: [(u32, u32, Register, u32); 7] = [
    // A pod has no use for VMs of its own, which a snapshot would not keep: VMX and SVM.
    (0x1, 0, Register::Ecx, 1 << 5),
    (0x8000_0001, 0, Register::Ecx, 1 << 2),
    // AMX: tiles are 8 KiB of state, for which a monitor must ask the host's permission (arch_prctl,
    // ARCH_REQ_XCOMP_GUEST_PERM). podvmm does not, and KVM then hides the half of it: the
    // instructions stay, and from Linux 5.17 to 6.3 the tiles' configuration, which alone cannot be
    // enabled, so that the guest's kernel dies of its XSETBV. BF16, TILE and INT8; FP16; COMPLEX.
    (0x7, 0, Register::Edx, 1 << 22 | 1 << 24 | 1 << 25),
    (0x7, 1, Register::Eax, 1 << 21),
    (0x7, 1, Register::Edx, 1 << 8),
    // CET, of which KVM has told guests since Linux 6.18: the shadow stack's pointer is in no
    // model-specific register, so that a snapshot does not have it. SHSTK; IBT.
    (0x7, 0, Register::Ecx, 1 << 7),
    (0x7, 0, Register::Edx, 1 << 20),
];

/// Leaves of which nothing is left: AMX's tiles and their multiplication; what SVM can do.
const LEAVES: [u32; 3] = [0x1d, 0x1e, 0x8000_000a];

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ecx,
    Edx,
}

/// Takes them out of a leaf.
pub(super) fn hide(entry: &mut kvm_cpuid_entry2) {
    if LEAVES.contains(&entry.function) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    }
    for (function, index, register, bits) in BITS {
        if (entry.function, entry.index) == (function, index) {
            let register = match register {
                Register::Eax => &mut entry.eax,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *register &= !bits;
        }
    }
}
