//! What a PC has always had and a guest expects before it finds virtio.

pub mod i8042;
pub mod serial;

pub use i8042::I8042;
pub use serial::{Serial, SerialState};
