//! A shim's start by containerd from 2.3 on (containerd, api/runtime/bootstrap/v1), and what a
//! runtime tells of itself (api/types/introspection.proto).

include!(concat!(env!("OUT_DIR"), "/containerd.bootstrap.rs"));

/// The most verbose level of a log that is not for debugging.
pub const LOG_LEVEL_DEBUG: i32 = -4;
