//! Console device with several ports (virtio 1.3 §5.3): streams between host and guest.
//!
//! A port carries bytes each way between a guest's character device and a host's descriptor. One
//! may be the guest's console (hvc); others are found in the guest by name. [`device`] is what
//! the driver configures, [`port`] one stream with its back-pressure, [`protocol`] the messages of
//! the control queues, [`window`] the size of the terminal, and [`handler`] the loop around them.
//!
//! # When input ends
//! The end of a port's input reaches the guest as PORT_OPEN 0, upon which reads there return 0
//! once all data is consumed. Linux then lets writes to the port wait for ever, so the end is told
//! only of ports that have no output: what needs an end of input must be a port of its own.
//!
//! # When output is slow
//! Data stays in the guest's queue until the host takes it, so the guest's writers wait as for any
//! pipe. Linux spins while it waits for its console (hvc) port; a terminal that is stopped there
//! stops the guest. Output that no process of the host reads any more is dropped and counted, and
//! the guest goes on.

mod device;
mod handler;
mod port;
mod protocol;
#[cfg(test)]
mod tests;
mod window;

use crate::host::{Input, Output};

pub use self::device::{Console, ConsoleError};
pub use self::port::ConsoleState;
pub use self::window::ConsoleHandle;

/// A stream to be offered to the guest.
#[derive(Debug)]
pub struct Port {
    /// What the guest finds it by: 1 to 64 bytes.
    pub name: String,
    /// Whether the guest makes it a console (hvc).
    pub console: bool,
    pub input: Option<Input>,
    pub output: Option<Output>,
}
