//! Serves a balloon's rings.
//!
//! Runs on a thread of its own: giving memory back takes the kernel long where there is much.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::discard::Discard;
use super::statistics::Statistics;
use super::target::Target;
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{
    Chain, Counters, GuestRam, Handler, Interrupt, Memory, Ring, RingState, Thread, Work,
};

/// Data of events that are not of queues.
const CHANGED: u32 = u32::MAX;
const ASK: u32 = u32::MAX - 1;

/// Page numbers read at once: as many as Linux sends in one request.
const BATCH: usize = 256;

/// The queues the driver set up, by what they are for.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) inflate: Option<Ring>,
    pub(super) deflate: Option<Ring>,
    pub(super) statistics: Option<Ring>,
    pub(super) reporting: Option<Ring>,
}

impl Queues {
    fn each(&self) -> impl Iterator<Item = &Ring> {
        let Self {
            inflate,
            deflate,
            statistics,
            reporting,
        } = self;
        [inflate, deflate, statistics, reporting]
            .into_iter()
            .flatten()
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Ring> {
        let Self {
            inflate,
            deflate,
            statistics,
            reporting,
        } = self;
        [inflate, deflate, statistics, reporting]
            .into_iter()
            .flatten()
    }
}

#[derive(Debug)]
pub(super) struct BalloonHandler {
    pub(super) queues: Queues,
    /// Rings set up without the feature they belong to; kept for their state alone.
    pub(super) unused: Vec<Ring>,
    pub(super) discard: Discard,
    pub(super) target: Arc<Target>,
    pub(super) memory: Memory,
    pub(super) interrupt: Interrupt,
    pub(super) counters: Arc<Counters>,
}

impl BalloonHandler {
    /// True if none of the queues has work left.
    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        let (discard, counters) = (self.discard, &self.counters);
        let mut done = true;
        if let Some(ring) = &mut self.queues.inflate {
            done &= ring.serve(&ram, |chain| {
                inflate(&ram, chain, discard, counters);
                0
            });
        }
        if let Some(ring) = &mut self.queues.deflate {
            // The pages come back when the guest touches them.
            done &= ring.serve(&ram, |_| {
                counters.requests.increment();
                0
            });
        }
        if let Some(ring) = &mut self.queues.reporting {
            done &= ring.serve(&ram, |chain| {
                report(&ram, chain, discard, counters);
                0
            });
        }
        done
    }

    /// Looks at the buffer the driver left in the statistics queue, and leaves it there. The driver
    /// fills it anew when it gets it back, which is how the device asks (virtio 1.3 §5.5.6.3).
    fn read_statistics(&mut self) {
        let ram = self.memory.memory();
        let Some(ring) = &mut self.queues.statistics else {
            return;
        };
        ring.wake(&ram);
        if let Some(mut chain) = ring.pop(&ram) {
            let statistics = Statistics::read(&ram, &mut chain.readable);
            *self
                .target
                .statistics
                .lock()
                .expect("no panic while locked") = Some(statistics);
            self.counters.requests.increment();
            ring.put_back(chain);
            ring.signal(&ram);
        } else {
            self.rest_statistics();
        }
    }

    fn ask_for_statistics(&mut self) {
        let ram = self.memory.memory();
        let Some(ring) = &mut self.queues.statistics else {
            return;
        };
        ring.wake(&ram);
        if let Some(chain) = ring.pop(&ram) {
            ring.complete(&ram, chain, 0);
        }
        self.rest_statistics();
    }

    fn rest_statistics(&mut self) {
        let ram = self.memory.memory();
        if let Some(ring) = &mut self.queues.statistics
            && ring.rest(&ram)
        {
            // The driver was quicker; its buffer is looked at in the next turn.
            ring.rekick();
        }
    }
}

impl MutEventSubscriber for BalloonHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.each_mut().for_each(|ring| ring.watch(ops));
        let events = [(&self.target.changed, CHANGED), (&self.target.ask, ASK)];
        for (event, data) in events {
            if let Err(error) = ops.add(Events::with_data(event, data, EventSet::IN)) {
                log::error!("watch the balloon's target: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let statistics = self.queues.statistics.as_ref().map(Ring::index);
        match events.data() {
            CHANGED => {
                // An empty eventfd means that the driver was told for another reason.
                if self.target.changed.read().is_ok() {
                    self.interrupt.notify_config();
                }
            }
            ASK => {
                if self.target.ask.read().is_ok() {
                    self.ask_for_statistics();
                }
            }
            queue if statistics.map(u32::from) == Some(queue) => self.read_statistics(),
            _ => {
                self.serve();
            }
        }
    }
}

/// Where the handler runs.
pub(super) fn thread() -> Thread {
    Thread::Own {
        name: "balloon".into(),
        work: Work::Memory,
    }
}

impl Handler for BalloonHandler {
    fn thread(&self) -> Thread {
        thread()
    }

    fn drain(&mut self) {
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        self.queues
            .each()
            .chain(&self.unused)
            .map(Ring::state)
            .collect()
    }
}

/// The chain is an array of page numbers.
fn inflate(ram: &GuestRam, chain: &mut Chain, discard: Discard, counters: &Counters) {
    counters.requests.increment();
    let mut numbers = [0; BATCH];
    let mut bytes = [0; BATCH * 4];
    loop {
        let count = (chain.readable.len() / 4).min(BATCH);
        if count == 0 || chain.readable.read(ram, &mut bytes[..count * 4]).is_err() {
            return;
        }
        for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(4)) {
            *number = bytes.try_into().map_or(0, u32::from_le_bytes);
        }
        let given = discard.pages(ram, &mut numbers[..count]);
        counters.bytes_out.add(given as u64 * super::PAGE_BYTES);
        if given == 0 {
            counters.errors.increment();
        }
    }
}

/// The chain's buffers are the free pages themselves (virtio 1.3 §5.5.6.7).
fn report(ram: &GuestRam, chain: &Chain, discard: Discard, counters: &Counters) {
    counters.requests.increment();
    for slice in chain.writable.slices(ram, usize::MAX).map_while(Result::ok) {
        match discard.slice(&slice) {
            Ok(given) => counters.bytes_out.add(given as u64),
            Err(_) => counters.errors.increment(),
        }
    }
}
