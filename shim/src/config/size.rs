//! How large a VM can be.

use crate::host::cpus;

const MIB: u64 = 1 << 20;

/// A VM's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u64,
}

impl Size {
    /// What the host has.
    pub(crate) fn of_host() -> Self {
        let system = rustix::system::sysinfo();
        Self {
            vcpus: u8::try_from(cpus::online()).unwrap_or(u8::MAX),
            memory_mib: system.totalram * u64::from(system.mem_unit) / MIB,
        }
    }
}
