//! Serves the three rings and all sockets, on the shared I/O loop.
//!
//! Sockets are watched for edges: each is looked at again only when something came or went, so one
//! that the guest has no room for does not wake the loop for ever.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::timerfd::TimerFd;

use super::muxer::{Change, Muxer};
use super::packet::HEADER_LEN;
use crate::host::Listener;
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{
    Counters, DeviceState, GuestRam, Handler, Lent, Memory, Ring, RingState, Segments, Thread,
};

pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;
pub(super) const EVENT: u16 = 2;

// What events are about; those below are the queues' kicks.
const LISTENER: u32 = 3;
const TIMER: u32 = 4;
const FIRST_SLOT: u32 = 16;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.3 §5.10.6.7, Device Events).
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// What the driver of a restored device knows of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// The driver is to hear that all connections are gone.
    Due,
    /// The driver was told, and then had so many buffers for events. Until it has given back that
    /// of this one, it may take a new connection for an old one, and end it.
    Told(u16),
    Over,
}

/// How a turn of hearing the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// The turn is over; the guest's ring tells when there is more.
    ToTheEnd,
    /// The guest has to take resets first.
    Choked,
}

#[derive(Debug)]
pub(super) struct VsockHandler {
    memory: Memory,
    receive: Option<Ring>,
    transmit: Option<Ring>,
    event: Option<Ring>,
    host: Lent<Listener>,
    muxer: Muxer,
    timer: TimerFd,
    /// When the timer goes off.
    alarm: Option<Instant>,
    reset: Reset,
    /// Room for the header's place, kept for the next packet.
    front: Segments,
    counters: Arc<Counters>,
}

/// What a handler is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) memory: Memory,
    pub(super) receive: Option<Ring>,
    pub(super) transmit: Option<Ring>,
    pub(super) event: Option<Ring>,
    pub(super) host: Lent<Listener>,
    pub(super) guest_cid: u64,
    pub(super) timer: TimerFd,
    /// The driver is to hear that its connections are gone.
    pub(super) reset_due: bool,
    /// The driver was another device's before.
    pub(super) restored: bool,
    pub(super) counters: Arc<Counters>,
}

