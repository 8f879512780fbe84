//! The in-kernel interrupt controllers and timer: PIC, IOAPIC, local APICs, PIT.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use thiserror::Error;

use super::layout::{KVM_IDENTITY_MAP_START, KVM_TSS_START};

/// Why the interrupt controllers could not be made.
#[derive(Debug, Error)]
pub enum IrqchipError {
    /// KVM_SET_TSS_ADDR failed.
    #[error("set the TSS address at {KVM_TSS_START:#x}")]
    SetTssAddress(#[source] kvm_ioctls::Error),
    /// KVM_SET_IDENTITY_MAP_ADDR failed.
    #[error("set the identity map address at {KVM_IDENTITY_MAP_START:#x}")]
    SetIdentityMap(#[source] kvm_ioctls::Error),
    /// KVM_CREATE_IRQCHIP failed.
    #[error("create the in-kernel interrupt controllers")]
    CreateIrqchip(#[source] kvm_ioctls::Error),
    /// KVM_CREATE_PIT2 failed.
    #[error("create the in-kernel timer")]
    CreatePit(#[source] kvm_ioctls::Error),
}

/// Gives `vm` its interrupt controllers and timer. Must precede the first vCPU
/// (kvm/api.rst 4.24, KVM_CREATE_IRQCHIP).
pub fn create(vm: &VmFd) -> Result<(), IrqchipError> {
    vm.set_tss_address(KVM_TSS_START)
        .map_err(IrqchipError::SetTssAddress)?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP_START)
        .map_err(IrqchipError::SetIdentityMap)?;
    vm.create_irq_chip().map_err(IrqchipError::CreateIrqchip)?;
    // A speaker that is not there must still answer on port 0x61, which Linux
    // polls when it calibrates against the PIT.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(IrqchipError::CreatePit)
}
