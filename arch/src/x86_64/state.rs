//! What a snapshot keeps of the CPUs and the board: what KVM holds of them.
//!
//! KVM checks what it is given, so nothing here is checked twice. The order matters: some
//! registers mean what they mean only after others are set.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MP_STATE_UNINITIALIZED, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::error::{VcpuError, failed};
use super::mitigations;
use super::msr;
use super::raw::{Raw, RawList};
use super::tsc::{self, Tsc};
use super::vcpu::{Identity, power_on};

pub use super::error::StateError;

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// Interrupt controllers, timer and clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BoardState {
    chips: [Raw<kvm_irqchip>; 3],
    pit: Raw<kvm_pit_state2>,
    /// Nanoseconds of the guest's own clock.
    clock_ns: u64,
}

impl BoardState {
    /// Reads it while no vCPU runs.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip)
                .map_err(failed("read an interrupt controller"))?;
        }
        let clock = vm.get_clock().map_err(failed("read the clock"))?;
        Ok(Self {
            chips: chips.map(Raw),
            pit: Raw(vm.get_pit2().map_err(failed("read the timer"))?),
            clock_ns: clock.clock,
        })
    }

    /// After the vCPUs' own state.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        vm.set_pit2(&self.pit.0).map_err(failed("set the timer"))?;
        // Without a flag the clock continues from this value: for the guest no time has passed.
        let clock = kvm_clock_data {
            clock: self.clock_ns,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("set the clock"))?;
        for (chip, chip_id) in self.chips.iter().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id, ..chip.0 };
            vm.set_irqchip(&chip)
                .map_err(failed("set an interrupt controller"))?;
        }
        Ok(())
    }
}

/// The CPUID that the vCPUs of a guest have, as vCPU 0 has it: what the guest saw, so that a podvmm that
/// hides more or less, or describes the topology otherwise, does not change it under the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CpuFeatures(RawList<kvm_cpuid_entry2>);

impl CpuFeatures {
    /// The features of a guest with `cpuid` ([`super::cpuid::for_guest`]).
    pub fn of(cpuid: &CpuId) -> Self {
        Self(RawList(cpuid.as_slice().to_vec()))
    }

    /// The CPUID as the guest saw it. `None` if it is more leaves than KVM knows.
    pub fn cpuid(&self) -> Option<CpuId> {
        CpuId::from_entries(&self.0.0).ok()
    }
}

/// The model-specific registers that a snapshot keeps of a vCPU.
#[derive(Clone, Debug)]
pub struct MsrIndices(Vec<u32>);

impl MsrIndices {
    pub fn of(kvm: &Kvm) -> Result<Self, StateError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(failed("list model-specific registers"))?;
        Ok(Self(msr::kept(list.as_slice())))
    }
}

/// The state of a vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp: Raw<kvm_mp_state>,
    /// State of a vCPU that was started; `None` if it never was: then it is as at boot.
    started: Option<Box<Started>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Started {
    tsc_khz: u32,
    regs: Raw<kvm_regs>,
    sregs: Raw<kvm_sregs>,
    debug: Raw<kvm_debugregs>,
    xcrs: Raw<kvm_xcrs>,
    xsave: Raw<[u32; 1024]>,
    lapic: Raw<kvm_lapic_state>,
    events: Raw<kvm_vcpu_events>,
    msrs: RawList<kvm_msr_entry>,
}

impl VcpuState {
    /// Reads it while the vCPU is not in KVM_RUN, and after it has finished what it left for.
    pub fn save(vcpu: &VcpuFd, indices: &MsrIndices) -> Result<Self, StateError> {
        // First: reading it lets a start-up interrupt that is due take effect.
        let mp = vcpu
            .get_mp_state()
            .map_err(failed("read a vCPU's run state"))?;
        let waits_to_be_started = mp.mp_state == KVM_MP_STATE_UNINITIALIZED;
        let started = (!waits_to_be_started).then(|| Started::save(vcpu, indices));
        Ok(Self {
            mp: Raw(mp),
            started: started.transpose()?.map(Box::new),
        })
    }

    /// The state of a vCPU that was never started.
    pub fn not_started() -> Self {
        let mp = kvm_mp_state {
            mp_state: KVM_MP_STATE_UNINITIALIZED,
        };
        Self {
            mp: Raw(mp),
            started: None,
        }
    }

