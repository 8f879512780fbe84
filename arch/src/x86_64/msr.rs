//! Model-specific registers: those a vCPU starts with, and those a snapshot keeps.

mod kept;

use kvm_bindings::{CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::cpuid;
use super::error::VcpuError;

use self::kept::is_vital;
pub(super) use self::kept::kept;

const IA32_TSC: u32 = 0x10;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_PERF_CAPABILITIES: u32 = 0x345;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// AMD's hardware configuration.
const HWCR: u32 = 0xc001_0015;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
/// The time stamp counter counts at the rate of the highest performance state, P0.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;

/// What differs from the reset values and matters to Linux: fast string
/// operations, and memory that is cacheable although no firmware set up MTRRs.
const BOOT: [(u32, u64); 2] = [
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// Sets the boot MSRs of `vcpu`, which has `cpuid` already.
pub(super) fn set_boot(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), VcpuError> {
    set(vcpu, &BOOT.map(|(index, data)| entry(index, data)))?;
    for (index, data) in wished(cpuid) {
        match set(vcpu, &[entry(index, data)]) {
            // Then it is as on a host whose KVM is older.
            Ok(()) | Err(VcpuError::MsrRefused(_)) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

/// What a vCPU is better off with, if KVM takes it.
fn wished(cpuid: &CpuId) -> Vec<(u32, u64)> {
    if cpuid::is_amd(cpuid) {
        // Without it Linux reports a fault of the firmware (KVM has it since Linux 6.8).
        vec![(HWCR, HWCR_TSC_FREQ_SEL)]
    } else {
        // KVM sets it to what its counters can do, of which this guest has none.
        vec![(IA32_PERF_CAPABILITIES, 0)]
    }
}

/// Sets the time stamp counter of `vcpu`.
pub(super) fn set_tsc(vcpu: &VcpuFd, value: u64) -> Result<(), VcpuError> {
    set(vcpu, &[entry(IA32_TSC, value)])
}

/// The time stamp counter among `entries`.
pub(super) fn tsc(entries: &[kvm_msr_entry]) -> Option<u64> {
    let mut entries = entries.iter();
    entries
        .find(|entry| entry.index == IA32_TSC)
        .map(|entry| entry.data)
}

/// Which of the CPU's weaknesses and mitigations the guest was told of (IA32_ARCH_CAPABILITIES).
pub(super) fn arch_capabilities(entries: &[kvm_msr_entry]) -> u64 {
    let mut entries = entries.iter();
    let entry = entries.find(|entry| entry.index == IA32_ARCH_CAPABILITIES);
    entry.map_or(0, |entry| entry.data)
}

/// Which of the CPU's weaknesses and mitigations KVM tells guests of here. 0 if it cannot say.
pub(super) fn supported_arch_capabilities(kvm: &Kvm) -> u64 {
    let mut msrs = Msrs::from_entries(&[entry(IA32_ARCH_CAPABILITIES, 0)]).expect("it is one");
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice()[0].data,
        // KVM is older than this register.
        _ => 0,
    }
}

/// Reads those of `indices` that KVM can tell for `vcpu`.
pub(super) fn read(
    vcpu: &VcpuFd,
    indices: &[u32],
) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = some.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("no more than KVM takes");
        let count = vcpu.get_msrs(&mut msrs)?;
        read.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first it cannot tell.
        let passed = if count < some.len() { count + 1 } else { count };
        rest = &rest[passed..];
    }
    let is_deadline = |entry: &&mut kvm_msr_entry| entry.index == IA32_TSC_DEADLINE;
    let now = tsc(&read).unwrap_or(0);
    if let Some(deadline) = read.iter_mut().find(is_deadline).filter(|it| it.data == 0) {
        // Either there is no deadline, or it has passed and its interrupt has not reached the vCPU:
        // podvmm cannot tell which. A timer that fires once too often does no harm, but one that
        // never fires stops the guest.
        deadline.data = now;
    }
    Ok(read)
}

/// Writes what [`read`] read.
pub(super) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    // A deadline is set against the time.
    let mut entries = entries.to_vec();
    entries.sort_by_key(|entry| match entry.index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        match set(vcpu, some) {
            Ok(()) => rest = &rest[some.len()..],
            Err(VcpuError::MsrRefused(index)) => {
                let at = some.iter().position(|entry| entry.index == index);
                let at = at.expect("it is one of them");
                match some[at].data {
                    // Some can be read, are zero, and cannot be set.
                    0 => {}
                    _ if is_vital(index) => return Err(VcpuError::MsrRefused(index)),
                    data => log::warn!(
                        "KVM refuses {data:#x} for model-specific register {index:#x}, which no \
                         feature of the guest needs"
                    ),
                }
                rest = &rest[at + 1..];
            }
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

fn set(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    let msrs = Msrs::from_entries(entries).expect("no more than KVM takes");
    let count = vcpu.set_msrs(&msrs).map_err(VcpuError::SetMsrs)?;
    match entries.get(count) {
        None => Ok(()),
        Some(refused) => Err(VcpuError::MsrRefused(refused.index)),
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amd_guests_are_told_that_their_counter_is_constant() {
        let cpu = |vendor: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
            let vendor = kvm_bindings::kvm_cpuid_entry2 {
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..Default::default()
            };
            CpuId::from_entries(&[vendor]).unwrap()
        };
        assert_eq!(wished(&cpu(b"AuthenticAMD")), [(0xc001_0015, 1 << 24)]);
        assert_eq!(wished(&cpu(b"GenuineIntel")), [(0x345, 0)]);
    }
}
