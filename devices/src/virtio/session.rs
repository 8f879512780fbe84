//! One device and its driver, from the first status bit to the reset, whatever the transport.
//!
//! Owned by the transport and reached through its lock. Waits on the [`Runner`] when handlers
//! start and stop, and on nothing else.

use std::cell::Cell;
use std::fmt::{self, Debug};
use std::io;
use std::mem;
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::negotiation::{Negotiation, Step};
use super::setup::QueueSetup;
use super::{
    ActivateError, Activation, Busy, Counters, DeviceState, Handler, Interrupt, Memory, Recall,
    ResizeError, Ring, RingState, Runner, StateError, Ticket, VirtioDevice,
};

/// Offered for every device: by each transport, and by [`Ring`].
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// How long a device's handlers are waited for that have a request under way. A disk that works
/// finishes one sooner; a client of the API or a service manager waits longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the handlers are.
enum Activity {
    /// There are none: the driver is not ready, or not any more.
    Idle,
    Running(Vec<Ticket>),
    Paused(Vec<Box<dyn Handler>>),
}

pub(super) struct Session {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) negotiation: Negotiation,
    pub(super) queues: Vec<QueueSetup>,
    pub(super) interrupt: Interrupt,
    pub(super) counters: Arc<Counters>,
    kicks: Vec<EventFd>,
    memory: Memory,
    runner: Arc<dyn Runner>,
    activity: Activity,
    /// Whether the driver has reset the device and not looked at its status since.
    reset_unseen: Cell<bool>,
}

