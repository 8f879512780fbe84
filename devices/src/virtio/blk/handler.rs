//! Serves one queue of a disk, on a thread of its own that waits where the host's disk does.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddressSpace};

use super::image::Image;
use super::request::{ID_LEN, Limits, Range, Refusal, Request};
use crate::virtio::limiter::{Cost, Limiter};
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{Chain, Counters, GuestRam, Handler, Memory, Ring, RingState, Thread};

#[derive(Debug)]
pub(super) struct BlkHandler {
    pub(super) thread: Thread,
    pub(super) image: Arc<Image>,
    pub(super) limits: Limits,
    pub(super) id: [u8; ID_LEN],
    /// Each write is made stable before it is completed.
    pub(super) write_through: bool,
    pub(super) memory: Memory,
    pub(super) ring: Ring,
    pub(super) limiter: Option<Limiter>,
    pub(super) counters: Arc<Counters>,
}

/// Event data of the limiter's timer; the ring's is its index.
const LIMITER: u32 = 1 << 16;

/// Most bytes of room that are zeroed after a failed request.
const MAX_ZEROED: usize = 4096;

/// What a request is carried out with: the handler without its ring.
struct Disk<'a> {
    image: &'a Image,
    limits: Limits,
    id: &'a [u8; ID_LEN],
    write_through: bool,
    counters: &'a Counters,
    ram: &'a GuestRam,
}

impl BlkHandler {
    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        let disk = Disk {
            image: &self.image,
            limits: Limits {
                sectors: self.image.sectors(),
                ..self.limits
            },
            id: &self.id,
            write_through: self.write_through,
            counters: &self.counters,
            ram: &ram,
        };
        let waits = |chain: &Chain| disk.waits(chain);
        let answer = |chain: &mut Chain| {
            let cost = Cost::of_bytes(chain.readable.len() + chain.writable.len());
            (disk.answer(chain), cost)
        };
        self.ring
            .serve_within(&ram, &mut self.limiter, waits, answer)
    }
}

impl Disk<'_> {
    /// Whether a request waits for the host's disk, whatever is in the host's memory.
    fn waits(&self, chain: &Chain) -> bool {
        let mut kind = [0; 4];
        let read = chain.readable.peek(self.ram, &mut kind);
        match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_OUT => read.is_ok() && self.write_through,
            VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => true,
            _ => false,
        }
    }

    /// Carries out one request and writes its status, which comes last: in the last byte, and
    /// after all else. Returns how many bytes of the writable part are written, from its start.
    ///
    /// A driver may look at room that it is not told to be unwritten, so what little a failed request
    /// leaves is zeroed; more is not, as there may be any amount of it.
    fn answer(&self, chain: &mut Chain) -> u32 {
        let total = chain.writable.len();
        let Some(status_at) = chain.writable.split_last() else {
            // Nowhere to put the status.
            self.counters.bad_chains.increment();
            return 0;
        };
        let request = Request::parse(self.ram, &mut chain.readable, &chain.writable, self.limits);
        let status = match request.map(|request| self.carry_out(&request, chain)) {
            Ok(Ok(())) => VIRTIO_BLK_S_OK,
            Ok(Err(_)) | Err(Refusal::Invalid) => VIRTIO_BLK_S_IOERR,
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        if status == VIRTIO_BLK_S_OK {
            self.counters.requests.increment();
        } else {
            self.counters.errors.increment();
        }
        let rest = chain.writable.len();
        let is_full = rest <= MAX_ZEROED && chain.writable.zero(self.ram, rest).is_ok();
        let status = u8::try_from(status).expect("a status is a byte");
        let is_told = self.ram.write_obj(status, status_at).is_ok();
        let written = match is_full && is_told {
            true => total,
            // "The device MUST write at least len bytes": the status is beyond them.
            false => total - 1 - rest,
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    fn carry_out(&self, request: &Request, chain: &mut Chain) -> io::Result<()> {
        let Chain {
            readable, writable, ..
        } = chain;
        match request {
            Request::Read { offset } => {
                let len = writable.len() as u64;
                self.image.read(self.ram, writable, *offset)?;
                self.counters.bytes_in.add(len);
                Ok(())
            }
            Request::Write { offset } => {
                let len = readable.len() as u64;
                self.image.write(self.ram, readable, *offset)?;
                self.counters.bytes_out.add(len);
                self.settle()
            }
            Request::Flush => self.image.flush(),
            Request::Id => {
                let len = writable.len().min(ID_LEN);
                Ok(writable.write(self.ram, &self.id[..len])?)
            }
            Request::Discard(ranges) => {
                each(ranges, |range| self.image.discard(range.offset, range.len))
            }
            Request::Zero(ranges) => {
                each(ranges, |range| {
                    self.image.zero(range.offset, range.len, range.unmap)
                })?;
                self.settle()
            }
        }
    }

    fn settle(&self) -> io::Result<()> {
        if self.write_through {
            self.image.flush()
        } else {
            Ok(())
        }
    }
}

/// An empty range is no work, and fallocate(2) would not have it.
fn each(ranges: &[Range], work: impl Fn(&Range) -> io::Result<()>) -> io::Result<()> {
    ranges
        .iter()
        .filter(|range| range.len > 0)
        .try_for_each(work)
}

impl MutEventSubscriber for BlkHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.ring.watch(ops);
        if let Some(limiter) = &self.limiter {
            limiter.watch(ops, LIMITER);
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let (LIMITER, Some(limiter)) = (events.data(), &mut self.limiter) {
            limiter.woken();
        }
        self.serve();
    }
}

impl Handler for BlkHandler {
    fn thread(&self) -> Thread {
        self.thread.clone()
    }

    /// Serves what is queued at once, without a rate limit: it is not to be lost.
    fn drain(&mut self) {
        self.limiter = None;
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        vec![self.ring.state()]
    }
}
