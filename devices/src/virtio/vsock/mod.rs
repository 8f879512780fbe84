//! Socket device (virtio 1.3 §5.10): streams between the guest's vsock and unix sockets of the host.
//!
//! A host's program connects to the device's socket, writes `CONNECT <port>\n` in any case, reads
//! `OK <number>\n`, and from then on talks to the guest's program that listens on that port. A
//! guest's program that connects to port `P` of the host (CID 2) reaches the host's program that
//! listens on the unix socket `<path>_<P>`.
//!
//! [`packet`] is what travels in the rings, [`connection`] one stream with its credit and
//! back-pressure, [`muxer`] all of them, [`handler`] the rings and the loop around them, and
//! [`device`] what the driver configures. Nothing of the host's or the guest's is held beyond
//! [`connection::WINDOW`] bytes for each connection, of which there are at most
//! [`muxer::MAX_CONNECTIONS`].
//!
//! # Early callers
//! A caller before the guest's driver is there waits in the socket's backlog. One whose port has
//! no listener yet is held, and the guest asked again for [`connection::PATIENCE`]; then its
//! connection is closed.

mod connection;
mod device;
mod handler;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use self::device::{Vsock, VsockConfig, VsockState};
