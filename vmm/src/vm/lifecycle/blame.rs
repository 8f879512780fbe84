//! Whether the client or the host is to blame for what could not be done.

use api::{ApiError, ConfigError, chain};

use devices::virtio::ResizeError;

use crate::build::BuildError;
use crate::machine::vcpus::VcpuError;
use crate::memory::remote_ram::RemoteRamError;
use crate::snapshot::{RecordError, SaveError};

/// A configuration that contradicts itself.
pub(super) fn contradiction(error: ConfigError) -> ApiError {
    ApiError::Impossible(chain(&error))
}

/// A VM that cannot be built.
pub(super) fn refusal(error: BuildError) -> ApiError {
    let chain = chain(&error);
    match error {
        BuildError::Kvm(..)
        | BuildError::SnapshotRam(_)
        | BuildError::Irqchip(_)
        | BuildError::Bus(_)
        | BuildError::RemoteRam(
            RemoteRamError::Userfault(_)
            | RemoteRamError::Register(_)
            | RemoteRamError::Watch { .. },
        )
        | BuildError::ManyLeaves
        | BuildError::Vcpu(
            VcpuError::Create { .. } | VcpuError::Configure { .. } | VcpuError::Thread { .. },
        )
        | BuildError::Thread(..) => ApiError::Host(chain),
        BuildError::TooManyCpus { .. }
        | BuildError::Ram(_)
        | BuildError::Load(_)
        | BuildError::Boot(_)
        | BuildError::Mptable(_)
        | BuildError::Acpi(_)
        | BuildError::Device { .. }
        | BuildError::Attach { .. }
        | BuildError::Snapshot(_)
        | BuildError::RemoteRam(
            RemoteRamError::NotPrivate
            | RemoteRamError::Connect { .. }
            | RemoteRamError::HandOver { .. },
        )
        | BuildError::DeviceState { .. }
        | BuildError::Vcpu(VcpuError::Restore { .. })
        | BuildError::BoardState(_)
        | BuildError::Stream(_) => ApiError::Impossible(chain),
    }
}

/// A disk that cannot have another size.
pub(super) fn not_resized(error: ResizeError) -> ApiError {
    let chain = chain(&error);
    match error {
        ResizeError::Fixed
        | ResizeError::Odd { .. }
        | ResizeError::ReadOnly
        | ResizeError::BlockDevice(_) => ApiError::Impossible(chain),
        ResizeError::File(_) | ResizeError::Busy(_) | ResizeError::Resume(_) => {
            ApiError::Host(chain)
        }
    }
}

/// A snapshot that cannot be written.
pub(super) fn not_saved(error: SaveError) -> ApiError {
    let chain = chain(&error);
    match error {
        SaveError::Command | SaveError::Share(_) | SaveError::Busy(_) => {
            ApiError::Impossible(chain)
        }
        SaveError::File { .. }
        | SaveError::Board(_)
        | SaveError::Vcpu { .. }
        | SaveError::NoVcpu(_)
        | SaveError::Kvm(_)
        | SaveError::Encode(_) => ApiError::Host(chain),
    }
}

/// A working set that cannot be recorded.
pub(super) fn not_recorded(error: RecordError) -> ApiError {
    let chain = chain(&error);
    match error {
        RecordError::Booted
        | RecordError::Copied
        | RecordError::Replaced(_)
        | RecordError::Busy(_) => ApiError::Impossible(chain),
        RecordError::Pages(_) | RecordError::File { .. } | RecordError::Encode(_) => {
            ApiError::Host(chain)
        }
    }
}