    /// How many of `vcpus`, from the first one, there must be for all that their guest had started.
    pub fn last_started(vcpus: &[Self]) -> u8 {
        let started = vcpus.iter().zip(1..).filter(|(it, _)| it.started.is_some());
        started.map(|(_, number)| number).fold(0, u8::max)
    }

    /// The time stamp counter of the vCPUs of a snapshot: that of the first one that was started.
    pub fn tsc(vcpus: &[Self]) -> Option<Tsc> {
        let started = vcpus.iter().find_map(|vcpu| vcpu.started.as_deref())?;
        Some(Tsc {
            khz: started.tsc_khz,
            value: msr::tsc(&started.msrs.0)?,
        })
    }

    /// What the vCPUs of a snapshot were told that this host's are not: mitigations that the guest does
    /// without, in words. None if it lacks nothing.
    pub fn missing_mitigations(vcpus: &[Self], kvm: &Kvm) -> Option<String> {
        let started = vcpus.iter().find_map(|vcpu| vcpu.started.as_deref())?;
        let told = msr::arch_capabilities(&started.msrs.0);
        mitigations::missing(told, msr::supported_arch_capabilities(kvm))
    }

    /// Gives it to a vCPU that has run nothing yet. One that was never started takes `tsc`, which is
    /// the others', so they must have been restored within the last second.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        identity: Identity<'_>,
        tsc: Option<Tsc>,
    ) -> Result<(), VcpuError> {
        identity.give(vcpu)?;
        match &self.started {
            Some(started) => started.restore(vcpu)?,
            None => {
                power_on(vcpu, identity.cpuid)?;
                tsc.map_or(Ok(()), |tsc| tsc.set(vcpu))?;
            }
        }
        vcpu.set_mp_state(self.mp.0)
            .map_err(failed("set its run state"))?;
        // So that the guest does not take the time it was not there for a lockup. One that does not
        // use KVM's clock cannot be told.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

impl Started {
    fn save(vcpu: &VcpuFd, indices: &MsrIndices) -> Result<Self, StateError> {
        let registers = failed("read a vCPU's registers");
        let regs = vcpu.get_regs().map_err(&registers)?;
        let sregs = vcpu.get_sregs().map_err(&registers)?;
        let xsave = vcpu.get_xsave().map_err(&registers)?;
        let xcrs = vcpu.get_xcrs().map_err(&registers)?;
        let debug = vcpu.get_debug_regs().map_err(&registers)?;
        let lapic = vcpu
            .get_lapic()
            .map_err(failed("read a vCPU's local APIC"))?;
        let tsc_khz = vcpu
            .get_tsc_khz()
            .map_err(failed("read a vCPU's clock rate"))?;
        let msrs = msr::read(vcpu, &indices.0)
            .map_err(failed("read a vCPU's model-specific registers"))?;
        let events = vcpu
            .get_vcpu_events()
            .map_err(failed("read a vCPU's events"))?;
        Ok(Self {
            tsc_khz,
            regs: Raw(regs),
            sregs: Raw(sregs),
            debug: Raw(debug),
            xcrs: Raw(xcrs),
            xsave: Raw(xsave.region),
            lapic: Raw(lapic),
            events: Raw(events),
            msrs: RawList(msrs),
        })
    }

    fn restore(&self, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        let registers = failed("set its registers");
        tsc::set_khz(vcpu, self.tsc_khz)?;
        vcpu.set_regs(&self.regs.0).map_err(&registers)?;
        vcpu.set_sregs(&self.sregs.0).map_err(&registers)?;
        self.restore_xsave(vcpu).map_err(&registers)?;
        // KVM takes none for an error, and that is what a CPU without XSAVE has.
        if self.xcrs.0.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs.0).map_err(&registers)?;
        }
        vcpu.set_debug_regs(&self.debug.0).map_err(&registers)?;
        // Before the deadline of its timer, which is a model-specific register.
        vcpu.set_lapic(&self.lapic.0).map_err(VcpuError::SetLapic)?;
        msr::write(vcpu, &self.msrs.0)?;
        vcpu.set_vcpu_events(&self.events.0)
            .map_err(failed("set its events"))?;
        Ok(())
    }

    #[expect(
        unsafe_code,
        reason = "KVM_SET_XSAVE reads as much as features make it"
    )]
    fn restore_xsave(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let xsave = kvm_xsave {
            region: self.xsave.0,
            ..Default::default()
        };
        // SAFETY: KVM reads more than the structure only for features that this process must have
        // asked for with arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), and it never does.
        unsafe { vcpu.set_xsave(&xsave) }
    }
}
