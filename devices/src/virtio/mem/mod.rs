//! Memory device (virtio 1.3 §5.15): RAM that the guest gets and gives back in blocks while it runs.
//!
//! [`device`] is what the driver configures and the [`MemHandle`] by which the host says how much
//! the guest should have; [`handler`] answers the driver's requests; [`plugmap`] knows which blocks
//! are plugged; [`blocks`] gives them host memory and takes it back.

mod blocks;
mod device;
mod handler;
mod plugmap;
#[cfg(test)]
mod tests;

pub use self::device::{Mem, MemError, MemHandle, MemState, MemorySizes};
