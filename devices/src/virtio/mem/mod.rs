//! Memory device (virtio 1.3 §5.15): RAM that the guest gets and gives back in blocks while it runs.
//!
//! [`device`] is what the driver configures, [`target`] what the host asks for by a [`MemHandle`];
//! [`handler`] answers the driver's requests; [`plugmap`] knows which blocks
//! are plugged; [`blocks`] gives them host memory and takes it back.

mod blocks;
mod device;
mod handler;
mod plugmap;
mod target;
#[cfg(test)]
mod tests;

pub use self::device::Mem;
pub use self::target::{MemError, MemHandle, MemState, MemorySizes};
