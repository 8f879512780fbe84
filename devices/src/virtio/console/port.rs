//! One stream between a guest's port and the host, each way with back-pressure: input is read only
//! into buffers the guest offers, output leaves the guest's queue only as the host takes it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::protocol::Untold;
use crate::host::{Arrival, Input, Output, Progress};
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{Chain, Counters, GuestRam, Lent, Ring};

/// Bytes one port moves each way before others get their turn.
const TURN: usize = 256 << 10;
/// Read at once, so that one does not use up a turn.
const CHUNK: usize = 32 << 10;
/// How long the end of a VM waits for a host that takes nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// The host's side of a port, which stays when the driver resets.
#[derive(Debug)]
pub(super) struct HostEnd {
    pub(super) name: String,
    pub(super) console: bool,
    pub(super) input: Option<Input>,
    pub(super) output: Option<Output>,
    /// The input has ended.
    pub(super) ended: bool,
}

/// A port while the driver is ready.
#[derive(Debug)]
pub(super) struct LivePort {
    pub(super) host: Lent<HostEnd>,
    pub(super) receive: Option<Ring>,
    pub(super) transmit: Option<Ring>,
    /// A program in the guest has it open, and wants input.
    pub(super) guest_open: bool,
    pub(super) untold: Untold,
    /// There is room in the guest, but nothing from the host.
    pub(super) awaits_input: bool,
    /// There is output, but no room in the host.
    pub(super) awaits_output: bool,
    /// Bytes of the first chain in `transmit` that the host has already.
    sent: usize,
}

/// What the driver knows of a port and how far its output is, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    guest_open: bool,
    host_open: bool,
    untold: Untold,
    /// Bytes of the first chain to send that the host had already.
    sent: usize,
}

/// What the driver knows of the ports in use, and how far they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    pub(super) ports: Vec<PortState>,
}

/// Why a port stopped sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// All that was queued is sent.
    Empty,
    Full,
    /// The port's turn is over, and there may be more.
    Turn,
}

impl LivePort {
    pub(super) fn new(
        host: Lent<HostEnd>,
        receive: Option<Ring>,
        transmit: Option<Ring>,
        guest_open: bool,
    ) -> Self {
        Self {
            host,
            receive,
            transmit,
            guest_open,
            untold: Untold::default(),
            awaits_input: false,
            awaits_output: false,
            sent: 0,
        }
    }

    pub(super) fn state(&self) -> PortState {
        PortState {
            guest_open: self.guest_open,
            host_open: self.host_open(),
            untold: self.untold,
            sent: self.sent,
        }
    }

    /// Goes on where another port was, whose host's side may have been open while this one's is
    /// not, or the other way round.
    pub(super) fn restore(&mut self, state: PortState) {
        self.guest_open = state.guest_open;
        self.untold = state.untold;
        self.untold.open |= state.guest_open && state.host_open != self.host_open();
        self.sent = state.sent;
    }

    /// Whether the guest is to think that the host's side is open (see the module's notes).
    pub(super) fn host_open(&self) -> bool {
        !self.host.ended || self.host.output.is_some()
    }

    /// Gives the guest what the host has, as far as there is room.
    pub(super) fn receive(&mut self, ram: &GuestRam, counters: &Counters) {
        self.awaits_input = false;
        let Some(ring) = &mut self.receive else {
            return;
        };
        ring.wake(ram);
        let host = &mut *self.host;
        let mut moved = 0;
        while self.guest_open
            && !host.ended
            && let Some(input) = &mut host.input
        {
            if moved > TURN {
                ring.rekick();
                break;
            }
            let Some(mut chain) = ring.pop(ram) else {
                if ring.rest(ram) { continue } else { break }
            };
            if chain.writable.is_empty() {
                // Reading nothing would look like the end.
                counters.bad_chains.increment();
                ring.complete(ram, chain, 0);
                continue;
            }
            match input.read_into(ram, &mut chain.writable, CHUNK) {
                Arrival::Bytes(count) => {
                    moved += count;
                    counters.requests.increment();
                    counters.bytes_in.add(count as u64);
                    ring.complete(ram, chain, u32::try_from(count).expect("at most CHUNK"));
                }
                Arrival::Nothing => {
                    ring.put_back(chain);
                    self.awaits_input = true;
                    break;
                }
                Arrival::End => {
                    ring.put_back(chain);
                    host.ended = true;
                    self.untold.open |= host.output.is_none();
                }
            }
        }
        ring.signal(ram);
    }

    /// Gives the host what the guest has, as far as it takes it.
    pub(super) fn transmit(&mut self, ram: &GuestRam, counters: &Counters) {
        self.awaits_output = self.send(ram, counters) == Stop::Full;
    }

    /// Gives the host all that is queued, waiting for it as long as it takes something.
    pub(super) fn drain(&mut self, ram: &GuestRam, counters: &Counters) {
        for _ in 0..LAST_TURNS {
            let waits_well = match self.send(ram, counters) {
                Stop::Empty => return,
                Stop::Turn => true,
                Stop::Full => self
                    .host
                    .output
                    .as_ref()
                    .is_some_and(|output| output.wait(PATIENCE)),
            };
            if !waits_well {
                return;
            }
        }
    }

    fn send(&mut self, ram: &GuestRam, counters: &Counters) -> Stop {
        let Some(ring) = &mut self.transmit else {
            return Stop::Empty;
        };
        ring.wake(ram);
        let mut moved = 0;
        loop {
            let Some(mut chain) = ring.pop(ram) else {
                if ring.rest(ram) {
                    continue;
                } else {
                    return Stop::Empty;
                }
            };
            chain.readable.skip(self.sent);
            match send_chain(
                &mut self.host.output,
                &mut chain,
                ram,
                counters,
                // What the host takes at once may be more than was left of the turn.
                TURN.saturating_sub(moved),
            ) {
                (count, Some(stop)) => {
                    self.sent += count;
                    ring.put_back(chain);
                    ring.signal(ram);
                    let watched = self.host.output.as_ref().and_then(Output::watch).is_some();
                    if stop == Stop::Turn || !watched {
                        ring.rekick();
                    }
                    return stop;
                }
                (count, None) => {
                    moved += count;
                    self.sent = 0;
                    counters.requests.increment();
                    ring.complete(ram, chain, 0);
                }
            }
        }
    }
}

/// Sends what is left of `chain`. Returns how much went, and why it stopped if it did before the
/// end.
fn send_chain(
    output: &mut Option<Output>,
    chain: &mut Chain,
    ram: &GuestRam,
    counters: &Counters,
    max: usize,
) -> (usize, Option<Stop>) {
    let mut moved = 0;
    while !chain.readable.is_empty() {
        if moved >= max {
            return (moved, Some(Stop::Turn));
        }
        let progress = match output {
            Some(output) => output.write_from(ram, &mut chain.readable),
            None => Progress::Lost,
        };
        match progress {
            Progress::Moved(count) => {
                moved += count;
                counters.bytes_out.add(count as u64);
            }
            Progress::Full => return (moved, Some(Stop::Full)),
            Progress::Lost => {
                counters.errors.increment();
                return (moved, None);
            }
        }
    }
    (moved, None)
}
