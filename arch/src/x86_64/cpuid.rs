//! CPUID as the guest sees it: what KVM supports, without what podvmm hides, and with the topology of
//! this VM.

mod compare;
mod hidden;
mod topology;
mod xsave;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::pmu;

pub use self::compare::missing;

/// Leaf 1, ECX: TSC deadline timer and "runs under a hypervisor".
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;

/// `supported` (KVM_GET_SUPPORTED_CPUID) adapted to a VM that can have `count` vCPUs. It is that of
/// vCPU 0; [`for_vcpu`] makes it another one's. None if it is more leaves than KVM takes.
pub fn for_guest(supported: &CpuId, count: u8) -> Option<CpuId> {
    let cores = topology::Cores::new(supported, count);
    let mut entries = cores.with_levels(supported);
    for entry in &mut entries {
        cores.adapt(entry);
        pmu::hide(entry);
        hidden::hide(entry);
        if entry.function == 0x1 {
            entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
        }
    }
    xsave::hide(&mut entries);
    CpuId::from_entries(&entries).ok()
}

/// `guest` (see [`for_guest`]) as vCPU `index` has it, which is its APIC id, too.
pub fn for_vcpu(guest: &CpuId, index: u8) -> CpuId {
    let mut cpuid = guest.clone();
    for entry in cpuid.as_mut_slice() {
        topology::identify(entry, index);
    }
    cpuid
}

/// A leaf, if it is there.
fn find(cpuid: &CpuId, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    let mut entries = cpuid.as_slice().iter();
    entries.find(|entry| (entry.function, entry.index) == (function, index))
}

/// A leaf's registers, EAX to EDX; zeros if it is not there.
fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let entry = find(cpuid, function, index);
    entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// The maker of the CPU, in 12 characters.
fn vendor(cpuid: &CpuId) -> Vec<u8> {
    let [_, b, c, d] = leaf(cpuid, 0, 0);
    [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Whether the CPU is AMD's, or Hygon's, which is of the same design.
pub(super) fn is_amd(cpuid: &CpuId) -> bool {
    let vendor = vendor(cpuid);
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
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
        of_vcpu(&supported, vcpu, count).as_slice()[0]
    }

    pub(super) fn of_vcpu(supported: &CpuId, vcpu: u8, count: u8) -> CpuId {
        for_vcpu(&for_guest(supported, count).unwrap(), vcpu)
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
        assert!(for_guest(&supported, 1).is_some());
        entries.push(leaf(0x1f, 0));
        let supported = CpuId::from_entries(&entries).unwrap();
        assert!(for_guest(&supported, 1).is_none());
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
