//! The topology that CPUID describes: one package, `count` cores, one thread each.
//!
//! A kernel that finds no level of cores takes each vCPU for a package of its own, which shares no
//! cache with another, and schedules accordingly.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::is_amd;

/// Leaf 1, EBX: all but logical processors and initial APIC id.
const EBX_CLFLUSH_MASK: u32 = 0x0000_ffff;
/// Leaf 1, EDX: more than one logical processor per package.
const EDX_HTT: u32 = 1 << 28;
/// The leaves that list levels of topology (Intel SDM, CPUID leaves 0BH and 1FH). AMD has the former.
const LEVELS: [u32; 2] = [0xb, 0x1f];
/// Types of those levels.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The cores of a VM's package.
pub(super) struct Cores {
    /// vCPUs that the VM can have.
    count: u32,
    is_amd: bool,
}

impl Cores {
    /// `count` of them on a CPU that is as `supported`.
    pub(super) fn new(supported: &CpuId, count: u8) -> Self {
        Self {
            count: count.into(),
            is_amd: is_amd(supported),
        }
    }

    /// `supported` with all levels of topology. KVM returns at most the first subleaf of these leaves
    /// (the host's own levels before Linux 5.17), and it gives a guest zeros for one it has not been
    /// given.
    pub(super) fn with_levels(&self, supported: &CpuId) -> Vec<kvm_cpuid_entry2> {
        let mut entries = supported.as_slice().to_vec();
        for function in LEVELS {
            let known = entries.len();
            entries.retain(|entry| entry.function != function);
            if entries.len() < known {
                entries.extend((0..3).map(|index| self.level(function, index)));
            }
        }
        entries
    }

    /// Subleaf 0 is the threads of a core, subleaf 1 the cores of the package, and the next one says
    /// that there are no more.
    fn level(&self, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let (shift, processors, level) = match index {
            0 => (0, 1, LEVEL_SMT),
            1 => (self.apic_id_bits(), self.count, LEVEL_CORE),
            _ => (0, 0, 0),
        };
        kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: (level << 8) | index,
            ..Default::default()
        }
    }

    /// Has `entry` describe vCPU 0 instead of a processor of the host.
    pub(super) fn adapt(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            0x1 => {
                let clflush = entry.ebx & EBX_CLFLUSH_MASK;
                entry.ebx = clflush | (self.count << 16);
                if self.count > 1 {
                    entry.edx |= EDX_HTT;
                } else {
                    entry.edx &= !EDX_HTT;
                }
            }
            0x4 => self.share_intel_cache(entry),
            // Core count and size of APIC ids; reserved on other makers' CPUs.
            0x8000_0008 if self.is_amd => {
                let kept = entry.ecx & !0xf0ff;
                entry.ecx = kept | (self.apic_id_bits() << 12) | (self.count - 1);
            }
            0x8000_001d => self.share_amd_cache(entry),
            // One thread a core, one node.
            0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0);
            }
            // Levels between core and package, of which there are none: a guest then asks leaf 0xb.
            0x8000_0026 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }

    /// Bits of an APIC id that number the cores of the package.
    fn apic_id_bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Leaf 4: cores per package, and how many of them share each cache: all of
    /// them the last level, none the others.
    fn share_intel_cache(&self, entry: &mut kvm_cpuid_entry2) {
        if entry.eax & 0x1f == 0 {
            return;
        }
        let most = (1 << self.apic_id_bits()) - 1_u32;
        let sharing = if is_last_level(entry) { most } else { 0 };
        entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (most.min(0x3f) << 26);
    }

    /// Leaf 0x8000_001d: how many threads share each cache.
    fn share_amd_cache(&self, entry: &mut kvm_cpuid_entry2) {
        if entry.eax & 0x1f == 0 {
            return;
        }
        let sharing = if is_last_level(entry) {
            self.count - 1
        } else {
            0
        };
        entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
    }
}

/// Has `entry`, which describes vCPU 0, describe the one with `apic_id`.
pub(super) fn identify(entry: &mut kvm_cpuid_entry2, apic_id: u8) {
    let id = u32::from(apic_id);
    match entry.function {
        0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
        0xb | 0x1f => entry.edx = id,
        0x8000_001e => (entry.eax, entry.ebx) = (id, id),
        _ => {}
    }
}

