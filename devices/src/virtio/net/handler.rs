//! A pair of rings and its queue of the tap, on the shared I/O loop.
//!
//! The tap is watched for edges, so that frames the guest has no room for do not wake the loop for
//! ever: they are looked at again when the guest kicks.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::tap::{HEADER_LEN, Tap};
use crate::virtio::limiter::{Cost, Limiter};
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{
    Chain, Counters, GuestRam, Handler, Lent, Memory, Ring, RingState, Segments, Thread, vectored,
};

/// Event data of the tap; the rings' is their index.
const TAP: u32 = 1 << 16;
const RECEIVE_LIMITER: u32 = TAP + 2;
const TRANSMIT_LIMITER: u32 = TAP + 1;
/// Where in the header the number of buffers is (virtio 1.3 §5.1.6).
const NUM_BUFFERS_AT: usize = 10;
/// Frames from the tap before others get their turn.
const TURN: usize = 256;

#[derive(Debug)]
pub(super) struct NetHandler {
    memory: Memory,
    receive: Option<Ring>,
    transmit: Option<Ring>,
    tap: Lent<Tap>,
    /// Bytes that a frame may take with mergeable buffers; `None` without: a frame gets one buffer.
    merge: Option<usize>,
    /// The tap may have frames.
    readable: bool,
    /// Buffers of the guest's for the next frame, and what they are together.
    buffers: Vec<Chain>,
    room: Segments,
    /// What frames to the guest are held to, and those from it.
    limiters: [Option<Limiter>; 2],
    counters: Arc<Counters>,
}

impl NetHandler {
    pub(super) fn new(
        memory: Memory,
        receive: Option<Ring>,
        transmit: Option<Ring>,
        tap: Lent<Tap>,
        merge: Option<usize>,
        limiters: [Option<Limiter>; 2],
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            memory,
            receive,
            transmit,
            tap,
            merge,
            readable: true,
            buffers: Vec::new(),
            room: Segments::default(),
            limiters,
            counters,
        }
    }

    /// Gives the guest the tap's frames, as long as it has room.
    fn receive(&mut self, ram: &GuestRam) {
        let Some(ring) = &mut self.receive else {
            return;
        };
        let [limiter, _] = &mut self.limiters;
        ring.wake(ram);
        let mut frames = 0;
        while self.readable && limiter.as_mut().is_none_or(Limiter::admits) {
            if frames == TURN {
                ring.rekick();
                break;
            }
            let wanted = self.merge.unwrap_or(1);
            if !gather(ring, ram, wanted, &mut self.buffers, &mut self.room) {
                if ring.rest(ram) {
                    continue;
                }
                self.counters.queue_full.increment();
                return;
            }
            let len = self.room.len();
            match vectored::read(&*self.tap, ram, &mut self.room, len) {
                Ok(count) if count >= HEADER_LEN => {
                    frames += 1;
                    if let Some(limiter) = limiter {
                        limiter.charge(Cost::of_bytes(count));
                    }
                    self.counters.requests.increment();
                    self.counters.bytes_in.add(count as u64);
                    complete(ring, ram, &mut self.buffers, count);
                }
                // A frame without a header is none.
                Ok(_) => self.counters.errors.increment(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // The interface is down, say; the tap tells when that changes.
                        self.counters.errors.increment();
                    }
                    self.readable = false;
                }
            }
        }
        ring.signal(ram);
    }

    /// Gives the tap the guest's frames. True if none is left.
    fn transmit(&mut self, ram: &GuestRam) -> bool {
        let Some(ring) = &mut self.transmit else {
            return true;
        };
        let (tap, counters) = (&*self.tap, &self.counters);
        let [_, limiter] = &mut self.limiters;
        ring.serve_within(
            ram,
            limiter,
            |_| false,
            |chain| {
                let frame = &mut chain.readable;
                let len = frame.len();
                // One call is one frame, so all of it must go in one.
                let sent = match frame.pieces() <= vectored::MAX_PIECES && len > HEADER_LEN {
                    true => vectored::write(tap, ram, frame, len),
                    false => Err(io::ErrorKind::InvalidInput.into()),
                };
                match sent {
                    Ok(count) if count == len => {
                        counters.requests.increment();
                        counters.bytes_out.add(len as u64);
                    }
                    // As on any network, a frame that cannot go is lost.
                    _ => counters.errors.increment(),
                }
                (0, Cost::of_bytes(len))
            },
        )
    }
}

