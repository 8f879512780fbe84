//! Serves all ports of a console and its control queues, on the shared I/O loop.
//!
//! Waits for kicks, for input that the guest has room for, and for room that the guest has output
//! for. A descriptor is watched only while one of these is the case: a pipe that hung up would
//! otherwise wake the loop for ever.

use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::port::{ConsoleState, LivePort};
use super::protocol::{FromDriver, HEADER_LEN, Untold};
use super::window::Window;
use crate::virtio::{Counters, DeviceState, GuestRam, Handler, Memory, Ring, RingState, Thread};

/// What an event is about, as it is carried in the event's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The queue of this number.
    Kick(u16),
    Input(usize),
    Output(usize),
    Window,
}

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

impl Source {
    fn to_data(self) -> u32 {
        let number = |number: usize| u32::try_from(number).expect("ports are few");
        match self {
            Self::Kick(queue) => queue.into(),
            Self::Input(port) => 1 << 16 | number(port),
            Self::Output(port) => 2 << 16 | number(port),
            Self::Window => 3 << 16,
        }
    }

    fn from_data(data: u32) -> Self {
        let [n0, n1, kind, _] = data.to_le_bytes();
        let number = u16::from_le_bytes([n0, n1]);
        match kind {
            0 => Self::Kick(number),
            1 => Self::Input(number.into()),
            2 => Self::Output(number.into()),
            _ => Self::Window,
        }
    }
}

#[derive(Debug)]
pub(super) struct ConsoleHandler {
    memory: Memory,
    ports: Vec<LivePort>,
    control_receive: Option<Ring>,
    control_transmit: Option<Ring>,
    window: Arc<Window>,
    counters: Arc<Counters>,
    /// What the loop watches besides kicks.
    watched: Vec<(Source, RawFd)>,
}

impl ConsoleHandler {
    pub(super) fn new(
        memory: Memory,
        ports: Vec<LivePort>,
        control_receive: Option<Ring>,
        control_transmit: Option<Ring>,
        window: Arc<Window>,
        counters: Arc<Counters>,
    ) -> Self {
        let watched = Vec::new();
        Self {
            memory,
            ports,
            control_receive,
            control_transmit,
            window,
            counters,
            watched,
        }
    }

    fn handle(&mut self, source: Source) {
        let ram = self.memory.memory();
        match source {
            Source::Kick(CONTROL_RECEIVE) => {}
            Source::Kick(CONTROL_TRANSMIT) => self.hear(&ram),
            Source::Kick(queue) => {
                // Queues 0 and 1 are port 0's; from 4 on there are two for each further port.
                let number = usize::from(queue.saturating_sub(2) / 2);
                let port = &mut self.ports[number];
                if queue % 2 == 0 {
                    port.receive(&ram, &self.counters);
                } else {
                    port.transmit(&ram, &self.counters);
                }
            }
            Source::Input(number) => self.ports[number].receive(&ram, &self.counters),
            Source::Output(number) => self.ports[number].transmit(&ram, &self.counters),
            Source::Window => {
                let _ = self.window.changed.read();
                for port in self.ports.iter_mut().filter(|port| port.host.console) {
                    port.untold.size = port.guest_open;
                }
            }
        }
        let due = self
            .ports
            .iter()
            .any(|port| port.untold != Untold::default());
        if due || source == Source::Kick(CONTROL_RECEIVE) {
            self.tell(&ram);
        }
    }

    /// Follows the driver's control messages.
    fn hear(&mut self, ram: &GuestRam) {
        let Some(ring) = &mut self.control_transmit else {
            return;
        };
        let mut opened = false;
        ring.serve(ram, |chain| {
            let mut message = [0; HEADER_LEN];
            let message = chain
                .readable
                .read(ram, &mut message)
                .map(|()| message)
                .ok();
            match message.and_then(|message| FromDriver::parse(message, self.ports.len())) {
                Some(FromDriver::DeviceReady) => {
                    for port in &mut self.ports {
                        port.untold.add = true;
                    }
                }
                Some(FromDriver::PortReady { port: number }) => {
                    let port = &mut self.ports[number];
                    let console = port.host.console;
                    let size = console && self.window.size().is_some();
                    let add = port.untold.add;
                    port.untold = Untold {
                        add,
                        console,
                        size,
                        name: true,
                        open: true,
                    };
                }
                Some(FromDriver::PortOpen { port: number, open }) => {
                    self.ports[number].guest_open = open;
                    opened |= open;
                }
                None => self.counters.errors.increment(),
            }
            0
        });
        for port in self
            .ports
            .iter_mut()
            .filter(|port| opened && port.guest_open)
        {
            port.receive(ram, &self.counters);
        }
    }

