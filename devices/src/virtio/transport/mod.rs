//! How a driver reaches a device: [`mmio`] has a window of registers and an interrupt line for each, [`pci`]
//! functions on a bus, which send messages.
//!
//! A transport knows registers; devices do not. What they do is the [`Session`](super::session::Session)'s
//! business, which a transport has by way of its [`controls`].

mod controls;
pub mod mmio;
pub mod pci;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::controls::Controls;
use super::{Busy, Counters, ResizeError, StateError, TransportState};

pub use self::mmio::MmioTransport;
pub use self::pci::PciTransport;

/// A device behind its registers, as the machine sees it.
pub trait Transport: Send + Debug {
    /// The event fd by which each queue is notified. They stay the same for the device's life.
    fn kicks(&self) -> &[EventFd];

    fn counters(&self) -> Arc<Counters>;

    /// Which device of the PCI bus it is, if it is on one.
    fn place(&self) -> Option<u8>;

    /// Whether a driver has the device: it has said DRIVER, and has not reset it since and seen that. A kernel that
    /// has let go of a device says ACKNOWLEDGE again: it knows of it.
    fn is_held(&self) -> bool;

    /// Makes what the device stores into longer or shorter: `bytes` of it. The driver is told.
    fn resize(&mut self, bytes: u64) -> Result<(), ResizeError>;

    /// Takes the device's handlers off their loops and keeps them: when this returns the device
    /// does nothing more until [`resume`](Self::resume). The vCPUs are to stand still. If the host does
    /// not finish a request for some seconds, the device goes on as it was.
    fn pause(&mut self) -> Result<(), Busy>;

    /// Like [`pause`](Self::pause), and finishes what the guest has queued. Used before the VM
    /// ends, so that nothing it said is lost. What the host does not finish for some seconds is given
    /// up: the device is not to be used any more then.
    fn drain(&mut self);

    /// Puts the handlers back on their loops. Does nothing to a device that was not paused.
    fn resume(&mut self) -> io::Result<()>;

    /// Pauses the device and says all that another one needs to go on in its place. Panics if it cannot
    /// be paused, which the caller that pauses it first learns without.
    fn state(&mut self) -> TransportState;

    /// Takes over where the device that `state` is of was paused; [`resume`](Self::resume) goes
    /// on. Only for a device no driver has touched, and to be thrown away if it fails.
    fn restore(&mut self, state: TransportState) -> Result<(), StateError>;
}

/// What a transport knows of itself; the rest of [`Transport`] is the session's.
trait Front: Send + Debug {
    fn controls(&self) -> &Controls;
    fn controls_mut(&mut self) -> &mut Controls;

    fn place(&self) -> Option<u8> {
        None
    }

    /// What the transport has besides its controls is added.
    fn whole_state(&mut self) -> TransportState {
        self.controls_mut().state()
    }

    fn take_over(&mut self, state: TransportState) -> Result<(), StateError> {
        self.controls_mut().restore(state)
    }
}

impl<T: Front> Transport for T {
    fn kicks(&self) -> &[EventFd] {
        self.controls().session.kicks()
    }

    fn counters(&self) -> Arc<Counters> {
        self.controls().session.counters.clone()
    }

    fn place(&self) -> Option<u8> {
        Front::place(self)
    }

    fn is_held(&self) -> bool {
        self.controls().session.is_held()
    }

    fn resize(&mut self, bytes: u64) -> Result<(), ResizeError> {
        self.controls_mut().session.resize(bytes)
    }

    fn pause(&mut self) -> Result<(), Busy> {
        self.controls_mut().session.pause()
    }

    fn drain(&mut self) {
        self.controls_mut().session.drain();
    }

    fn resume(&mut self) -> io::Result<()> {
        self.controls_mut().session.resume()
    }

    fn state(&mut self) -> TransportState {
        self.whole_state()
    }

    fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        self.take_over(state)
    }
}
