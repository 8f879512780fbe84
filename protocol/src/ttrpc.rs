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

use std::fmt;

pub use self::client::{CallError, Client};
pub use self::reception::receive;
pub use self::server::{Call, Service, Workers, serve};

/// Longest message. What is longer is refused and passed over.
pub const MAX_MESSAGE: u32 = 4 << 20;

#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    timeout_nano: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<StatusMessage>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusMessage {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// Why a call failed, by gRPC's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

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
