//! The time stamp counter, which all vCPUs of a guest share.
//!
//! KVM keeps one offset from the host's counter for all vCPUs whose counters it takes for the same:
//! a new vCPU gets that offset if its rate is theirs, and so does one whose counter the host sets to
//! within a second of the one that was set or made last. While one vCPU has another offset, KVM's clock
//! says that its vCPUs may disagree (`PVCLOCK_TSC_STABLE_BIT` is 0), and every reading of the guest's
//! clock becomes dearer. So a restore makes its vCPUs first and sets their counters then.

use kvm_bindings::KVMIO;
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_val;
use vmm_sys_util::ioctl_io_nr;

use super::error::{StateError, VcpuError, failed};
use super::msr;

ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);

/// A time stamp counter at the moment of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tsc {
    pub(super) khz: u32,
    pub(super) value: u64,
}

impl Tsc {
    /// Has the vCPUs of `vm`, of which there are none yet, count at this rate, also those that are made
    /// while others run. False if KVM is too old for that (before Linux 5.18).
    #[expect(unsafe_code, reason = "kvm-ioctls has it for vCPUs only")]
    pub fn set_rate(self, vm: &VmFd) -> bool {
        // SAFETY: KVM takes a number, not an address (KVM_SET_TSC_KHZ, kvm/api.rst 4.55).
        let result = unsafe { ioctl_with_val(vm, KVM_SET_TSC_KHZ(), self.khz.into()) };
        result == 0
    }

    /// Gives it to a vCPU that has none of its own, after one that has: KVM then takes both for the
    /// same.
    pub(super) fn set(self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        set_khz(vcpu, self.khz)?;
        msr::set_tsc(vcpu, self.value)
    }
}

/// Has the counter of `vcpu` advance by `khz` thousand a second.
pub(super) fn set_khz(vcpu: &VcpuFd, khz: u32) -> Result<(), StateError> {
    // Fails on hosts that cannot make up for the difference to their own rate. The rate of the whole VM
    // is not refused there, so this is asked of each vCPU.
    vcpu.set_tsc_khz(khz)
        .map_err(failed("set its clock rate, which is not this host's"))
}
