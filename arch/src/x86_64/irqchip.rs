//! The in-kernel interrupt controllers and timer: PIC, IOAPIC, local APICs, PIT.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_pit_config, kvm_reinject_control};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_io_nr;

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
    /// KVM_REINJECT_CONTROL failed.
    #[error("have the in-kernel timer drop ticks that the guest missed")]
    DropTicks(#[source] kvm_ioctls::Error),
}

ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);

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
    vm.create_pit2(pit).map_err(IrqchipError::CreatePit)?;
    drop_missed_ticks(vm).map_err(IrqchipError::DropTicks)
}

/// Has the timer drop ticks that the guest missed instead of repeating each one later, which only
/// kernels need that count them to tell the time (KVM_REINJECT_CONTROL, kvm/api.rst 4.99). To know which
/// ones were missed KVM must see each end of interrupt, so while it repeats them it does without AMD's
/// virtual interrupt controller (AVIC) in the whole VM.
#[expect(unsafe_code, reason = "kvm-ioctls has no function for it")]
fn drop_missed_ticks(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let control = kvm_reinject_control {
        pit_reinject: 0,
        ..Default::default()
    };
    // SAFETY: KVM reads a `kvm_reinject_control` from the address it is given, which is that of one
    // that lives until the call returns, and writes nothing.
    let result = unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL(), &control) };
    if result == 0 {
        Ok(())
    } else {
        Err(kvm_ioctls::Error::last())
    }
}
