//! Why KVM's state of a vCPU or of the board could not be read or set.

use thiserror::Error;

/// Which part of a vCPU could not be set up.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// KVM_SET_CPUID2 failed.
    #[error("set CPUID")]
    SetCpuid(#[source] kvm_ioctls::Error),
    /// KVM_SET_MSRS failed.
    #[error("set model-specific registers")]
    SetMsrs(#[source] kvm_ioctls::Error),
    /// KVM_SET_MSRS stopped early.
    #[error("KVM refuses model-specific register {0:#x}")]
    MsrRefused(u32),
    /// KVM_GET_LAPIC or KVM_SET_LAPIC failed.
    #[error("set up the local APIC")]
    SetLapic(#[source] kvm_ioctls::Error),
    /// KVM_GET_SREGS or KVM_SET_SREGS failed.
    #[error("set system registers")]
    SetSregs(#[source] kvm_ioctls::Error),
    /// KVM_SET_REGS failed.
    #[error("set general registers")]
    SetRegs(#[source] kvm_ioctls::Error),
    /// What a snapshot says of it was refused.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why state could not be read from KVM or given to it.
#[derive(Debug, Error)]
#[error("{act}")]
pub struct StateError {
    act: &'static str,
    source: kvm_ioctls::Error,
}

/// Makes a [`StateError`] of what KVM refused while podvmm did `act`. For `map_err`.
pub(super) fn failed(act: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError { act, source }
}
