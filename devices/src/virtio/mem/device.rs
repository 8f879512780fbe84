//! What the driver of a memory device configures, and what the host wants of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::blocks::{Blocks, block_len};
use super::handler::MemHandler;
use super::plugmap::PlugMap;
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Lender, Memory, StateError,
    VirtioDevice, read_config_bytes,
};

/// guest-request queue (virtio 1.3 §5.15.2). Linux asks for one thing at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// "The driver MUST NOT access unplugged memory" with this feature (virtio 1.3 §5.15.3).
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;

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
    region: u64,
    block_len: u64,
}

/// Says how much memory the guest should have.
#[derive(Clone, Debug)]
pub struct MemHandle(Arc<Target>);

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
    requested: u64,
    /// A bit for each block, the first in the lowest.
    plugged: Vec<u64>,
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

/// A memory device.
#[derive(Debug)]
pub struct Mem {
    start: GuestAddress,
    /// Kept over resets of the device: the driver finds what is plugged, and unplugs it if it likes.
    blocks: Lender<Blocks>,
    target: Arc<Target>,
    counters: Arc<Counters>,
}

impl Mem {
    /// A device for the region of `memory` that begins at `start` and has `len` bytes, all of
    /// which become unplugged.
    pub fn new(memory: Memory, start: GuestAddress, len: u64) -> Result<Self, MemError> {
        let blocks = Blocks::new(memory, start, len).map_err(MemError::Region)?;
        let target = Target {
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            changed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(MemError::EventFd)?,
            region: len,
            block_len: blocks.block_len(),
        };
        Ok(Self {
            start,
            blocks: Lender::new(blocks),
            target: Arc::new(target),
            counters: Arc::default(),
        })
    }

    pub fn handle(&self) -> MemHandle {
        MemHandle(self.target.clone())
    }

    /// `struct virtio_mem_config` (virtio 1.3 §5.15.4). All of the region is always usable.
    fn config(&self) -> [u8; 56] {
        let target = &self.target;
        let mut config = [0; 56];
        let fields = [
            (0, target.block_len),
            (16, self.start.0),
            (24, target.region),
            (32, target.region),
            (40, target.plugged.load(Ordering::SeqCst)),
            (48, target.requested.load(Ordering::SeqCst)),
        ];
        for (offset, value) in fields {
            config[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // A request and its response are a few bytes each.
        4096
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        let blocks = self.blocks.lend();
        let map = blocks.as_ref().map(|blocks| blocks.map());
        DeviceState::Mem(MemState::new(&self.target, map))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Mem(MemState { requested, plugged }) = state else {
            return Err(StateError::Kind);
        };
        let wrong = |what: &str| StateError::Device(what.into());
        let target = &self.target;
        if requested > target.region || !requested.is_multiple_of(target.block_len) {
            return Err(wrong("it asks for memory that the region has not"));
        }
        let mut blocks = self
            .blocks
            .lend()
            .ok_or_else(|| wrong("the memory device is in use"))?;
        let map = PlugMap::from_words(blocks.map().blocks(), &plugged)
            .ok_or_else(|| wrong("its hotplug region has another size"))?;
        blocks
            .restore(&map)
            .map_err(|error| StateError::Device(format!("plug memory: {error}")))?;
        let plugged = blocks.map().plugged() as u64 * target.block_len;
        target.plugged.store(plugged, Ordering::SeqCst);
        target.requested.store(requested, Ordering::SeqCst);
        if requested == plugged {
            // The driver has nothing to follow, so it need not be told.
            let _ = target.changed.read();
        }
        Ok(())
    }

    fn activate(
        &mut self,
        mut activation: Activation,
    ) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let ring = activation.take_ring(0);
        let ring = ring.ok_or(ActivateError::BadQueue { index: 0 })?;
        let blocks = self.blocks.lend().ok_or(ActivateError::Held {
            what: "hotplug region",
        })?;
        Ok(vec![Box::new(MemHandler {
            start: self.start,
            blocks,
            target: self.target.clone(),
            memory: activation.memory,
            ring,
            interrupt: activation.interrupt,
            counters: self.counters.clone(),
        })])
    }
}
