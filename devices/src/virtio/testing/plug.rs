//! The device as the driver reaches it, by virtio-mmio's registers.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::virtio::{Busy, Counters, MmioTransport, StateError, Transport, TransportState};

/// A device on its bus.
#[derive(Debug)]
pub enum Plug {
    Mmio(MmioTransport),
}

impl Plug {
    fn transport(&self) -> &dyn Transport {
        match self {
            Self::Mmio(transport) => transport,
        }
    }

    fn transport_mut(&mut self) -> &mut dyn Transport {
        match self {
            Self::Mmio(transport) => transport,
        }
    }

    pub fn kicks(&self) -> &[EventFd] {
        self.transport().kicks()
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.transport().counters()
    }

    pub fn pause(&mut self) -> Result<(), Busy> {
        self.transport_mut().pause()
    }

    pub fn drain(&mut self) {
        self.transport_mut().drain();
    }

    pub fn resume(&mut self) -> io::Result<()> {
        self.transport_mut().resume()
    }

    pub fn state(&mut self) -> TransportState {
        self.transport_mut().state()
    }

    pub fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        self.transport_mut().restore(state)
    }

    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Mmio(transport) => transport.read(offset, data),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match self {
            Self::Mmio(transport) => transport.write(offset, data),
        }
    }
}
