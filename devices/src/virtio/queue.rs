//! A live virtqueue in its handler's hands.
//!
//! A [`Ring`] joins virtio-queue's bookkeeping to what surrounds it: the driver's kick, the
//! interrupt, the counters, and a budget that keeps a guest which never stops adding chains from
//! holding the thread. A handler's turn is always
//!
//! ```text
//! kick ─▶ wake ─▶ pop ─▶ work ─▶ complete ─┐       rest ─▶ wait for the next kick
//!           ▲      ▲──────────────────────┘        │
//!           └──────── more came in meanwhile ◀─────┘
//! ```
//!
//! which [`Ring::serve`] does for devices that answer each request at once.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Spare};
use super::limiter::{Cost, Limiter};
use super::{Counters, GuestRam, Interrupt};

/// How long a completed request may wait for others to share its interrupt.
const BATCH: Duration = Duration::from_micros(500);

/// How long a turn may last before the handler is to hear of anything else, a recall above all.
/// One request may take longer, but its length has a bound; no further one is begun.
const TURN: Duration = Duration::from_millis(50);

/// Turns there are for what is queued when the VM ends. A driver that means well needs one.
pub(super) const LAST_TURNS: usize = 64;

/// How far a queue is, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// The queue's number in its device.
    pub index: u16,
    /// The next entry of the driver area that the device looks at.
    pub next_available: u16,
    /// The next entry of the device area that the device fills.
    pub next_used: u16,
}

/// One queue between DRIVER_OK and the reset.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    interrupt: Interrupt,
    counters: Arc<Counters>,
    /// Most bytes of a chain.
    max_len: usize,
    /// Chains that may still be popped before others get their turn.
    budget: u32,
    /// The turn ended with chains left, and the ring has kicked itself.
    turn_over: bool,
    /// The driver broke the ring itself; nothing in it can be trusted until the reset.
    broken: bool,
    /// Completed chains the driver has not been told of, since when.
    untold: Option<Instant>,
    /// Room of chains that are done with, for those to come.
    spare: Vec<Spare>,
}

impl Ring {
    /// `kick` must be non-blocking. Chains of more than `max_len` bytes are not well formed.
    pub(super) fn new(
        index: u16,
        queue: Queue,
        kick: EventFd,
        interrupt: Interrupt,
        counters: Arc<Counters>,
        max_len: usize,
    ) -> Self {
        Self {
            index,
            queue,
            kick,
            interrupt,
            counters,
            max_len,
            budget: 0,
            turn_over: false,
            broken: false,
            untold: None,
            spare: Vec::new(),
        }
    }

    /// The queue's number in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Where the queue lies, for a process that serves it in podvmm's place.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Descriptors in it.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Readable when the driver has notified the device; to be watched by the handler.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Has the handler's loop watch the kick. Its events carry the queue's index as data.
    pub fn watch(&mut self, ops: &mut EventOps) {
        let kick = Events::with_data(&self.kick, self.index.into(), EventSet::IN);
        if let Err(error) = ops.add(kick) {
            log::error!("watch queue {}: {error}", self.index);
            self.fail();
        }
    }