impl VsockHandler {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            memory,
            receive,
            transmit,
            event,
            host,
            guest_cid,
            timer,
            reset_due,
            restored,
            counters,
        } = parts;
        Self {
            memory,
            receive,
            transmit,
            event,
            host,
            muxer: Muxer::new(guest_cid, restored),
            timer,
            alarm: None,
            reset: if reset_due { Reset::Due } else { Reset::Over },
            front: Segments::default(),
            counters,
        }
    }

    /// Hears the guest and answers it, as far as both go.
    ///
    /// What wakes the handler next: the driver's kicks, where a turn of a ring ended in
    /// [`Ring::rest`]; the ring itself, where it ended there with more to do; else the event that
    /// makes up for what was missing, which is a kick of the receive queue for a guest that has to
    /// take resets.
    fn serve(&mut self) {
        let memory = self.memory.clone();
        let ram = memory.memory();
        self.muxer.accept(&self.host, false);
        if self.reset != Reset::Over && self.is_being_reset(&ram) {
            self.hear(&ram);
            if let Some(ring) = &mut self.receive {
                // Its kick is taken; it has its turn when that is over.
                ring.wake(&ram);
            }
            return;
        }
        let heard = self.hear(&ram);
        self.tell(&ram);
        // Resets that the guest took make room to hear more of it, in the next turn.
        if heard == Heard::Choked
            && !self.muxer.is_choked()
            && let Some(ring) = &self.transmit
        {
            ring.rekick();
        }
    }

    /// Takes the guest's packets.
    fn hear(&mut self, ram: &GuestRam) -> Heard {
        let Some(ring) = &mut self.transmit else {
            return Heard::ToTheEnd;
        };
        let now = Instant::now();
        ring.wake(ram);
        loop {
            while !self.muxer.is_choked()
                && let Some(mut chain) = ring.pop(ram)
            {
                let packet = &mut chain.readable;
                self.muxer
                    .hear(&self.host, ram, packet, &self.counters, now);
                ring.complete(ram, chain, 0);
            }
            if self.muxer.is_choked() {
                ring.signal(ram);
                return Heard::Choked;
            }
            if !ring.rest(ram) {
                return Heard::ToTheEnd;
            }
        }
    }

    /// Gives the guest packets, as long as it has room for them.
    fn tell(&mut self, ram: &GuestRam) {
        let Some(ring) = &mut self.receive else {
            return;
        };
        ring.wake(ram);
        while self.muxer.has_message() {
            let Some(mut chain) = ring.pop(ram) else {
                if ring.rest(ram) {
                    continue;
                }
                self.counters.queue_full.increment();
                return;
            };
            let room = &mut chain.writable;
            if room.split_front(HEADER_LEN, &mut self.front).is_err() {
                self.counters.bad_chains.increment();
                ring.complete(ram, chain, 0);
                continue;
            }
            match self
                .muxer
                .message(ram, &mut self.front, room, &self.counters)
            {
                Some(len) => {
                    let header = u32::try_from(HEADER_LEN).expect("it is 44");
                    ring.complete(ram, chain, header + len);
                }
                None => {
                    ring.put_back(chain);
                    break;
                }
            }
        }
        ring.signal(ram);
    }

    /// "the device MUST send" a transport reset when connections cannot go on, as after a restore:
    /// the driver then ends them all. True while it is at that. One without buffers for events
    /// wants to know of none.
    fn is_being_reset(&mut self, ram: &GuestRam) -> bool {
        let Some(ring) = &mut self.event else {
            return false;
        };
        ring.wake(ram);
        if self.reset == Reset::Due
            && let Some(mut chain) = ring.pop(ram)
        {
            self.reset = Reset::Told(ring.offered(ram));
            let written = match chain.writable.write(ram, &TRANSPORT_RESET) {
                Ok(()) => 4,
                Err(_) => 0,
            };
            ring.complete(ram, chain, written);
        }
        ring.rest_until_more(ram);
        match self.reset {
            Reset::Told(left) if ring.offered(ram) > left => self.reset = Reset::Over,
            Reset::Due | Reset::Told(_) | Reset::Over => {}
        }
        matches!(self.reset, Reset::Told(_))
    }

    fn watch(&self, ops: &mut EventOps, slot: usize) {
        let Some(connection) = self.muxer.connection(slot) else {
            return;
        };
        let number = u32::try_from(slot).expect("slots are few");
        let events = Events::with_data(
            &connection.stream,
            FIRST_SLOT + number,
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
        );
        if let Err(error) = ops.add(events) {
            log::error!("watch a vsock connection: {error}");
        }
    }

    /// Has the loop follow what was opened and closed, and the timer who waits.
    fn settle(&mut self, ops: &mut EventOps) {
        for change in std::mem::take(&mut self.muxer.changes) {
            match change {
                Change::Born(slot) => self.watch(ops, slot),
                Change::Died(connection) => {
                    let fd = connection.stream.as_raw_fd();
                    // One that was opened and closed in the same turn was never watched.
                    let _ = ops.remove(Events::new_raw(fd, EventSet::empty()));
                }
            }
        }
        let alarm = self.muxer.next_call();
        if alarm == self.alarm {
            return;
        }
        self.alarm = alarm;
        let set = match alarm {
            None => self.timer.clear(),
            Some(at) => {
                let soon = Duration::from_millis(1);
                let wait = at.saturating_duration_since(Instant::now()).max(soon);
                self.timer.reset(wait, None)
            }
        };
        if let Err(error) = set {
            log::error!("set a timer for vsock: {error}");
        }
    }
}

impl MutEventSubscriber for VsockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        let rings = [&mut self.receive, &mut self.transmit, &mut self.event];
        for ring in rings.into_iter().flatten() {
            ring.watch(ops);
        }
        // The connections of an earlier loop are unknown to this one.
        self.muxer.changes.clear();
        let slots: Vec<_> = self.muxer.connections().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.watch(ops, slot);
        }
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let added = ops
            .add(Events::with_data(&*self.host, LISTENER, edge))
            .and_then(|()| ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN)));
        if let Err(error) = added {
            log::error!("watch the socket of vsock: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.muxer.accept(&self.host, true),
            TIMER => {
                // Only after it went off, so this does not wait.
                let _ = self.timer.wait();
                self.alarm = None;
                self.muxer.call_again(Instant::now());
            }
            data if data >= FIRST_SLOT => {
                let set = events.event_set();
                let gone = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let readable = gone || set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
                let slot = usize::try_from(data - FIRST_SLOT).expect("it was a slot");
                self.muxer.ready(slot, readable, gone);
            }
            data if data == u32::from(EVENT) => {
                let memory = self.memory.clone();
                self.is_being_reset(&memory.memory());
            }
            _ => {}
        }
        self.serve();
        self.settle(ops);
    }
}

impl Handler for VsockHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn drain(&mut self) {
        let memory = self.memory.clone();
        let ram = memory.memory();
        (0..LAST_TURNS).any(|_| self.hear(&ram) == Heard::Choked);
    }

    fn rings(&self) -> Vec<RingState> {
        let rings = [&self.receive, &self.transmit, &self.event];
        rings.into_iter().flatten().map(Ring::state).collect()
    }

    fn add_state(&self, device: &mut DeviceState) {
        if let DeviceState::Vsock(state) = device {
            state.connected = self.reset != Reset::Over || self.muxer.is_known_to_guest();
        }
    }
}
