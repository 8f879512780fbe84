//! ttrpc: what containerd, its shims and the Kata agent speak on a stream. Calls with one request
//! and one answer; several may be under way at once, told apart by the number of their stream.
//!
//! There is a crate of that name. Its agent would be larger by an asynchronous run-time or by
//! rust-protobuf, and each MiB of initramfs is a guest's start delayed; the protocol is a header of
//! ten bytes.

mod client;
mod frame;
mod reception;
mod server;

#[expect(
    unreachable_pub,
    reason = "all that is generated is `pub`, and only `Code` leaves this module"
)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/ttrpc.messages.rs"));
}

use std::fmt;

pub use self::client::{CallError, Client};
pub use self::messages::Code;
use self::messages::{Request, Response, StatusMessage};
pub use self::reception::receive;
pub use self::server::{Call, Service, Workers, serve};

/// Longest message. What is longer is refused and passed over.
pub const MAX_MESSAGE: u32 = 4 << 20;

/// Why a call failed, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// What kind of failure it is.
    pub code: Code,
    /// The cause, for a person.
    pub message: String,
}

impl Status {
    pub fn new(code: Code, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }

    /// There is no such method.
    pub fn unimplemented(service: &str, method: &str) -> Self {
        Self::new(
            Code::Unimplemented,
            format_args!("there is no {service}/{method}"),
        )
    }
}

#[cfg(test)]
mod tests;
