//! Whether a guest that was started on one host can go on at another: what it has found in CPUID must
//! be so there, too.

use kvm_bindings::CpuId;

use super::{ECX_HYPERVISOR, ECX_TSC_DEADLINE, find, leaf, vendor};

const ALL: u32 = u32::MAX;
/// Leaf 1, ECX: what podvmm or KVM gives every guest, whatever KVM_GET_SUPPORTED_CPUID says (the bits
/// of x2APIC and of OSXSAVE are the two others).
const ECX_EVERY_GUESTS: u32 = ECX_TSC_DEADLINE | ECX_HYPERVISOR | 1 << 21 | 1 << 27;
/// Leaf 1, EDX: more than one logical processor, which is topology.
const EDX_HTT: u32 = 1 << 28;

/// Bits that are a feature each, by leaf and subleaf: of EAX, EBX, ECX and EDX.
const FEATURES: [(u32, u32, [u32; 4]); 12] = [
    (0x1, 0, [0, 0, !ECX_EVERY_GUESTS, !EDX_HTT]),
    (0x6, 0, [1 << 2, 0, 0, 0]),
    (0x7, 0, [0, ALL, ALL, ALL]),
    (0x7, 1, [ALL, ALL, ALL, ALL]),
    (0x7, 2, [0, 0, 0, ALL]),
    (0xd, 0, [ALL, 0, 0, ALL]),
    (0xd, 1, [ALL, 0, ALL, ALL]),
    (0x4000_0001, 0, [ALL, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, ALL, ALL]),
    (0x8000_0007, 0, [0, 0, 0, ALL]),
    (0x8000_0008, 0, [0, ALL, 0, 0]),
    (0x8000_0021, 0, [ALL, 0, 0, 0]),
];

/// What a guest whose vCPUs have CPUID `guest` may rely on and KVM, which supports `here`, does not
/// have, in words.
pub fn missing(guest: &CpuId, here: &CpuId) -> Option<String> {
    if vendor(guest) != vendor(here) {
        return Some(format!("a CPU of {}", vendor(guest).escape_ascii()));
    }
    feature(guest, here)
        .or_else(|| width(guest, here))
        .or_else(|| layout(guest, here))
}

fn feature(guest: &CpuId, here: &CpuId) -> Option<String> {
    for (function, index, features) in FEATURES {
        let (needed, here) = (leaf(guest, function, index), leaf(here, function, index));
        for (at, register) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
            let lacking = needed[at] & !here[at] & features[at];
            if lacking != 0 {
                return Some(format!(
                    "CPU features (CPUID leaf {function:#x}.{index} {register}, bits {lacking:#x})"
                ));
            }
        }
    }
    None
}

/// Addresses that the guest may use and this CPU faults at.
fn width(guest: &CpuId, here: &CpuId) -> Option<String> {
    let [needed, ..] = leaf(guest, 0x8000_0008, 0);
    let [here, ..] = leaf(here, 0x8000_0008, 0);
    let kinds = [("physical", 0), ("linear", 8)];
    let bits = |eax: u32, shift: u32| (eax >> shift) & 0xff;
    let (kind, shift) = kinds
        .into_iter()
        .find(|(_, shift)| bits(needed, *shift) > bits(here, *shift))?;
    let bits = bits(needed, shift);
    Some(format!("{kind} addresses of {bits} bits"))
}

/// State that XSAVE puts elsewhere: the guest's own memory has it where it was told.
fn layout(guest: &CpuId, here: &CpuId) -> Option<String> {
    let [state, ..] = leaf(guest, 0xd, 0);
    let component = (2..u32::BITS).find(|component| {
        let place = |cpuid| find(cpuid, 0xd, *component).map(|entry| (entry.eax, entry.ebx));
        state & (1 << component) != 0 && place(guest) != place(here)
    })?;
    Some(format!("XSAVE's component {component} at its place"))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::super::for_guest;
    use super::super::tests::leaf;
    use super::*;

    fn cpu(entry: kvm_cpuid_entry2) -> CpuId {
        CpuId::from_entries(&[entry]).unwrap()
    }

    #[test]
    fn a_feature_that_another_cpu_lacks_is_named() {
        let cpu = |edx| cpu(kvm_cpuid_entry2 { edx, ..leaf(7, 0) });
        assert_eq!(missing(&cpu(1), &cpu(3)), None);
        assert_eq!(
            missing(&cpu(6), &cpu(3)).unwrap(),
            "CPU features (CPUID leaf 0x7.0 EDX, bits 0x4)"
        );
    }

    #[test]
    fn a_cpu_of_another_maker_is_refused() {
        let cpu = |ebx| cpu(kvm_cpuid_entry2 { ebx, ..leaf(0, 0) });
        assert_eq!(
            missing(&cpu(u32::from_le_bytes(*b"Auth")), &cpu(0)).unwrap(),
            "a CPU of Auth\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
        );
    }

    #[test]
    fn branch_history_controls_are_features() {
        let cpu = |edx| cpu(kvm_cpuid_entry2 { edx, ..leaf(7, 2) });
        assert_eq!(
            missing(&cpu(0x17), &cpu(0x1)).unwrap(),
            "CPU features (CPUID leaf 0x7.2 EDX, bits 0x16)"
        );
    }

    #[test]
    fn addresses_may_become_wider_but_not_narrower() {
        let cpu = |eax| {
            cpu(kvm_cpuid_entry2 {
                eax,
                ..leaf(0x8000_0008, 0)
            })
        };
        assert_eq!(missing(&cpu(0x302e), &cpu(0x3934)), None);
        let refusal = |needed, here| missing(&cpu(needed), &cpu(here)).unwrap();
        assert_eq!(refusal(0x3034, 0x302e), "physical addresses of 52 bits");
        assert_eq!(refusal(0x392e, 0x302e), "linear addresses of 57 bits");
    }

    #[test]
    fn state_that_lies_elsewhere_is_refused() {
        let cpu = |ebx| {
            let state = kvm_cpuid_entry2 {
                eax: 0x207,
                ..leaf(0xd, 0)
            };
            let keys = kvm_cpuid_entry2 {
                eax: 8,
                ebx,
                ..leaf(0xd, 9)
            };
            CpuId::from_entries(&[state, keys]).unwrap()
        };
        assert_eq!(missing(&cpu(0x980), &cpu(0x980)), None);
        assert_eq!(
            missing(&cpu(0x980), &cpu(0xa80)).unwrap(),
            "XSAVE's component 9 at its place"
        );
    }

    #[test]
    fn what_every_guest_is_given_is_no_feature_of_the_host() {
        let supported = cpu(leaf(1, 0));
        assert_eq!(
            missing(&for_guest(&supported, 2).unwrap(), &supported),
            None
        );
    }
}