/// Takes buffers until they hold `wanted` bytes, or as many pieces as one call takes. False if there
/// are not enough yet; those there are stay taken, for more to come.
fn gather(
    ring: &mut Ring,
    ram: &GuestRam,
    wanted: usize,
    buffers: &mut Vec<Chain>,
    room: &mut Segments,
) -> bool {
    room.clear();
    for buffer in &*buffers {
        room.append(&buffer.writable);
    }
    while room.len() < wanted && room.pieces() < vectored::MAX_PIECES {
        let Some(buffer) = ring.pop(ram) else {
            // All of a short ring must do.
            return buffers.len() >= usize::from(ring.size());
        };
        // The driver says how long the first is at least (virtio 1.3 §5.1.6.3.1); one without room
        // for the header is no buffer.
        if buffer.writable.len() < HEADER_LEN {
            ring.complete(ram, buffer, 0);
            continue;
        }
        room.append(&buffer.writable);
        buffers.push(buffer);
    }
    true
}

/// Returns the buffers that a frame of `count` bytes took, and keeps the others.
fn complete(ring: &mut Ring, ram: &GuestRam, buffers: &mut Vec<Chain>, count: usize) {
    let mut left = count;
    let used = buffers
        .iter()
        .take_while(|buffer| {
            let takes = left > 0;
            left = left.saturating_sub(buffer.writable.len());
            takes
        })
        .count();
    let number = u16::try_from(used).expect("fewer than pieces of one call");
    let mut left = count;
    for (index, mut buffer) in buffers.drain(..used).enumerate() {
        let len = left.min(buffer.writable.len());
        left -= len;
        if index == 0 {
            buffer.writable.skip(NUM_BUFFERS_AT);
            // It was just read into, so it can be written.
            let _ = buffer.writable.write(ram, &number.to_le_bytes());
        }
        let len = u32::try_from(len).expect("a frame is short");
        ring.complete(ram, buffer, len);
    }
}

impl MutEventSubscriber for NetHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for ring in [&mut self.receive, &mut self.transmit]
            .into_iter()
            .flatten()
        {
            ring.watch(ops);
        }
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let [receive, transmit] = &self.limiters;
        for (limiter, data) in [(receive, RECEIVE_LIMITER), (transmit, TRANSMIT_LIMITER)] {
            if let Some(limiter) = limiter {
                limiter.watch(ops, data);
            }
        }
        if let Err(error) = ops.add(Events::with_data(&*self.tap, TAP, edge)) {
            log::error!("watch a tap: {error}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let memory = self.memory.clone();
        let ram = memory.memory();
        let [receive, transmit] = &mut self.limiters;
        match (events.data(), receive, transmit) {
            (RECEIVE_LIMITER, Some(limiter), _) | (TRANSMIT_LIMITER, _, Some(limiter)) => {
                limiter.woken();
            }
            _ => {}
        }
        match events.data() {
            TAP => {
                self.readable = true;
                self.receive(&ram);
            }
            RECEIVE_LIMITER => self.receive(&ram),
            index if index % 2 == 0 => self.receive(&ram),
            _ => {
                self.transmit(&ram);
            }
        }
    }
}

impl Handler for NetHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    /// Sends what is queued at once, without a rate limit: it is not to be lost.
    fn drain(&mut self) {
        self.limiters = [None, None];
        let memory = self.memory.clone();
        let ram = memory.memory();
        (0..LAST_TURNS).any(|_| self.transmit(&ram));
    }

    fn rings(&self) -> Vec<RingState> {
        let rings = [&self.receive, &self.transmit];
        let mut states: Vec<_> = rings.into_iter().flatten().map(Ring::state).collect();
        // Buffers in hand are to be taken anew.
        let held = u16::try_from(self.buffers.len()).expect("no more than the ring has");
        if let (Some(_), Some(state)) = (&self.receive, states.first_mut()) {
            state.next_available = state.next_available.wrapping_sub(held);
        }
        states
    }
}
