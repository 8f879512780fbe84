//! CPUID as the guest sees it: what KVM supports, with the topology of this VM:
//! one package, `count` cores, one thread each.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, EBX: logical processors and initial APIC id.
const EBX_CLFLUSH_MASK: u32 = 0x0000_ffff;
/// Leaf 1, ECX: TSC deadline timer and "runs under a hypervisor".
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor per package.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX.
const ECX_SVM: u32 = 1 << 2;
/// Topology level types of leaf 0xb and 0x1f (Intel SDM, CPUID leaf 0BH).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// `supported` (KVM_GET_SUPPORTED_CPUID) adapted to vCPU `index` of `count`.
/// APIC ids equal vCPU indexes.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = u32::from(index);
    let count = u32::from(count);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & EBX_CLFLUSH_MASK) | (count << 16) | (apic_id << 24);
                entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
                // A pod has no use for VMs of its own, which a snapshot would not keep.
                entry.ecx &= !ECX_VMX;
                if count > 1 {
                    entry.edx |= EDX_HTT;
                } else {
                    entry.edx &= !EDX_HTT;
                }
            }
            0x4 => set_intel_cache_sharing(entry, count),
            // The performance counters are the host's; KVM's offer of them to
            // every guest is not one a sandbox should pass on.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => set_topology_level(entry, apic_id, count),
            0x8000_0001 => entry.ecx &= !ECX_SVM,
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (apic_id_bits(count) << 12) | (count - 1)
            }
            0x8000_001d => set_amd_cache_sharing(entry, count),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Leaves and subleaves whose registers are a bit for each feature: EAX, EBX, ECX, EDX.
const FEATURES: [(u32, u32, [bool; 4]); 10] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, true, true]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0007, 0, [false, false, false, true]),
    (0x8000_0008, 0, [false, true, false, false]),
    (0x8000_0021, 0, [true, false, false, false]),
];

/// What a guest that was started where KVM supported `needed` may rely on and KVM does not support
/// here, in words.
pub fn missing(needed: &CpuId, here: &CpuId) -> Option<String> {
    let leaf = |cpuid: &CpuId, function, index| {
        let entries = cpuid.as_slice().iter();
        let mut entries = entries.filter(|entry| entry.function == function);
        let entry = entries.find(|entry| entry.index == index);
        entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    let vendor = |cpuid: &CpuId| {
        let [_, b, c, d] = leaf(cpuid, 0, 0);
        let text: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
        text.escape_ascii().to_string()
    };
    if vendor(needed) != vendor(here) {
        return Some(format!("a CPU of {}", vendor(needed)));
    }
    for (function, index, registers) in FEATURES {
        let (needed, here) = (leaf(needed, function, index), leaf(here, function, index));
        for (at, register) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
            let lacking = needed[at] & !here[at];
            if registers[at] && lacking != 0 {
                return Some(format!(
                    "CPU features (CPUID leaf {function:#x}.{index} {register}, bits {lacking:#x})"
                ));
            }
        }
    }
    None
}

/// Bits of an APIC id that number the cores of the package.
fn apic_id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Leaf 4: cores per package, and how many of them share each cache: all of
/// them the last level, none the others.
fn set_intel_cache_sharing(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = (entry.eax >> 5) & 0x7;
    let sharing = if level >= 3 {
        (1 << apic_id_bits(count)) - 1
    } else {
        0
    };
    let cores = ((1 << apic_id_bits(count)) - 1_u32).min(0x3f);
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
}

/// Leaf 0x8000_001d: how many threads share each cache.
fn set_amd_cache_sharing(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = (entry.eax >> 5) & 0x7;
    let sharing = if level >= 3 { count - 1 } else { 0 };
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
}

