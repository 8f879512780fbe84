//! What a user may ask of podvmm: a VM's configuration, its units and ranges,
//! and how they are written on a command line.
//!
//! A leaf crate that knows no KVM. Parsing is where nonsense ends: a
//! [`VmConfig`] that exists is within its documented ranges, so the crates
//! behind it check only against the host.
#![forbid(unsafe_code)]

mod client;
mod config;
mod error;
pub mod http;
mod json;
mod options;
mod request;
pub mod route;
mod units;

pub use config::{
    Addition, BalloonConfig, ConfigError, CpusConfig, DiskConfig, FsCache, FsConfig, FsSource,
    ImageType, MacAddr, MemoryConfig, NetConfig, Others, Output, Part, PayloadConfig, RateLimit,
    RateLimits, RngConfig, RngSource, TapSource, VmConfig, VsockConfig,
};
pub use error::{ApiError, JsonError, State, chain};
pub use options::OptionsError;
pub use request::{Answer, Ping, Request, Resize, Restore, Snapshot, VmInfo};
pub use units::{ByteSize, CpuCount, RamSize, UnitError};
