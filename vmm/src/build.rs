//! From a configuration to a machine, in the order in which the parts need one another. What fails drops
//! what was made so far.
//!
//! [`boot()`] and [`restore()`] are the two ways; [`frame`] is what both have, [`parts`] its devices.

mod archive;
mod boot;
mod frame;
mod image;
mod parts;
mod restore;
mod share;
mod tap;

use std::io;

use arch::acpi::AcpiError;
use arch::boot::BootError;
use arch::irqchip::IrqchipError;
use arch::mptable::MptableError;
use devices::bus::BusError;
use thiserror::Error;

pub(crate) use self::boot::boot;
pub(crate) use self::parts::{plug, rates};
pub(crate) use self::restore::restore;
use crate::build::image::LoadError;
use crate::console::command::Command;
use crate::console::streams::StreamError;
use crate::console::transcript::Transcript;
use crate::inbox::Inbox;
use crate::machine::attach::AttachError;
use crate::machine::vcpus::VcpuError;
use crate::memory::RamError;
use crate::memory::remote_ram::RemoteRamError;
use crate::snapshot::RestoreError;

/// Why a machine could not be made.
#[derive(Debug, Error)]
pub(crate) enum BuildError {
    /// `/dev/kvm` is missing, closed to us or too old.
    #[error("{0}")]
    Kvm(String, #[source] kvm_ioctls::Error),
    /// More vCPUs than KVM allows.
    #[error("{wanted} vCPUs: this host's KVM allows at most {max}")]
    TooManyCpus { wanted: u8, max: usize },
    /// RAM could not be had or filled.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Interrupt controllers and timer could not be set up.
    #[error(transparent)]
    Irqchip(#[from] IrqchipError),
    /// Kernel or initramfs could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Boot parameters could not be set up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The MP table could not be set up.
    #[error(transparent)]
    Mptable(#[from] MptableError),
    /// The ACPI tables could not be set up.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Port devices would lie on one another.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device's host side could not be set up.
    #[error("{device}")]
    Device {
        device: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device could not be attached to the guest.
    #[error("attach {device}")]
    Attach { device: String, source: AttachError },
    /// A console or stream could not be opened.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// CPUID has no room for the VM's topology.
    #[error("more CPUID leaves than KVM takes")]
    ManyLeaves,
    /// A vCPU could not be made or set up.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A thread could not be started.
    #[error("start the thread of {0}")]
    Thread(String, #[source] io::Error),
    /// The snapshot does not fit.
    #[error(transparent)]
    Snapshot(#[from] RestoreError),
    /// The snapshot's RAM could not be mapped.
    #[error("map the snapshot's RAM")]
    SnapshotRam(#[source] io::Error),
    /// The process that is to give the snapshot's RAM does not.
    #[error(transparent)]
    RemoteRam(#[from] RemoteRamError),
    /// A device's state in the snapshot could not be used.
    #[error("the state of {device} in the snapshot")]
    DeviceState {
        device: String,
        source: devices::virtio::StateError,
    },
    /// The interrupt controllers', timer's or clock's state in the snapshot could not be used.
    #[error("the state of the board in the snapshot")]
    BoardState(#[source] arch::state::StateError),
}

/// What a VM is given besides its configuration.
#[derive(Debug)]
pub(crate) struct Surroundings {
    /// What the agent is to run, if anything.
    pub command: Option<Command>,
    /// Where the machine reports.
    pub inbox: Inbox,
    /// Keeps the end of what consoles print.
    pub transcript: Transcript,
    /// Whether the terminal is in raw mode, so that escapes end the VM.
    pub terminal: bool,
}
