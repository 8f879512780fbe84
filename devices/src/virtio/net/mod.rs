//! Network device (virtio 1.3 §5.1): the guest's Ethernet frames on a tap of the host.
//!
//! [`tap`] is the host's interface, [`device`] what the driver configures, [`handler`] a pair of
//! rings with its queue of the tap, [`control`] the ring by which the driver says how many pairs
//! it uses.
//!
//! A frame goes between guest memory and the tap in one system call, with the header that says
//! which checksums and segments are still to be made (§5.1.6): the tap takes and gives the same
//! header, so the device never looks into frames.

mod control;
mod device;
mod handler;
mod tap;
#[cfg(test)]
mod tests;

pub use self::control::NetState;
pub use self::device::{Net, NetConfig, NetError, Offloads};
pub use self::tap::{Tap, TapError};
