//! Memory balloon (virtio 1.3 §5.5): memory that the guest does not need goes back to the host.
//!
//! Three ways: the host sets a target and the driver *inflates* the balloon with pages it then
//! leaves alone; the driver *reports* free pages by itself; and *statistics* say what a target
//! would cost the guest. [`device`] is what the driver configures, [`target`] what
//! the host asks for by a [`BalloonHandle`]; [`handler`] serves the rings; [`statistics`] reads what the driver counts;
//! [`discard`] gives pages back.

mod device;
mod discard;
mod handler;
mod statistics;
mod target;
#[cfg(test)]
mod tests;

pub use self::device::{Balloon, BalloonConfig, BalloonState};
pub use self::statistics::Statistics;
pub use self::target::BalloonHandle;

/// A page of the balloon, whatever the guest's pages are.
pub const PAGE_BYTES: u64 = 4096;
