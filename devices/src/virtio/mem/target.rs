//! What the host wants of a memory device, and what is plugged.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::blocks::block_len;
use super::plugmap::PlugMap;

/// Why there is no memory device.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    #[error("set the hotplug region aside")]
    Region(#[source] io::Error),
    #[error("create an event fd")]
    EventFd(#[source] io::Error),
    #[error("{requested} bytes: at most {region} can be plugged")]
    TooLarge { requested: u64, region: u64 },
}

/// How much memory the guest should have of the device, and how much it has, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySizes {
    pub requested: u64,
    pub plugged: u64,
}

/// Shared between device, handler and handle.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) requested: AtomicU64,
    pub(super) plugged: AtomicU64,
    /// Readable when the driver has not been told of the latest `requested`.
    pub(super) changed: EventFd,
    pub(super) region: u64,
    pub(super) block_len: u64,
}

/// Says how much memory the guest should have.
#[derive(Clone, Debug)]
pub struct MemHandle(pub(super) Arc<Target>);

impl MemHandle {
    /// Asks the guest to plug or unplug until it has `bytes`, rounded up to whole blocks. Until
    /// it has followed it may have more, but it never gets more.
    pub fn request(&self, bytes: u64) -> Result<(), MemError> {
        let target = &self.0;
        if bytes > target.region {
            return Err(MemError::TooLarge {
                requested: bytes,
                region: target.region,
            });
        }
        let bytes = bytes.next_multiple_of(target.block_len);
        target.requested.store(bytes, Ordering::SeqCst);
        target.changed.write(1).map_err(MemError::EventFd)
    }

    pub fn sizes(&self) -> MemorySizes {
        MemorySizes {
            requested: self.0.requested.load(Ordering::SeqCst),
            plugged: self.0.plugged.load(Ordering::SeqCst),
        }
    }
}

/// What a snapshot keeps of a memory device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    pub(super) requested: u64,
    /// A bit for each block, the first in the lowest.
    pub(super) plugged: Vec<u64>,
}

impl MemState {
    /// What is plugged of a region of `len` bytes, in bytes from its start. None if the state is of
    /// a region of another length.
    pub fn plugged(&self, len: u64) -> Option<Vec<Range<u64>>> {
        let block_len = block_len(len);
        let blocks = usize::try_from(len / block_len).ok()?;
        let map = PlugMap::from_words(blocks, &self.plugged)?;
        let bytes = |run: Range<usize>| run.start as u64 * block_len..run.end as u64 * block_len;
        Some(map.runs().into_iter().map(bytes).collect())
    }

    pub(super) fn new(target: &Target, map: Option<&PlugMap>) -> Self {
        Self {
            requested: target.requested.load(Ordering::SeqCst),
            plugged: map.map(|map| map.words().to_vec()).unwrap_or_default(),
        }
    }
}
