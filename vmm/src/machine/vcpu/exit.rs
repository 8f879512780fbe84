//! Exits after which the guest cannot go on, told so that the reader knows
//! where it was and what it executed.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::inbox::{Ending, Site};

/// The longest x86 instruction.
const INSTRUCTION_BYTES: usize = 15;

/// Where a vCPU begins after a reset (Intel SDM Vol. 3, "First Instruction Executed", less the segment's base).
const RESET_RIP: u64 = 0xfff0;

impl Site {
    fn of(vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Self {
        let Ok(regs) = vcpu.get_regs() else {
            return Self {
                rip: None,
                bytes: Vec::new(),
            };
        };
        let mut bytes = vec![0; INSTRUCTION_BYTES];
        let read = match vcpu.translate_gva(regs.rip) {
            Ok(at) if at.valid != 0 => memory
                .read(&mut bytes, GuestAddress(at.physical_address))
                .unwrap_or(0),
            _ => 0,
        };
        bytes.truncate(read);
        Self {
            rip: Some(regs.rip),
            bytes,
        }
    }

    /// `None` after a reset: on AMD hosts KVM resets a vCPU that shuts down before it says so, and where
    /// the guest was is lost.
    fn unless_reset(self) -> Option<Self> {
        (self.rip != Some(RESET_RIP)).then_some(self)
    }
}

/// What KVM_RUN returned, without what it borrowed.
pub(super) enum Kind {
    Shutdown,
    Halt,
    InternalError,
    FailedEntry { reason: u64, cpu: u32 },
    SystemEvent(u32),
    Other(String),
    RunFailed(kvm_ioctls::Error),
}

impl Kind {
    pub(super) fn of(exit: &VcpuExit) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::Hlt => Self::Halt,
            VcpuExit::InternalError => Self::InternalError,
            VcpuExit::FailEntry(reason, cpu) => Self::FailedEntry {
                reason: *reason,
                cpu: *cpu,
            },
            VcpuExit::SystemEvent(event, _) => Self::SystemEvent(*event),
            other => Self::Other(format!("{other:?}")),
        }
    }
}

/// The end that an exit of `kind` means.
pub(super) fn ending(kind: Kind, vcpu: &mut VcpuFd, memory: &GuestMemoryMmap) -> Ending {
    let site = Site::of(vcpu, memory);
    match kind {
        Kind::Shutdown => Ending::TripleFault(site.unless_reset()),
        Kind::Halt => Ending::Halted,
        Kind::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET) => Ending::Reset,
        Kind::SystemEvent(KVM_SYSTEM_EVENT_CRASH) => {
            Ending::Panic("reported through a KVM system event".into())
        }
        Kind::SystemEvent(other) => Ending::Kvm(format!("unknown KVM system event {other} {site}")),
        Kind::InternalError => Ending::Kvm(internal_error(vcpu, &site)),
        Kind::FailedEntry { reason, cpu } => Ending::Kvm(format!(
            "the CPU refused to enter the guest (hardware reason {reason:#x}, host CPU {cpu}) {site}"
        )),
        Kind::Other(exit) => Ending::Kvm(format!(
            "KVM exit that podvmm does not handle: {exit} {site}"
        )),
        Kind::RunFailed(error) => Ending::Kvm(format!("KVM_RUN failed: {error} {site}")),
    }
}

fn internal_error(vcpu: &mut VcpuFd, site: &Site) -> String {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM filled
    // this member of the union.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data: Vec<_> = internal
        .data
        .iter()
        .take(internal.ndata as usize)
        .map(|word| format!("{word:#x}"))
        .collect();
    let what = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met simultaneous exceptions",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "KVM met an unexpected exit",
        _ => "KVM internal error",
    };
    let suberror = internal.suberror;
    format!(
        "{what} (suberror {suberror}, data {}) {site}",
        data.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_names_rip_and_bytes() {
        let site = Site {
            rip: Some(0x10_0000),
            bytes: vec![0x0f, 0x0b],
        };
        assert_eq!(site.to_string(), "at RIP 0x100000, instruction bytes 0f 0b");
    }

    #[test]
    fn the_place_of_a_vcpu_that_kvm_has_reset_is_not_known() {
        let at = |rip| Site {
            rip: Some(rip),
            bytes: Vec::new(),
        };
        assert_eq!(at(RESET_RIP).unless_reset(), None);
        assert_eq!(at(0x10_0000).unless_reset(), Some(at(0x10_0000)));
    }

    #[test]
    fn a_site_admits_what_could_not_be_read() {
        let site = Site {
            rip: None,
            bytes: Vec::new(),
        };
        assert_eq!(
            site.to_string(),
            "at an unknown RIP, instruction bytes unreadable"
        );
    }
}
