//! What the driver of a memory device configures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::blocks::Blocks;
use super::handler::{self, MemHandler};
use super::plugmap::PlugMap;
use super::target::{MemError, MemHandle, MemState, Target};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Lender, Memory, StateError, Thread,
    VirtioDevice, read_config_bytes,
};

/// guest-request queue (virtio 1.3 §5.15.2). Linux asks for one thing at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// "The driver MUST NOT access unplugged memory" with this feature (virtio 1.3 §5.15.3).
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;

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

    fn threads(&self) -> Vec<Thread> {
        vec![handler::thread()]
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
