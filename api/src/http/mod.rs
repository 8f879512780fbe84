//! HTTP/1.1 on a unix socket, as Cloud Hypervisor's clients speak it (RFC 9112, the part of it
//! that an API needs), with file descriptors passed beside a request.
//!
//! [`message`] is a request and an answer, [`connection`] turns bytes into requests and knows no
//! socket, [`server`] is the one thread that serves all clients, [`client`] the other end.

mod client;
mod connection;
mod message;
mod server;
#[cfg(feature = "test-utils")]
pub mod testing;

pub use self::client::{Client, ClientError};
pub use self::message::{Method, Request, Response};
pub use self::server::{Next, Reply, Server};
