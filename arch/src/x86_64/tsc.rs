//! The time stamp counter, which all vCPUs of a guest share.
//!
//! KVM keeps one offset from the host's counter for all vCPUs whose counters it takes for the same:
//! a new vCPU gets that offset, and so does one whose counter the host sets to within a second of the
//! others'. While one vCPU has another offset, KVM's clock says that its vCPUs may disagree
//! (`PVCLOCK_TSC_STABLE_BIT` is 0), and every reading of the guest's clock becomes dearer.

use kvm_ioctls::VcpuFd;

use super::msr;
use super::state::{StateError, failed};
use super::vcpu::VcpuError;

/// A time stamp counter at the moment of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tsc {
    pub(super) khz: u32,
    pub(super) value: u64,
}

impl Tsc {
    /// Gives it to a vCPU that has none of its own, after one that has: KVM then takes both for the
    /// same.
    pub(super) fn set(self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        set_khz(vcpu, self.khz)?;
        msr::set_tsc(vcpu, self.value)
    }
}

/// Has the counter of `vcpu` advance by `khz` thousand a second.
pub(super) fn set_khz(vcpu: &VcpuFd, khz: u32) -> Result<(), StateError> {
    let own = vcpu.get_tsc_khz().map_err(failed("read its clock rate"))?;
    if own != khz {
        // Fails on hosts that cannot make up for the difference.
        vcpu.set_tsc_khz(khz)
            .map_err(failed("set its clock rate, which is not this host's"))?;
    }
    Ok(())
}