/// Whether `entry` describes a last-level cache. `entry` is of leaf 4 or 0x8000_001d, which have
/// the level at the same place.
fn is_last_level(entry: &kvm_cpuid_entry2) -> bool {
    (entry.eax >> 5) & 0x7 >= 3
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, amd, leaf, of_vcpu};
    use super::*;

    #[test]
    fn leaf_1_carries_the_apic_id_and_the_processor_count() {
        let ebx = 0xffff_0800;
        let entry = adapted(kvm_cpuid_entry2 { ebx, ..leaf(1, 0) }, 3, 4);
        assert_eq!(entry.ebx, 0x0304_0800);
        assert_eq!(entry.edx & EDX_HTT, EDX_HTT);
    }

    #[test]
    fn a_single_processor_has_no_siblings() {
        let edx = EDX_HTT;
        let entry = adapted(kvm_cpuid_entry2 { edx, ..leaf(1, 0) }, 0, 1);
        assert_eq!(entry.edx, 0);
    }

    /// Registers and whether KVM is told that the subleaf matters, of each subleaf of `function`.
    fn levels(cpuid: &CpuId, function: u32) -> Vec<([u32; 4], u32)> {
        let entries = cpuid.as_slice().iter();
        let levels = entries.filter(|entry| entry.function == function);
        levels
            .map(|it| ([it.eax, it.ebx, it.ecx, it.edx], it.flags))
            .collect()
    }

    #[test]
    fn all_levels_are_there_though_kvm_returns_the_first_subleaf_alone() {
        // As Linux 5.17 and later return them, and as older ones do.
        let host_core = kvm_cpuid_entry2 {
            eax: 7,
            ebx: 96,
            ecx: 0x201,
            ..leaf(0xb, 1)
        };
        let lists = [
            vec![leaf(0xb, 0), leaf(0x1f, 0)],
            vec![leaf(0xb, 0), host_core, leaf(0xb, 2), leaf(0x1f, 0)],
        ];
        for entries in lists {
            let supported = CpuId::from_entries(&entries).unwrap();
            let cpuid = of_vcpu(&supported, 4, 6);
            let expected = [
                ([0, 1, 0x100, 4], KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                ([3, 6, 0x201, 4], KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                ([0, 0, 0x002, 4], KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            ];
            assert_eq!(levels(&cpuid, 0xb), expected);
            assert_eq!(levels(&cpuid, 0x1f), expected);
        }
    }

    #[test]
    fn a_cpu_without_levels_gets_none() {
        let supported = CpuId::from_entries(&[leaf(0xb, 0)]).unwrap();
        let cpuid = of_vcpu(&supported, 0, 2);
        assert_eq!(levels(&cpuid, 0x1f), []);
    }

    #[test]
    fn the_last_level_cache_is_shared_and_the_others_are_not() {
        let cache = |function, eax| {
            adapted(
                kvm_cpuid_entry2 {
                    eax,
                    ..leaf(function, 3)
                },
                0,
                4,
            )
        };
        let shifted = |function, eax| cache(function, eax).eax >> 14;
        assert_eq!(shifted(0x8000_001d, 0x63), 3);
        assert_eq!(shifted(0x8000_001d, 0x21), 0);
        assert_eq!(shifted(0x4, 0x63), (3 << 12) | 3);
        assert_eq!(shifted(0x4, 0x21), 3 << 12);
    }

    #[test]
    fn amd_is_told_of_the_cores_in_its_own_leaves() {
        let size = kvm_cpuid_entry2 {
            ecx: 0x1_700f,
            ..leaf(0x8000_0008, 0)
        };
        let node = kvm_cpuid_entry2 {
            ecx: 0x301,
            ..leaf(0x8000_001e, 0)
        };
        let ccx = kvm_cpuid_entry2 {
            eax: 4,
            ebx: 8,
            ecx: 0x100,
            ..leaf(0x8000_0026, 0)
        };
        let supported = CpuId::from_entries(&[amd(), size, node, ccx]).unwrap();
        let cpuid = of_vcpu(&supported, 2, 3);
        let registers = |function| levels(&cpuid, function)[0].0;
        assert_eq!(registers(0x8000_0008), [0, 0, 0x1_2002, 0]);
        assert_eq!(registers(0x8000_001e), [2, 2, 0, 0]);
        assert_eq!(registers(0x8000_0026), [0; 4]);
    }

    #[test]
    fn what_is_reserved_elsewhere_stays_so() {
        assert_eq!(adapted(leaf(0x8000_0008, 0), 1, 4).ecx, 0);
    }
}
