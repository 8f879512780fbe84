//! Performance counters, which guests do not get.
//!
//! They are the host's: what a guest counts of its neighbours' work is a side channel, and their
//! interrupts cost exits. Two things hide them: KVM is told to emulate none, where it can be told
//! (Linux 5.18), and CPUID offers none.

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap};
use kvm_ioctls::VmFd;

/// Leaf 1, ECX: 64-bit debug store, and IA32_PERF_CAPABILITIES. EDX: debug store.
const ECX_DTES64: u32 = 1 << 2;
const ECX_PDCM: u32 = 1 << 15;
const EDX_DS: u32 = 1 << 21;
/// Leaf 0x8000_0001, ECX: instruction-based sampling, and counters of cores, of the northbridge and of
/// the last level cache.
const ECX_IBS: u32 = 1 << 10;
const ECX_PERF_CORE: u32 = 1 << 23;
const ECX_PERF_NB: u32 = 1 << 24;
const ECX_PERF_LLC: u32 = 1 << 28;

/// Has KVM give the vCPUs of `vm`, of which there are none yet, no counters (kvm/api.rst,
/// KVM_CAP_PMU_CAPABILITY). AMD's first four are there without any bit of CPUID, so nothing else hides
/// those.
pub fn disable(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let offered = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    // Not offered if KVM is too old, or has no counters for any guest (its module's `enable_pmu=0`).
    if u32::try_from(offered).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    capability.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&capability)
}

/// Takes the counters out of a leaf of CPUID.
pub(super) fn hide(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        0x1 => {
            entry.ecx &= !(ECX_DTES64 | ECX_PDCM);
            entry.edx &= !EDX_DS;
        }
        0x8000_0001 => entry.ecx &= !(ECX_IBS | ECX_PERF_CORE | ECX_PERF_NB | ECX_PERF_LLC),
        // Intel's counters and their extension; AMD's sampling and second version of counters.
        0xa | 0x23 | 0x8000_001b | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A leaf with all bits set, without the counters.
    fn hidden(function: u32) -> [u32; 4] {
        let mut entry = kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        hide(&mut entry);
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn no_leaf_offers_counters() {
        for function in [0xa, 0x23, 0x8000_001b, 0x8000_0022] {
            assert_eq!(hidden(function), [0; 4], "{function:#x}");
        }
    }

    #[test]
    fn of_the_feature_leaves_only_the_counters_are_hidden() {
        let all = u32::MAX;
        assert_eq!(hidden(0x1), [all, all, 0xffff_7ffb, 0xffdf_ffff]);
        assert_eq!(hidden(0x8000_0001), [all, all, 0xee7f_fbff, all]);
        assert_eq!(hidden(0x7), [all; 4]);
    }
}