/// Leaf 0xb and 0x1f: subleaf 0 the threads of a core, subleaf 1 the cores.
fn set_topology_level(entry: &mut kvm_cpuid_entry2, apic_id: u32, count: u32) {
    let (shift, processors, level) = match entry.index {
        0 => (0, 1, LEVEL_SMT),
        1 => (apic_id_bits(count), count, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = processors;
    entry.ecx = (level << 8) | entry.index;
    entry.edx = apic_id;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    fn adapted(entry: kvm_cpuid_entry2, vcpu: u8, count: u8) -> kvm_cpuid_entry2 {
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(&supported, vcpu, count).as_slice()[0]
    }

    #[test]
    fn leaf_1_carries_the_apic_id_and_the_processor_count() {
        let entry = adapted(
            kvm_cpuid_entry2 {
                ebx: 0xffff_0800,
                ..leaf(1, 0)
            },
            3,
            4,
        );
        assert_eq!(entry.ebx, 0x0304_0800);
        assert_eq!(entry.ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
        assert_eq!(entry.edx & EDX_HTT, EDX_HTT);
    }

    #[test]
    fn a_single_processor_has_no_siblings() {
        assert_eq!(
            adapted(
                kvm_cpuid_entry2 {
                    edx: EDX_HTT,
                    ..leaf(1, 0)
                },
                0,
                1
            )
            .edx,
            0
        );
    }

    #[test]
    fn the_core_level_spans_all_processors() {
        let entry = adapted(leaf(0xb, 1), 4, 6);
        assert_eq!(
            (entry.eax, entry.ebx, entry.ecx, entry.edx),
            (3, 6, 0x201, 4)
        );
    }

    #[test]
    fn the_thread_level_holds_one_processor() {
        let entry = adapted(leaf(0xb, 0), 1, 2);
        assert_eq!(
            (entry.eax, entry.ebx, entry.ecx, entry.edx),
            (0, 1, 0x100, 1)
        );
    }

    #[test]
    fn the_last_level_cache_is_shared_and_the_others_are_not() {
        let l3 = adapted(
            kvm_cpuid_entry2 {
                eax: 0x63,
                ..leaf(0x8000_001d, 3)
            },
            0,
            4,
        );
        let l1 = adapted(
            kvm_cpuid_entry2 {
                eax: 0x21,
                ..leaf(0x8000_001d, 0)
            },
            0,
            4,
        );
        assert_eq!((l3.eax >> 14, l1.eax >> 14), (3, 0));
    }

    #[test]
    fn virtualization_is_hidden() {
        let ecx = u32::MAX;
        let vmx = adapted(kvm_cpuid_entry2 { ecx, ..leaf(1, 0) }, 0, 1);
        let svm = adapted(
            kvm_cpuid_entry2 {
                ecx,
                ..leaf(0x8000_0001, 0)
            },
            0,
            1,
        );
        assert_eq!((vmx.ecx, svm.ecx), (!(1 << 5), !(1 << 2)));
    }

    #[test]
    fn what_another_cpu_lacks_is_named() {
        let cpu = |vendor, edx| {
            let vendor = kvm_cpuid_entry2 {
                ebx: vendor,
                ..leaf(0, 0)
            };
            CpuId::from_entries(&[vendor, kvm_cpuid_entry2 { edx, ..leaf(7, 0) }]).unwrap()
        };
        let amd = u32::from_le_bytes(*b"Auth");
        assert_eq!(missing(&cpu(amd, 1), &cpu(amd, 3)), None);
        assert_eq!(
            missing(&cpu(amd, 6), &cpu(amd, 3)).unwrap(),
            "CPU features (CPUID leaf 0x7.0 EDX, bits 0x4)"
        );
        let other = missing(&cpu(amd, 0), &cpu(0, 0)).unwrap();
        assert_eq!(
            other,
            "a CPU of Auth\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
        );
    }

    #[test]
    fn performance_counters_are_hidden() {
        let entry = adapted(
            kvm_cpuid_entry2 {
                eax: 0x0730_0802,
                ..leaf(0xa, 0)
            },
            0,
            1,
        );
        assert_eq!(entry.eax, 0);
    }
}
