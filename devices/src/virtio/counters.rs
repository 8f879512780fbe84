//! What one virtio device has done, readable from any thread.

use serde::Serialize;

use crate::counter::Counter;

/// Shared by a device's transport and handlers; each counts its own part.
#[derive(Debug, Default, Serialize)]
pub struct Counters {
    /// Times the driver notified the device.
    pub kicks: Counter,
    /// Times the device raised its interrupt.
    pub interrupts: Counter,
    /// Requests (packets, messages) that were carried out.
    pub requests: Counter,
    /// Bytes that went from the guest to the device.
    pub bytes_out: Counter,
    /// Bytes that went from the device to the guest.
    pub bytes_in: Counter,
    /// Well-formed requests that failed, on the host or because they asked for nonsense.
    pub errors: Counter,
    /// Descriptor chains that were not well formed and so were dropped.
    pub bad_chains: Counter,
    /// Times the device had something for the driver, and the driver no buffer for it.
    pub queue_full: Counter,
    /// Register accesses that the specification forbids the driver.
    pub bad_accesses: Counter,
    /// Times the device asked for a reset because it could not go on.
    pub needs_reset: Counter,
}
