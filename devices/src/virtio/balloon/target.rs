//! What the host wants of a balloon, and what the guest says of its memory.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::PAGE_BYTES;
use super::statistics::Statistics;

/// Shared between device, handler and handle.
#[derive(Debug)]
pub(super) struct Target {
    /// Pages the host wants.
    pub(super) pages: AtomicU32,
    /// Pages the driver says it gave.
    pub(super) actual: AtomicU32,
    pub(super) statistics: Mutex<Option<Statistics>>,
    /// Readable when the driver has not been told of the latest `pages`.
    pub(super) changed: EventFd,
    /// Readable when the host wants new statistics.
    pub(super) ask: EventFd,
}

/// Says how much the balloon is to take, and what the guest says about its memory.
#[derive(Clone, Debug)]
pub struct BalloonHandle(pub(super) Arc<Target>);

impl BalloonHandle {
    /// Asks the guest to give `bytes` to the balloon, rounded down to pages.
    pub fn set_target(&self, bytes: u64) -> io::Result<()> {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.0.pages.store(pages, Ordering::SeqCst);
        self.0.changed.write(1)
    }

    /// Bytes the balloon is to take.
    pub fn target(&self) -> u64 {
        u64::from(self.0.pages.load(Ordering::SeqCst)) * PAGE_BYTES
    }

    /// Bytes the guest says it gave. It may say anything.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::SeqCst)) * PAGE_BYTES
    }

    /// What the guest said last, if it did, and asks it for newer figures.
    pub fn statistics(&self) -> Option<Statistics> {
        // Fails only when 2^64 - 2 questions are already open.
        let _ = self.0.ask.write(1);
        *self.0.statistics.lock().expect("no panic while locked")
    }
}
