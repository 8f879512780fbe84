//! What a user may ask of podvmm: a VM's configuration, its units and ranges,
//! and how they are written on a command line.
//!
//! A leaf crate that knows no KVM. Parsing is where nonsense ends: a
//! [`VmConfig`] that exists is within its documented ranges, so the crates
//! behind it check only against the host.
#![forbid(unsafe_code)]

mod config;
pub mod http;
mod options;
mod units;

pub use config::{
    ConfigError, CpusConfig, DiskConfig, KernelConfig, MemoryConfig, Output, VmConfig,
};
pub use options::OptionsError;
pub use units::{ByteSize, CpuCount, RamSize, UnitError};
