//! The size of the host's terminal, as the guest's console is told of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::protocol::Size;

/// The size of the console that the host shows, and who must know when it changes.
#[derive(Debug)]
pub(super) struct Window {
    /// Columns in the upper half. 0 while unknown.
    pub(super) size: AtomicU32,
    pub(super) changed: EventFd,
}

impl Window {
    pub(super) fn size(&self) -> Option<Size> {
        let [r0, r1, c0, c1] = self.size.load(Ordering::SeqCst).to_le_bytes();
        let size = Size {
            cols: u16::from_le_bytes([c0, c1]),
            rows: u16::from_le_bytes([r0, r1]),
        };
        (size.cols > 0 && size.rows > 0).then_some(size)
    }
}

/// Tells a console what its host's terminal does.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(pub(super) Arc<Window>);

impl ConsoleHandle {
    /// The terminal has `cols` by `rows` characters. The guest's console ports are told.
    pub fn resize(&self, cols: u16, rows: u16) {
        let size = u32::from(cols) << 16 | u32::from(rows);
        self.0.size.store(size, Ordering::SeqCst);
        // Fails only when 2^64 - 2 changes are already due to be seen.
        let _ = self.0.changed.write(1);
    }
}
