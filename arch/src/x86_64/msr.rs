//! Model-specific registers a vCPU starts with.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// What differs from the reset values and matters to Linux: fast string
/// operations, and memory that is cacheable although no firmware set up MTRRs.
const BOOT: [(u32, u64); 2] = [
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// Sets the boot MSRs of `vcpu`. Returns the index of the first MSR that KVM
/// refused, if any.
pub(super) fn set_boot(vcpu: &VcpuFd) -> Result<Option<u32>, kvm_ioctls::Error> {
    let entries = BOOT.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("two entries are within KVM's limit");
    let set = vcpu.set_msrs(&msrs)?;
    Ok(BOOT.get(set).map(|(index, _)| *index))
}
