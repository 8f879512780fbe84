//! What can be asked of podvmm: what a VM is made of, its units and ranges, as JSON and on a command line;
//! the requests of the HTTP API, a server for them, and a client.
//!
//! A leaf crate that knows no KVM. Parsing is where nonsense ends: a [`VmConfig`] that was parsed is
//! within its documented ranges, so the crates behind it check only against the host.
//!
//! A client of a podvmm that serves its API:
//!
//! ```no_run
//! use api::http::Client;
//! use api::{PayloadConfig, VmConfig};
//!
//! let mut podvmm = Client::connect("/run/vm.api".as_ref())?;
//! podvmm.create(&VmConfig {
//!     payload: PayloadConfig { kernel: "/boot/vmlinux".into(), ..PayloadConfig::default() },
//!     ..VmConfig::default()
//! })?;
//! podvmm.boot()?;
//! println!("{} bytes", podvmm.info()?.memory_actual_size);
//! # Ok::<(), api::http::ClientError>(())
//! ```
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

pub use config::*;
pub use error::{ApiError, State, chain};
pub use json::Misread;
pub use options::OptionsError;
pub use request::{Answer, DiskSize, Ping, Plugged, Request, Restore, Snapshot, VmInfo};
pub use units::{ByteSize, CpuCount, RamSize, UnitError};
