//! Answers the driver's requests to plug and unplug (virtio 1.3 §5.15.6).
//!
//! Runs on a thread of its own: taking gigabytes from the guest keeps the host busy for long.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::blocks::Blocks;
use super::plugmap::Plugged;
use super::target::{MemState, Target};
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{
    Chain, Counters, DeviceState, GuestRam, Handler, Interrupt, Lent, Memory, Ring, RingState,
    Thread, Work,
};

/// Data of the event that the host wants another size; queues have lower numbers.
const CHANGED: u32 = u32::MAX;

const VIRTIO_MEM_REQ_PLUG: u16 = 0;
const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;

const VIRTIO_MEM_RESP_ACK: u16 = 0;
const VIRTIO_MEM_RESP_NACK: u16 = 1;
const VIRTIO_MEM_RESP_BUSY: u16 = 2;
const VIRTIO_MEM_RESP_ERROR: u16 = 3;

const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

/// `struct virtio_mem_req` and `struct virtio_mem_resp` as they lie in memory.
const REQUEST_LEN: usize = 24;
const RESPONSE_LEN: usize = 10;

#[derive(Debug)]
pub(super) struct MemHandler {
    pub(super) start: GuestAddress,
    pub(super) blocks: Lent<Blocks>,
    pub(super) target: Arc<Target>,
    pub(super) memory: Memory,
    pub(super) ring: Ring,
    pub(super) interrupt: Interrupt,
    pub(super) counters: Arc<Counters>,
}

impl MemHandler {
    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        let mut server = Server {
            start: self.start,
            blocks: &mut self.blocks,
            target: &self.target,
        };
        self.ring
            .serve(&ram, |chain| match answer(&ram, chain, &mut server) {
                Some(written) => {
                    self.counters.requests.increment();
                    written
                }
                None => {
                    self.counters.errors.increment();
                    0
                }
            })
    }
}

impl MutEventSubscriber for MemHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.ring.watch(ops);
        let changed = Events::with_data(&self.target.changed, CHANGED, EventSet::IN);
        if let Err(error) = ops.add(changed) {
            log::error!("watch the wanted memory size: {error}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.data() == CHANGED {
            // An empty eventfd means that the driver was told for another reason.
            if self.target.changed.read().is_ok() {
                self.interrupt.notify_config();
            }
        } else {
            self.serve();
        }
    }
}

/// Where the handler runs.
pub(super) fn thread() -> Thread {
    Thread::Own {
        name: "virtio-mem".into(),
        work: Work::Memory,
    }
}

impl Handler for MemHandler {
    fn thread(&self) -> Thread {
        thread()
    }

    fn drain(&mut self) {
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        vec![self.ring.state()]
    }

    fn add_state(&self, device: &mut DeviceState) {
        *device = DeviceState::Mem(MemState::new(&self.target, Some(self.blocks.map())));
    }
}

/// Reads a request and writes the response. None if the chain has no room for either.
fn answer(ram: &GuestRam, chain: &mut Chain, server: &mut Server<'_>) -> Option<u32> {
    let mut request = [0; REQUEST_LEN];
    // Nothing is done whose outcome cannot be told.
    if chain.writable.len() < RESPONSE_LEN {
        return None;
    }
    chain.readable.read(ram, &mut request).ok()?;
    let (kind, state) = server.request(&request);
    let mut response = [0; RESPONSE_LEN];
    response[..2].copy_from_slice(&kind.to_le_bytes());
    response[8..].copy_from_slice(&state.to_le_bytes());
    chain.writable.write(ram, &response).ok()?;
    u32::try_from(RESPONSE_LEN).ok()
}

struct Server<'a> {
    start: GuestAddress,
    blocks: &'a mut Blocks,
    target: &'a Target,
}

impl Server<'_> {
    /// The response's type and, of [`VIRTIO_MEM_REQ_STATE`], the state.
    fn request(&mut self, request: &[u8; REQUEST_LEN]) -> (u16, u16) {
        let word = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let address = request[8..16].try_into().map_or(0, u64::from_le_bytes);
        let kind = word(0);
        if kind == VIRTIO_MEM_REQ_UNPLUG_ALL {
            let done = self.blocks.unplug_all();
            return (self.done(done), 0);
        }
        let Some(range) = self.range(address, word(16)) else {
            return (VIRTIO_MEM_RESP_ERROR, 0);
        };
        let state = self.blocks.map().state(range.clone());
        match (kind, state) {
            (VIRTIO_MEM_REQ_PLUG, Plugged::None) => {
                let after = (self.blocks.map().plugged() + range.len()) as u64;
                let requested = self.target.requested.load(Ordering::SeqCst);
                if after * self.blocks.block_len() > requested {
                    return (VIRTIO_MEM_RESP_NACK, 0);
                }
                let done = self.blocks.plug(range);
                (self.done(done), 0)
            }
            (VIRTIO_MEM_REQ_UNPLUG, Plugged::All) => {
                let done = self.blocks.unplug(range);
                (self.done(done), 0)
            }
            (VIRTIO_MEM_REQ_STATE, Plugged::All) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_PLUGGED),
            (VIRTIO_MEM_REQ_STATE, Plugged::None) => {
                (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_UNPLUGGED)
            }
            (VIRTIO_MEM_REQ_STATE, Plugged::Mixed) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_MIXED),
            _ => (VIRTIO_MEM_RESP_ERROR, 0),
        }
    }

    /// The blocks of a request, if they lie in the region.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start.0)?;
        if count == 0 || !offset.is_multiple_of(self.blocks.block_len()) {
            return None;
        }
        let first = usize::try_from(offset / self.blocks.block_len()).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.blocks.map().blocks()).then_some(first..end)
    }

    fn done(&self, result: std::io::Result<()>) -> u16 {
        let plugged = self.blocks.map().plugged() as u64 * self.blocks.block_len();
        self.target.plugged.store(plugged, Ordering::SeqCst);
        match result {
            Ok(()) => VIRTIO_MEM_RESP_ACK,
            Err(error) => {
                // The driver tries again, so not each time.
                log::debug!("plug or unplug memory: {error}");
                VIRTIO_MEM_RESP_BUSY
            }
        }
    }
}