    pub fn state(&self) -> RingState {
        RingState {
            index: self.index,
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// Goes on where another ring of the same queue was. Positions are free-running, so there are
    /// none that make no sense.
    pub(super) fn restore(&mut self, state: RingState) {
        self.queue.set_next_avail(state.next_available);
        self.queue.set_next_used(state.next_used);
    }

    /// Completes the chains there are, in order, with the number of bytes `serve` says it wrote.
    /// True if none is left; false if the turn was over first and the ring has kicked itself.
    pub fn serve(&mut self, ram: &GuestRam, mut serve: impl FnMut(&mut Chain) -> u32) -> bool {
        let free = Cost::of_bytes(0);
        self.serve_within(ram, &mut None, |_| false, |chain| (serve(chain), free))
    }

    /// Like [`serve`](Self::serve), as fast as `limiter` allows, which is charged what `serve` says that
    /// a chain has cost. When it does not allow one, what is queued waits for its timer and the driver
    /// need not kick; that counts as none being left.
    ///
    /// Where `waits` for the host's disk, the driver is told first of what is completed: that is not
    /// to wait too.
    pub(super) fn serve_within(
        &mut self,
        ram: &GuestRam,
        limiter: &mut Option<Limiter>,
        waits: impl Fn(&Chain) -> bool,
        mut serve: impl FnMut(&mut Chain) -> (u32, Cost),
    ) -> bool {
        let started = Instant::now();
        self.wake(ram);
        loop {
            while let Some(mut chain) = self.pop(ram) {
                if !limiter.as_mut().is_none_or(Limiter::admits) {
                    self.put_back(chain);
                    self.signal(ram);
                    return true;
                }
                if self.untold.is_some() && waits(&chain) {
                    self.signal(ram);
                }
                let (written, cost) = serve(&mut chain);
                if let Some(limiter) = limiter {
                    limiter.charge(cost);
                }
                self.complete(ram, chain, written);
                if started.elapsed() >= TURN {
                    self.budget = 0;
                }
            }
            if !self.rest(ram) {
                return !self.turn_over;
            }
        }
    }

    /// Starts a turn: takes the kick and asks the driver for silence.
    pub fn wake(&mut self, ram: &GuestRam) {
        // An empty eventfd means that the turn was started for another reason.
        if let Ok(kicks) = self.kick.read() {
            self.counters.kicks.add(kicks);
        }
        self.budget = u32::from(self.queue.size());
        self.turn_over = false;
        // Silence is a wish (virtio 1.3 §2.7.10): if it cannot be written, kicks just come.
        let _ = self.queue.disable_notification(ram);
    }

    /// The next well-formed chain. None if there is none, the budget is used up or the driver
    /// broke the ring. Chains that are not well formed are returned to the driver, and counted.
    pub fn pop(&mut self, ram: &GuestRam) -> Option<Chain> {
        while self.budget > 0 && !self.broken {
            let descriptors = match self.queue.iter(ram) {
                Ok(mut available) => available.next()?,
                Err(_) => {
                    self.fail();
                    return None;
                }
            };
            self.budget -= 1;
            let head = descriptors.head_index();
            if head >= self.queue.size() {
                // There is no such descriptor, so there is nothing to return.
                self.fail();
                return None;
            }
            let spare = self.spare.pop().unwrap_or_default();
            match Chain::parse(ram, descriptors, self.max_len, spare) {
                Ok(chain) => return Some(chain),
                Err(spare) => {
                    self.spare.push(spare);
                    self.counters.bad_chains.increment();
                    self.add_used(ram, head, 0);
                }
            }
        }
        None
    }

    /// How many chains the driver has made available and the device has not taken.
    pub fn offered(&self, ram: &GuestRam) -> u16 {
        let available = self.queue.avail_idx(ram, Ordering::Acquire);
        available.map_or(0, |index| index.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Returns a chain to the driver. `written` counts from the start of the writable part.
    pub fn complete(&mut self, ram: &GuestRam, chain: Chain, written: u32) {
        debug_assert!(written as usize <= chain.writable_len);
        let head = chain.head;
        self.spare.push(chain.into_spare());
        self.add_used(ram, head, written);
    }

    /// Makes the chain that was popped last the next one again, as the driver wrote it.
    pub fn put_back(&mut self, chain: Chain) {
        self.spare.push(chain.into_spare());
        self.queue.go_to_previous_position();
        self.budget = self.budget.saturating_add(1);
    }

    /// Ends a turn: interrupts the driver if it wants to know what was completed, and asks it to
    /// kick again. True if chains came in before it could hear that, and so are to be popped now.
    /// With the budget used up the ring kicks itself instead, so that others get their turn.
    pub fn rest(&mut self, ram: &GuestRam) -> bool {
        self.signal(ram);
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(ram) {
            Ok(false) => false,
            Ok(true) if self.budget > 0 => {
                self.budget -= 1;
                let _ = self.queue.disable_notification(ram);
                true
            }
            Ok(true) => {
                self.turn_over = true;
                self.rekick();
                false
            }
            Err(_) => {
                self.fail();
                false
            }
        }
    }

    /// Ends a turn in which chains were left, and asks the driver to kick when it adds another.
    pub fn rest_until_more(&mut self, ram: &GuestRam) {
        self.signal(ram);
        let next = self.queue.next_avail();
        let all = next.wrapping_add(self.offered(ram));
        // What is asked for is the chain that comes next, so all that are there count as taken.
        self.queue.set_next_avail(all);
        let asked = self.queue.enable_notification(ram);
        self.queue.set_next_avail(next);
        match asked {
            Ok(false) => {}
            // One came in before the driver could read that.
            Ok(true) => self.rekick(),
            Err(_) => self.fail(),
        }
    }

    /// Makes the handler's next turn come without the driver.
    pub fn rekick(&self) {
        // Fails only when 2^64 - 2 kicks are already due.
        let _ = self.kick.write(1);
    }

    /// Tells the driver of what was completed, if it wants to know. All that ends a turn in which
    /// the device cannot take more: it comes back by itself, and the driver need not kick.
    pub fn signal(&mut self, ram: &GuestRam) {
        if self.untold.take().is_some() && self.driver_listens(ram) {
            self.interrupt.notify_queue(self.index);
        }
    }

    fn add_used(&mut self, ram: &GuestRam, head: u16, written: u32) {
        if self.queue.add_used(ram, head, written).is_err() {
            self.fail();
            return;
        }
        let now = Instant::now();
        if now.duration_since(*self.untold.get_or_insert(now)) >= BATCH {
            self.signal(ram);
        }
    }

    /// Used Buffer Notification Suppression (virtio 1.3 §2.7.7).
    fn driver_listens(&mut self, ram: &GuestRam) -> bool {
        if !self.queue.event_idx_enabled() {
            // The driver writes its flags, then looks for used buffers; here it is the other way round.
            // Without a fence both may see what was before, and the interrupt would be lost.
            fence(Ordering::SeqCst);
            let flags: Result<u16, _> =
                ram.load(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst);
            return match flags {
                Ok(flags) => u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0,
                Err(_) => true,
            };
        }
        self.queue.needs_notification(ram).unwrap_or(true)
    }

    /// The ring itself makes no sense: "The device SHOULD set DEVICE_NEEDS_RESET when it enters an
    /// error state that a reset is needed" (virtio 1.3 §2.1.2).
    fn fail(&mut self) {
        self.broken = true;
        self.interrupt.notify_needs_reset();
    }
}

#[cfg(test)]
mod tests;
