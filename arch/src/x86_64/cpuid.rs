//! CPUID as the guest sees it: what KVM supports, with the topology of this VM.

mod topology;

use kvm_bindings::CpuId;

use super::pmu;

/// Leaf 1, ECX: TSC deadline timer and "runs under a hypervisor".
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 0x8000_0001, ECX.
const ECX_SVM: u32 = 1 << 2;

/// `supported` (KVM_GET_SUPPORTED_CPUID) adapted to vCPU `index` of `count`.
/// APIC ids equal vCPU indexes. None if that is more leaves than KVM takes.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> Option<CpuId> {
    let place = topology::Place::new(supported, index, count);
    let mut entries = place.with_levels(supported);
    for entry in &mut entries {
        place.adapt(entry);
        pmu::hide(entry);
        match entry.function {
            0x1 => {
                entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
                // A pod has no use for VMs of its own, which a snapshot would not keep.
                entry.ecx &= !ECX_VMX;
            }
            0x8000_0001 => entry.ecx &= !ECX_SVM,
            _ => {}
        }
    }
    CpuId::from_entries(&entries).ok()
}

/// A leaf's registers, EAX to EDX; zeros if it is not there.
fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let entries = cpuid.as_slice().iter();
    let mut entries = entries.filter(|entry| entry.function == function);
    let entry = entries.find(|entry| entry.index == index);
    entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// Who made the CPU, in 12 characters.
fn vendor(cpuid: &CpuId) -> Vec<u8> {
    let [_, b, c, d] = leaf(cpuid, 0, 0);
    [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect()
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
    if vendor(needed) != vendor(here) {
        return Some(format!("a CPU of {}", vendor(needed).escape_ascii()));
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

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

    use super::*;

    pub(super) fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    /// Leaf 0 of a CPU of AMD.
    pub(super) fn amd() -> kvm_cpuid_entry2 {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        kvm_cpuid_entry2 {
            ebx: word(b"Auth"),
            edx: word(b"enti"),
            ecx: word(b"cAMD"),
            ..leaf(0, 0)
        }
    }

    pub(super) fn adapted(entry: kvm_cpuid_entry2, vcpu: u8, count: u8) -> kvm_cpuid_entry2 {
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(&supported, vcpu, count).unwrap().as_slice()[0]
    }

    #[test]
    fn a_guest_knows_that_it_is_one() {
        assert_eq!(
            adapted(leaf(1, 0), 3, 4).ecx,
            ECX_HYPERVISOR | ECX_TSC_DEADLINE
        );
    }

    #[test]
    fn more_leaves_than_kvm_takes_are_no_cpuid() {
        let mut entries = vec![leaf(0x8000_0000, 0); KVM_MAX_CPUID_ENTRIES - 3];
        entries.push(leaf(0xb, 0));
        let supported = CpuId::from_entries(&entries).unwrap();
        assert!(for_vcpu(&supported, 0, 1).is_some());
        entries.push(leaf(0x1f, 0));
        let supported = CpuId::from_entries(&entries).unwrap();
        assert!(for_vcpu(&supported, 0, 1).is_none());
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
        assert_eq!((vmx.ecx & ECX_VMX, svm.ecx & ECX_SVM), (0, 0));
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
        let eax = 0x0730_0802;
        let intel = adapted(
            kvm_cpuid_entry2 {
                eax,
                ..leaf(0xa, 0)
            },
            0,
            1,
        );
        let amd = adapted(
            kvm_cpuid_entry2 {
                eax: 1,
                ..leaf(0x8000_0022, 0)
            },
            0,
            1,
        );
        assert_eq!((intel.eax, amd.eax), (0, 0));
    }
}
