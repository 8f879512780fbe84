//! Model-specific registers: those a vCPU starts with, and those a snapshot keeps.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vcpu::VcpuError;

const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// What differs from the reset values and matters to Linux: fast string
/// operations, and memory that is cacheable although no firmware set up MTRRs.
const BOOT: [(u32, u64); 2] = [
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// Sets the boot MSRs of `vcpu`.
pub(super) fn set_boot(vcpu: &VcpuFd) -> Result<(), VcpuError> {
    set(vcpu, &BOOT.map(|(index, data)| entry(index, data)))
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

/// `indices` and the memory type range registers (Intel SDM volume 3, 12.11), which KVM's list
/// leaves out.
pub(super) fn with_memory_types(indices: &[u32]) -> Vec<u32> {
    let variable = 0x200..0x210;
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..0x270);
    let types = variable.chain(fixed).chain([IA32_MTRR_DEF_TYPE]);
    let more = types.filter(|index| !indices.contains(index));
    indices.iter().copied().chain(more).collect()
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
        // No deadline, or one that has passed but whose interrupt has not reached the vCPU: which of
        // them nobody can tell. A timer that fires once too often does no harm, one that never fires
        // stops the guest.
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
                if some[at].data != 0 {
                    return Err(VcpuError::MsrRefused(index));
                }
                // Some can be read, are zero, and cannot be set.
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
    fn memory_types_are_kept_once() {
        let indices = with_memory_types(&[IA32_TSC, 0x250]);
        assert_eq!(indices.len(), 1 + 16 + 11 + 1);
        assert_eq!(indices[..2], [IA32_TSC, 0x250]);
    }
}
