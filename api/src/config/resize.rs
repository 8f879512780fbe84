//! Sizes that change while a VM runs.

use serde::{Deserialize, Serialize};

use super::{ConfigError, MemoryConfig, Part, VmConfig};
use crate::units::{ByteSize, CpuCount};

/// Absolute sizes; what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resize {
    /// vCPUs the guest may use.
    pub desired_vcpus: Option<CpuCount>,
    /// All the memory that the VM is to have.
    pub desired_ram: Option<ByteSize>,
    /// Memory that the balloon is to take from the guest.
    pub desired_balloon: Option<ByteSize>,
}

impl Resize {
    /// Options of `podvmm api resize`, and the field that each sets.
    pub const OPTIONS: &[(&str, &str)] = &[
        ("cpus", "desired_vcpus"),
        ("memory", "desired_ram"),
        ("balloon", "desired_balloon"),
    ];
}

impl VmConfig {
    /// Has the VM be of these sizes from now on, also when it boots again. Sizes of devices that it does
    /// not have are left out.
    pub fn resize(&mut self, sizes: Resize) -> Result<(), ConfigError> {
        if let Some(count) = sizes.desired_vcpus {
            self.cpus = self.cpus.with_boot(count)?;
        }
        if let Some(ByteSize(bytes)) = sizes.desired_ram {
            let plugged = ByteSize(bytes.saturating_sub(self.memory.size.bytes()));
            let memory = MemoryConfig {
                hotplugged_size: plugged,
                ..self.memory.clone()
            };
            self.memory = memory.checked()?;
        }
        if let (Some(bytes), Some(balloon)) = (sizes.desired_balloon, &mut self.balloon) {
            balloon.size = bytes;
        }
        Ok(())
    }
}