impl Session {
    pub(super) fn new(
        memory: Memory,
        device: Box<dyn VirtioDevice>,
        interrupt: Interrupt,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        let queues = sizes
            .iter()
            .map(|&max_size| QueueSetup::new(max_size))
            .collect();
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(flags))
            .collect::<io::Result<_>>()?;
        let counters = device.counters().clone();
        let threads = device.threads();
        for (index, thread) in threads.iter().enumerate() {
            if let Err(error) = runner.prepare(thread.clone()) {
                threads[..index]
                    .iter()
                    .for_each(|prepared| runner.release(prepared.clone()));
                return Err(error);
            }
        }
        Ok(Self {
            negotiation: Negotiation::new(device.features() | COMMON_FEATURES),
            queues,
            interrupt,
            counters,
            kicks,
            memory,
            runner,
            activity: Activity::Idle,
            reset_unseen: Cell::new(false),
            device,
        })
    }

    pub(super) fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    pub(super) fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.needs_reset() {
            VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            0
        };
        self.negotiation.status() | needs_reset
    }

    /// The driver reads the status.
    pub(super) fn read_status(&self) -> u32 {
        self.reset_unseen.set(false);
        self.status()
    }

    /// Whether a driver has the device. One that has reset it reads the status until that is 0 (virtio 1.3
    /// §2.4.2), which it never would be of a device that is gone.
    pub(super) fn is_held(&self) -> bool {
        self.negotiation.has_driver() || self.reset_unseen.get()
    }

    pub(super) fn write_status(&mut self, value: u32) {
        match self.negotiation.write_status(value) {
            Step::Stay => {}
            Step::Activate => self.activate(),
            Step::Reset => self.reset(),
        }
    }

    /// A notification that did not come by ioeventfd. One for a queue that is not there, or not
    /// live, means nothing.
    pub(super) fn notify(&self, index: u32) {
        let kick = usize::try_from(index)
            .ok()
            .and_then(|index| self.kicks.get(index));
        match (&self.activity, kick) {
            (Activity::Running(_), Some(kick)) => {
                // Fails only when 2^64 - 2 kicks are already due.
                let _ = kick.write(1);
            }
            _ => self.counters.bad_accesses.increment(),
        }
    }

    /// Takes the handlers off their loops and keeps them. Nothing touches guest memory after. If one of
    /// them does not come back, all of them go on.
    pub(super) fn pause(&mut self) -> Result<(), Busy> {
        match mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Running(tickets) => {
                let (handlers, late) = self.recall(tickets);
                if !late.is_empty() {
                    self.go_on(handlers, late);
                    return Err(Busy(PATIENCE));
                }
                self.activity = Activity::Paused(handlers);
            }
            other => self.activity = other,
        }
        Ok(())
    }

    /// Takes back a pause that did not come about.
    fn go_on(&mut self, handlers: Vec<Box<dyn Handler>>, late: Vec<Ticket>) {
        let kept = late.into_iter().map(|ticket| self.runner.keep(ticket));
        let kept = kept.collect::<io::Result<Vec<_>>>();
        let started = kept.and_then(|kept| {
            let mut tickets = self.start(handlers)?;
            tickets.extend(kept);
            Ok(tickets)
        });
        match started {
            Ok(tickets) => self.activity = Activity::Running(tickets),
            Err(error) => {
                log::error!("restart virtio device {}: {error}", self.device.id());
                self.interrupt.notify_needs_reset();
            }
        }
        if let Err(error) = self.catch_up() {
            log::error!("kick virtio device {}: {error}", self.device.id());
        }
    }

    /// Pauses, and lets each handler finish what the guest has queued. That is done on another thread,
    /// for it may wait for the host as long as the host likes. What is not done in time is left to
    /// itself: it keeps what it needs, RAM too.
    pub(super) fn drain(&mut self) {
        let paused = self.pause();
        let activity = mem::replace(&mut self.activity, Activity::Idle);
        let drained = match (paused, activity) {
            (Ok(()), Activity::Paused(handlers)) if !handlers.is_empty() => {
                drain_within(PATIENCE, handlers).map(|handlers| {
                    self.activity = Activity::Paused(handlers);
                })
            }
            (Ok(()), activity) => {
                self.activity = activity;
                Ok(())
            }
            // Its loops end with their runner.
            (Err(busy), _) => Err(io::Error::other(busy)),
        };
        if let Err(error) = drained {
            log::error!(
                "requests of virtio device {} are lost: {error}",
                self.device.id()
            );
        }
    }

    /// Puts the handlers back.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        match mem::replace(&mut self.activity, Activity::Idle) {
            Activity::Paused(handlers) => {
                self.activity = Activity::Running(self.start(handlers)?);
            }
            other => {
                self.activity = other;
                return Ok(());
            }
        }
        self.catch_up()
    }

    /// Makes what the device stores into longer or shorter. No request is under way meanwhile; and a device
    /// that was paused stays so.
    pub(super) fn resize(&mut self, bytes: u64) -> Result<(), ResizeError> {
        let runs = matches!(self.activity, Activity::Running(_));
        self.pause()?;
        let resized = self.device.resize(bytes);
        if resized.is_ok() {
            self.interrupt.notify_config();
        }
        if runs {
            self.resume().map_err(ResizeError::Resume)?;
        }
        resized
    }

    /// Makes up for kicks and interrupts that were lost while handlers were on no loop.
    fn catch_up(&self) -> io::Result<()> {
        self.interrupt.replay();
        self.kicks.iter().try_for_each(|kick| kick.write(1))
    }

    /// Pauses, and says what the device keeps of its own and how far its queues are.
    pub(super) fn state(&mut self) -> (DeviceState, Option<Vec<RingState>>) {
        self.pause()
            .expect("a machine is paused before its state is asked for");
        let mut device = self.device.state();
        let Activity::Paused(handlers) = &self.activity else {
            return (device, None);
        };
        for handler in handlers {
            handler.add_state(&mut device);
        }
        let mut rings: Vec<_> = handlers
            .iter()
            .flat_map(|handler| handler.rings())
            .collect();
        rings.sort_by_key(|ring| ring.index);
        (device, Some(rings))
    }

    /// Takes over the queues and the device of another session. What was served there is paused
    /// here.
    pub(super) fn restore(
        &mut self,
        queues: Vec<QueueSetup>,
        rings: Option<Vec<RingState>>,
        device: DeviceState,
    ) -> Result<(), StateError> {
        if queues.len() != self.queues.len() {
            return Err(StateError::Queues {
                expected: self.queues.len(),
                found: queues.len(),
            });
        }
        for (index, (queue, own)) in queues.iter().zip(&self.queues).enumerate() {
            if queue.max_size != own.max_size {
                return Err(StateError::QueueSize {
                    index,
                    expected: own.max_size,
                    found: queue.max_size,
                });
            }
        }
        self.queues = queues;
        self.device.restore(device)?;
        let Some(states) = rings else {
            return Ok(());
        };
        if !self.negotiation.is_live() {
            return Err(StateError::NotReady);
        }
        let mut activation = self.activation()?;
        let known = |(ring, state): (&Ring, &RingState)| ring.index() == state.index;
        if activation.rings.len() != states.len()
            || !activation.rings.iter().zip(&states).all(known)
        {
            return Err(StateError::RingSet);
        }
        for (ring, state) in activation.rings.iter_mut().zip(states) {
            ring.restore(state);
        }
        self.activity = Activity::Paused(self.device.activate(activation)?);
        Ok(())
    }

    fn activate(&mut self) {
        let Err(error) = self.try_activate() else {
            return;
        };
        match error {
            // The guest's doing: it learns of it by the status.
            ActivateError::BadQueue { .. } => {}
            ActivateError::Held { .. }
            | ActivateError::Run(_)
            | ActivateError::EventFd(_)
            | ActivateError::Backend(_) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let cause = cause.unwrap_or_default();
                log::error!(
                    "activate virtio device {}: {error}: {cause}",
                    self.device.id()
                );
            }
        }
        self.interrupt.notify_needs_reset();
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let activation = self.activation()?;
        let handlers = self.device.activate(activation)?;
        let tickets = self.start(handlers).map_err(ActivateError::Run)?;
        self.activity = Activity::Running(tickets);
        Ok(())
    }

    fn activation(&self) -> Result<Activation, ActivateError> {
        let features = self.negotiation.accepted();
        let rings = self.build_rings(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0)?;
        Ok(Activation {
            features,
            memory: self.memory.clone(),
            rings,
            interrupt: self.interrupt.clone(),
        })
    }

    fn build_rings(&self, event_idx: bool) -> Result<Vec<Ring>, ActivateError> {
        let ram = self.memory.memory();
        let numbered = (0..).zip(self.queues.iter().zip(&self.kicks));
        numbered
            .filter(|(_, (setup, _))| setup.ready)
            .map(|(index, (setup, kick))| {
                let queue = setup
                    .build(&ram, event_idx)
                    .ok_or(ActivateError::BadQueue { index })?;
                let kick = kick.try_clone().map_err(ActivateError::EventFd)?;
                Ok(Ring::new(
                    index,
                    queue,
                    kick,
                    self.interrupt.clone(),
                    self.counters.clone(),
                    self.device.max_request_len(index),
                ))
            })
            .collect()
    }

    /// Hands all handlers to their loops, or none.
    fn start(&self, handlers: Vec<Box<dyn Handler>>) -> io::Result<Vec<Ticket>> {
        let mut tickets = Vec::with_capacity(handlers.len());
        for handler in handlers {
            match self.runner.run(handler) {
                Ok(ticket) => tickets.push(ticket),
                Err(error) => {
                    self.recall(tickets);
                    return Err(error);
                }
            }
        }
        Ok(tickets)
    }

    /// The handlers that come back, and the tickets of those that are late. All of them together are
    /// waited for no longer than [`PATIENCE`].
    fn recall(&self, tickets: Vec<Ticket>) -> (Vec<Box<dyn Handler>>, Vec<Ticket>) {
        let deadline = Instant::now() + PATIENCE;
        let (mut handlers, mut late) = (Vec::with_capacity(tickets.len()), Vec::new());
        for ticket in tickets {
            let patience = deadline.saturating_duration_since(Instant::now());
            match self.runner.recall(ticket, patience) {
                Recall::Back(mut handler) => {
                    handler.rest();
                    handlers.push(handler);
                }
                Recall::Late(ticket) => late.push(ticket),
                Recall::Gone => {}
            }
        }
        (handlers, late)
    }

    /// The driver wrote 0 (virtio 1.3 §2.4, Device Reset): when this returns, the device is as it
    /// was at first and touches no guest memory.
    ///
    /// If the host does not finish a request, the device is not reset. Its status then is not 0, by
    /// which the driver sees that (§2.4.2: a reset is complete when the status reads 0), and says that the
    /// device needs a reset. The driver can write 0 again.
    fn reset(&mut self) {
        if let Err(busy) = self.pause() {
            log::error!("reset virtio device {}: {busy}", self.device.id());
            self.interrupt.notify_needs_reset();
            return;
        }
        self.activity = Activity::Idle;
        self.reset_unseen.set(true);
        self.negotiation.reset();
        self.interrupt.reset();
        for setup in &mut self.queues {
            *setup = QueueSetup::new(setup.max_size);
        }
        for kick in &self.kicks {
            // Kicks meant for the queues that are gone.
            let _ = kick.read();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // One that is late ends with its loop, whose memory and descriptors are its own.
        if let Err(busy) = self.pause() {
            log::error!("end virtio device {}: {busy}", self.device.id());
        }
        // Handlers, which are on no loop by now, may hold what the device's end waits for.
        self.activity = Activity::Idle;
        for thread in self.device.threads() {
            self.runner.release(thread);
        }
    }
}