    /// Tells the driver what is due, as far as it has room for it.
    fn tell(&mut self, ram: &GuestRam) {
        let Some(ring) = &mut self.control_receive else {
            return;
        };
        ring.wake(ram);
        let size = self.window.size();
        for (number, port) in self.ports.iter_mut().enumerate() {
            while port.untold != Untold::default() {
                let Some(mut chain) = ring.pop(ram) else {
                    if ring.rest(ram) { continue } else { return }
                };
                let open = port.host_open();
                let Some(message) = port.untold.next(number, &port.host.name, size, open) else {
                    ring.put_back(chain);
                    break;
                };
                let written = match chain.writable.write(ram, &message) {
                    Ok(()) => message.len(),
                    Err(_) => {
                        self.counters.errors.increment();
                        0
                    }
                };
                let written = u32::try_from(written).expect("a message is short");
                ring.complete(ram, chain, written);
            }
        }
        ring.signal(ram);
    }

    /// Has the loop watch what the ports wait for, and nothing else.
    fn watch(&mut self, ops: &mut EventOps) {
        let wanted: Vec<_> = self.ports.iter().enumerate().flat_map(waits_for).collect();
        self.watched.retain(|&(source, fd)| {
            let keep = wanted.contains(&(source, fd));
            if !keep {
                // It is ours and was added, so it can be removed.
                let _ = ops.remove(Events::new_raw(fd, EventSet::empty()));
            }
            keep
        });
        for (source, fd) in wanted {
            if self.watched.contains(&(source, fd)) {
                continue;
            }
            let events = if matches!(source, Source::Input(_)) {
                EventSet::IN
            } else {
                EventSet::OUT
            };
            match ops.add(Events::with_data_raw(fd, source.to_data(), events)) {
                Ok(()) => self.watched.push((source, fd)),
                Err(error) => log::error!("watch a console port: {error}"),
            }
        }
    }
}

impl MutEventSubscriber for ConsoleHandler {
    fn init(&mut self, ops: &mut EventOps) {
        // Whatever an earlier loop watched, this one does not.
        self.watched.clear();
        let control = [&mut self.control_receive, &mut self.control_transmit];
        let ports = self
            .ports
            .iter_mut()
            .flat_map(|port| [&mut port.receive, &mut port.transmit]);
        for ring in control.into_iter().chain(ports).flatten() {
            ring.watch(ops);
        }
        let window =
            Events::with_data(&self.window.changed, Source::Window.to_data(), EventSet::IN);
        if let Err(error) = ops.add(window) {
            log::error!("watch the size of a console: {error}");
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.handle(Source::from_data(events.data()));
        self.watch(ops);
    }
}

impl Handler for ConsoleHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn drain(&mut self) {
        let ram = self.memory.memory();
        for port in &mut self.ports {
            port.drain(&ram, &self.counters);
        }
    }

    fn rings(&self) -> Vec<RingState> {
        let control = [&self.control_receive, &self.control_transmit];
        let ports = self
            .ports
            .iter()
            .flat_map(|port| [&port.receive, &port.transmit]);
        let mut states: Vec<_> = control
            .into_iter()
            .chain(ports)
            .flatten()
            .map(Ring::state)
            .collect();
        states.sort_by_key(|state| state.index);
        states
    }

    fn add_state(&self, device: &mut DeviceState) {
        let ports = self.ports.iter().map(LivePort::state).collect();
        *device = DeviceState::Console(ConsoleState { ports });
    }
}

/// The descriptors whose readiness the port waits for.
fn waits_for((number, port): (usize, &LivePort)) -> impl Iterator<Item = (Source, RawFd)> {
    let input = port.host.input.as_ref().filter(|_| port.awaits_input);
    let output = port.host.output.as_ref().filter(|_| port.awaits_output);
    let input = input.and_then(|input| Some((Source::Input(number), input.watch()?)));
    let output = output.and_then(|output| Some((Source::Output(number), output.watch()?)));
    input.into_iter().chain(output)
}
