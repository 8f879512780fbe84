//! How a device tells its driver that something happened.
//!
//! An [`Interrupt`] joins the device's irqfd to the status bits the driver reads to learn why it
//! was interrupted. The handlers on the io thread set bits, the vCPU threads acknowledge them;
//! all of it is atomic, so neither waits for the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

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

#[derive(Debug)]
struct Shared {
    irqfd: EventFd,
    /// Reasons the driver has not acknowledged yet.
    pending: AtomicU32,
    /// DEVICE_NEEDS_RESET of the device status field.
    needs_reset: AtomicBool,
    /// Changes of the configuration space so far.
    generation: AtomicU32,
    counters: Arc<Counters>,
}

/// One device's interrupt line. A clone is the same line.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

impl Interrupt {
    /// `irqfd` raises the line when written to (KVM_IRQFD, kvm/api.rst 4.75).
    pub fn new(irqfd: EventFd, counters: Arc<Counters>) -> Self {
        Self(Arc::new(Shared {
            irqfd,
            pending: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            counters,
        }))
    }

    /// Used Buffer Notification: some queue has new used buffers.
    pub fn notify_queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Configuration Change Notification: the configuration space or the status has changed.
    pub fn notify_config(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
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
    fn raise(&self, reason: u32) {
        self.0.pending.fetch_or(reason, Ordering::SeqCst);
        self.0.counters.interrupts.increment();
        // Fails only when 2^64 - 2 edges are already due.
        let _ = self.0.irqfd.write(1);
    }

    pub(super) fn pending(&self) -> u32 {
        self.0.pending.load(Ordering::SeqCst)
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

    /// Raises the line again if the driver has not yet seen why it was raised.
    pub(super) fn replay(&self) {
        if self.pending() != 0 {
            self.raise(0);
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
        interrupt.notify_queue();
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
        interrupt.notify_queue();
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
        interrupt.notify_queue();
        irqfd.read().unwrap();
        interrupt.replay();
        assert_eq!(irqfd.read().unwrap(), 1);
    }
}