/// Drains `handlers` on a thread of its own, and gives them back if that takes no longer than
/// `patience`.
fn drain_within(
    patience: Duration,
    mut handlers: Vec<Box<dyn Handler>>,
) -> io::Result<Vec<Box<dyn Handler>>> {
    let (give, take) = mpsc::channel::<Vec<Box<dyn Handler>>>();
    let (done, drained) = mpsc::channel();
    let drain = move || {
        if let Ok(mut handlers) = take.recv() {
            handlers.iter_mut().for_each(|handler| handler.drain());
            // If this thread is late, the caller no longer waits for it.
            let _ = done.send(handlers);
        }
    };
    if Builder::new().name("drain".into()).spawn(drain).is_err() {
        // A host that is out of threads is no reason to lose what the guest said.
        handlers.iter_mut().for_each(|handler| handler.drain());
        return Ok(handlers);
    }
    // The thread waits for them.
    let _ = give.send(handlers);
    let late = |_| io::Error::other(Busy(patience));
    drained.recv_timeout(patience).map_err(late)
}

impl Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activity = match &self.activity {
            Activity::Idle => "idle",
            Activity::Running(_) => "running",
            Activity::Paused(_) => "paused",
        };
        f.debug_struct("Session")
            .field("device", &self.device)
            .field("negotiation", &self.negotiation)
            .field("activity", &activity)
            .finish_non_exhaustive()
    }
}
