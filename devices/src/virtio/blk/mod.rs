//! Block device (virtio 1.3 §5.2): a raw image or a host's block device as the guest's disk.
//!
//! [`image`] is the file with its limits, [`request`] what the guest may ask, [`device`] what the
//! driver configures and [`handler`] what serves one queue, on a thread of its own: reads and
//! writes go straight between the file and guest memory, and block where the host does.

mod device;
mod handler;
mod image;
mod request;
#[cfg(test)]
mod tests;

pub use self::device::{Blk, BlkConfig};
pub use self::image::BlkError;

/// The unit of every offset and length in requests (virtio 1.3 §5.2.4), whatever the block size.
const SECTOR: u64 = 512;
