//! Entropy device (virtio 1.3 §5.4): the host's random numbers for the guest.
//!
//! The smallest device, and the one to copy. [`device`] is what the driver configures, [`handler`]
//! what serves its ring.

mod device;
mod handler;

pub use self::device::Rng;
