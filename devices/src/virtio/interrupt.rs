//! How a device tells its driver that something happened.
//!
//! An [`Interrupt`] joins the device's event fds to the status bits the driver reads to learn why it
//! was interrupted. The handlers on the io thread set bits, the vCPU threads acknowledge them;
//! all of it is atomic, so neither waits for the other. A device has one line, or [`Vectors`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::Counters;

/// What the driver has yet to learn, for a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InterruptState {
    pending: u32,
    needs_reset: bool,
    generation: u32,
}

/// For a driver that wants no message for a queue, or none for the configuration (virtio 1.3 §4.1.5.1.2.1).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The messages of a device: an event fd for each, and which the driver wants for what.
#[derive(Debug)]
pub(super) struct Vectors {
    events: Arc<[EventFd]>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    /// Whether messages may have been lost, as by a restore.
    lossy: AtomicBool,
}

impl Vectors {
    pub(super) fn new(events: Arc<[EventFd]>, queues: usize) -> Self {
        Self {
            events,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            lossy: AtomicBool::new(false),
        }
    }

    fn slot(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            None => Some(&self.config),
            Some(queue) => self.queues.get(usize::from(queue)),
        }
    }

    /// The vector for queue `queue`, or for the configuration.
    pub(super) fn get(&self, queue: Option<u16>) -> u16 {
        self.slot(queue)
            .map_or(NO_VECTOR, |slot| slot.load(Ordering::SeqCst))
    }

    /// Has the driver's choice, or [`NO_VECTOR`] if there is no such vector.
    pub(super) fn set(&self, queue: Option<u16>, vector: u16) {
        let there = usize::from(vector) < self.events.len();
        let vector = if there { vector } else { NO_VECTOR };
        if let Some(slot) = self.slot(queue) {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    fn send(&self, queue: Option<u16>) {
        if let Some(event) = self.events.get(usize::from(self.get(queue))) {
            // Fails only when 2^64 - 2 messages are already due.
            let _ = event.write(1);
        }
    }

    /// The vectors of the configuration and of each queue, for a snapshot.
    pub(super) fn state(&self) -> (u16, Vec<u16>) {
        let queues = self.queues.iter().map(|slot| slot.load(Ordering::SeqCst));
        (self.get(None), queues.collect())
    }

    /// Takes over what another device's driver chose. False if no driver could have.
    pub(super) fn restore(&self, (config, queues): (u16, Vec<u16>)) -> bool {
        let known = |vector: &u16| *vector == NO_VECTOR || usize::from(*vector) < self.events.len();
        if queues.len() != self.queues.len() || !queues.iter().chain([&config]).all(known) {
            return false;
        }
        self.set(None, config);
        for (index, vector) in (0..).zip(queues) {
            self.set(Some(index), vector);
        }
        self.lossy.store(true, Ordering::SeqCst);
        true
    }

    fn reset(&self) {
        for slot in self.queues.iter().chain([&self.config]) {
            slot.store(NO_VECTOR, Ordering::SeqCst);
        }
    }
}

#[derive(Debug)]
enum Line {
    /// Raised when it is written to (KVM_IRQFD, kvm/api.rst 4.75).
    Pin(EventFd),
    Messages(Arc<Vectors>),
}

#[derive(Debug)]
struct Shared {
    line: Line,
    /// Reasons the driver has not acknowledged yet.
    pending: AtomicU32,
    /// DEVICE_NEEDS_RESET of the device status field.
    needs_reset: AtomicBool,
    /// Changes of the configuration space so far.
    generation: AtomicU32,
    counters: Arc<Counters>,
}

/// How one device interrupts. A clone is the same line or vectors.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

impl Interrupt {
    /// One line for all, which `irqfd` raises.
    pub fn new(irqfd: EventFd, counters: Arc<Counters>) -> Self {
        Self::on(Line::Pin(irqfd), counters)
    }

    /// A message for each reason, as the driver has chosen.
    pub(super) fn by_messages(vectors: Arc<Vectors>, counters: Arc<Counters>) -> Self {
        Self::on(Line::Messages(vectors), counters)
    }

    fn on(line: Line, counters: Arc<Counters>) -> Self {
        Self(Arc::new(Shared {
            line,
            pending: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            counters,
        }))
    }

    /// Used Buffer Notification: queue `index` has new used buffers.
    pub fn notify_queue(&self, index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING, Some(index));
    }

    /// Used Buffer Notification of any of `queues`, all at once where there is one line.
    pub fn notify_queues(&self, queues: impl IntoIterator<Item = u16>) {
        match &self.0.line {
            Line::Pin(_) => self.raise(VIRTIO_MMIO_INT_VRING, None),
            Line::Messages(_) => queues
                .into_iter()
                .for_each(|queue| self.notify_queue(queue)),
        }
    }

    /// Configuration Change Notification: the configuration space or the status has changed.
    pub fn notify_config(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG, None);
    }

    /// The device cannot go on until the driver resets it (virtio 1.3 §2.1.2: having set
    /// DEVICE_NEEDS_RESET, "the device MUST send a device configuration change notification").
    pub fn notify_needs_reset(&self) {
        if !self.0.needs_reset.swap(true, Ordering::SeqCst) {
            self.0.counters.needs_reset.increment();
            self.notify_config();
        }
    }

    /// Raised even if earlier reasons are pending. The line is edge triggered, and an edge that
    /// came while it was masked is gone: the next must not rely on it.
    fn raise(&self, reason: u32, queue: Option<u16>) {
        self.0.pending.fetch_or(reason, Ordering::SeqCst);
        self.0.counters.interrupts.increment();
        match &self.0.line {
            Line::Pin(irqfd) => {
                // Fails only when 2^64 - 2 edges are already due.
                let _ = irqfd.write(1);
            }
            Line::Messages(vectors) => vectors.send(queue),
        }
    }

    pub(super) fn pending(&self) -> u32 {
        self.0.pending.load(Ordering::SeqCst)
    }

    /// What is pending, which is then no more.
    pub(super) fn take_pending(&self) -> u32 {
        self.0.pending.swap(0, Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.0.pending.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// Raises the line again if the driver has not yet seen why it was raised. Messages are not
    /// acknowledged, so after a restore all of them are sent: drivers look at queues for nothing
    /// sometimes anyway.
    pub(super) fn replay(&self) {
        match &self.0.line {
            Line::Pin(_) if self.pending() != 0 => self.raise(0, None),
            Line::Pin(_) => {}
            Line::Messages(vectors) if vectors.lossy.swap(false, Ordering::SeqCst) => {
                let queues = (0..).zip(&vectors.queues).map(|(index, _)| Some(index));
                queues.for_each(|queue| vectors.send(queue));
                if self.pending() & VIRTIO_MMIO_INT_CONFIG != 0 {
                    vectors.send(None);
                }
            }
            Line::Messages(_) => {}
        }
    }

    pub(super) fn state(&self) -> InterruptState {
        InterruptState {
            pending: self.pending(),
            needs_reset: self.needs_reset(),
            generation: self.generation(),
        }
    }

    /// The session replays what is pending once the device goes on.
    pub(super) fn restore(&self, state: InterruptState) {
        self.0.pending.store(state.pending, Ordering::SeqCst);
        self.0
            .needs_reset
            .store(state.needs_reset, Ordering::SeqCst);
        self.0.generation.store(state.generation, Ordering::SeqCst);
    }

    /// Resets the interrupt: nothing is pending after a device reset.
    pub(super) fn reset(&self) {
        self.0.pending.store(0, Ordering::SeqCst);
        self.0.needs_reset.store(false, Ordering::SeqCst);
        if let Line::Messages(vectors) = &self.0.line {
            vectors.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupt() -> (Interrupt, EventFd, Arc<Counters>) {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let counters = Arc::new(Counters::default());
        (
            Interrupt::new(irqfd.try_clone().unwrap(), counters.clone()),
            irqfd,
            counters,
        )
    }

    #[test]
    fn each_notification_raises_the_line_and_names_its_reason() {
        let (interrupt, irqfd, counters) = interrupt();
        interrupt.notify_queue(0);
        assert_eq!(interrupt.pending(), VIRTIO_MMIO_INT_VRING);
        interrupt.notify_config();
        assert_eq!(
            interrupt.pending(),
            VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG
        );
        assert_eq!(irqfd.read().unwrap(), 2);
        assert_eq!(counters.interrupts.get(), 2);
        assert_eq!(interrupt.generation(), 1);
    }

    #[test]
    fn acknowledging_one_reason_keeps_the_other() {
        let (interrupt, _, _) = interrupt();
        interrupt.notify_queue(0);
        interrupt.notify_config();
        interrupt.acknowledge(VIRTIO_MMIO_INT_VRING);
        assert_eq!(interrupt.pending(), VIRTIO_MMIO_INT_CONFIG);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.pending(), 0);
    }

    #[test]
    fn a_reset_is_asked_for_once() {
        let (interrupt, irqfd, counters) = interrupt();
        interrupt.notify_needs_reset();
        interrupt.notify_needs_reset();
        assert!(interrupt.needs_reset());
        assert_eq!(counters.needs_reset.get(), 1);
        assert_eq!(irqfd.read().unwrap(), 1);
        interrupt.reset();
        assert!(!interrupt.needs_reset());
        assert_eq!(interrupt.pending(), 0);
    }

    #[test]
    fn only_an_unseen_interrupt_is_replayed() {
        let (interrupt, irqfd, _) = interrupt();
        interrupt.replay();
        irqfd.read().unwrap_err();
        interrupt.notify_queue(0);
        irqfd.read().unwrap();
        interrupt.replay();
        assert_eq!(irqfd.read().unwrap(), 1);
    }
}
