//! A vCPU as the kernel first finds it.

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

use super::boot::Entry;
use super::{cpuid, msr, regs};

pub use super::error::VcpuError;

/// Offsets of the two local interrupt registers in the APIC's register page
/// (Intel SDM volume 3, table 11-1), and the delivery modes they get.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 0x400;
const DELIVER_EXTINT: u32 = 0x700;

/// Which vCPU of which VM one is.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Index of the vCPU, which is its APIC id, too.
    pub index: u8,
    /// The CPUID of the VM's vCPUs, but for their APIC ids ([`cpuid::for_guest`]).
    pub cpuid: &'a CpuId,
}

impl Identity<'_> {
    /// Makes `vcpu` the one it is to be, whatever state it has.
    pub(super) fn give(self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        let cpuid = cpuid::for_vcpu(self.cpuid, self.index);
        vcpu.set_cpuid2(&cpuid).map_err(VcpuError::SetCpuid)
    }
}

/// Prepares a vCPU. The first one starts at `entry`; the others wait for the
/// start-up interrupt the first one sends.
pub fn configure(vcpu: &VcpuFd, identity: Identity<'_>, entry: Entry) -> Result<(), VcpuError> {
    identity.give(vcpu)?;
    power_on(vcpu, identity.cpuid)?;
    if identity.index == 0 {
        let reset = vcpu.get_sregs().map_err(VcpuError::SetSregs)?;
        vcpu.set_sregs(&regs::system(entry, reset))
            .map_err(VcpuError::SetSregs)?;
        vcpu.set_regs(&regs::general(entry))
            .map_err(VcpuError::SetRegs)?;
    }
    Ok(())
}

/// Prepares a vCPU for a guest that runs already. It waits for the start-up interrupt
/// that another one sends, and has had the others' time stamp counter since KVM made it.
pub fn add(vcpu: &VcpuFd, identity: Identity<'_>) -> Result<(), VcpuError> {
    identity.give(vcpu)?;
    power_on(vcpu, identity.cpuid)
}

/// The state that firmware would leave a vCPU in that waits to be started.
pub(super) fn power_on(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), VcpuError> {
    msr::set_boot(vcpu, cpuid)?;
    wire_local_interrupts(vcpu)
}

/// LINT0 carries the PIC's interrupts, LINT1 NMIs: what firmware would leave.
fn wire_local_interrupts(vcpu: &VcpuFd) -> Result<(), VcpuError> {
    let mut lapic = vcpu.get_lapic().map_err(VcpuError::SetLapic)?;
    for (at, mode) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[at..].iter_mut().zip(mode.to_le_bytes()) {
            *byte = i8::from_le_bytes([value]);
        }
    }
    vcpu.set_lapic(&lapic).map_err(VcpuError::SetLapic)
}
