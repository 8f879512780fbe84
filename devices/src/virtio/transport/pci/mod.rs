//! The virtio-pci transport, modern only (virtio 1.3 §4.1, Virtio Over PCI Bus).
//!
//! A function of one BAR: the registers of [`layout`], the MSI-X table and its pending bits. The driver
//! notifies each queue at an address of its own, where the host's kernel waits for it; interrupts are
//! messages, for which it has an event fd each. There is no INTx: a driver that enables no MSI-X has to
//! look at the ISR status by itself.

mod common;
mod layout;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::layout::{Access, Region};
use super::Front;
use super::controls::Controls;
use crate::bus::BusDevice;
use crate::pci::{ConfigSpace, Function, Host, Identity, Msix};
use crate::virtio::interrupt::Vectors;
use crate::virtio::session::Session;
use crate::virtio::state::PciState;
use crate::virtio::{Interrupt, Memory, Runner, StateError, TransportState, VirtioDevice};

pub use self::layout::{BAR_LEN, NOTIFY, NOTIFY_STRIDE};

/// Virtio's vendor, and the device of virtio device 0 (§4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// "The PCI Subsystem Device ID ... 0x40 or higher" says that there is no transitional interface (§4.1.2.1).
const SUBSYSTEM: u16 = 0x1100;
/// "Device does not fit in any defined classes."
const CLASS: u32 = 0xff_0000;

/// A virtio device that is a function of a PCI bus.
#[derive(Debug)]
pub struct PciTransport {
    controls: Controls,
    vectors: Arc<Vectors>,
    config: ConfigSpace,
    msix: Msix,
    /// The capability by which the BAR is reached without its memory.
    access: Access,
    host: Arc<dyn Host>,
    /// Where the memory behind the BAR answers.
    at: Option<u64>,
    /// Its number on the bus, once it is there.
    device: Option<u8>,
}

/// How many vectors a device of so many queues has: one more, for its configuration.
pub fn vectors(device: &dyn VirtioDevice) -> usize {
    device.queue_sizes().len() + 1
}

impl PciTransport {
    /// Handlers run on `runner` while the driver is ready.
    pub fn new(
        memory: Memory,
        device: Box<dyn VirtioDevice>,
        host: Arc<dyn Host>,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        let events = (0..vectors(&*device)).map(|_| EventFd::new(flags));
        let events: Arc<[_]> = events.collect::<io::Result<Vec<_>>>()?.into();
        let identity = Identity {
            vendor: VENDOR,
            device: u16::try_from(device.id()).map_or(FIRST_DEVICE, |id| FIRST_DEVICE + id),
            // "Drivers MUST match any PCI Revision ID value", and devices have 1 or more (§4.1.2.1).
            revision: 1,
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut config = ConfigSpace::new(identity).with_bar(BAR_LEN);
        let places = (layout::TABLE, layout::PENDING);
        let msix = Msix::new(&mut config, events.clone(), places, host.clone());
        let access = layout::add_capabilities(&mut config);
        let vectors = Arc::new(Vectors::new(events, device.queue_sizes().len()));
        let interrupt = Interrupt::by_messages(vectors.clone(), device.counters().clone());
        let session = Session::new(memory, device, interrupt, runner)?;
        Ok(Self {
            controls: Controls::new(session),
            vectors,
            config,
            msix,
            access,
            host,
            at: None,
            device: None,
        })
    }

    fn try_read(&mut self, offset: u64, data: &mut [u8]) -> bool {
        match Region::of(offset) {
            Some((Region::Common, offset)) => {
                common::read(&mut self.controls, &self.vectors, offset, data)
            }
            // "The device MUST reset ISR status to 0 on driver read" (§4.1.4.5.1).
            Some((Region::Isr, 0)) if data.len() == 1 => {
                [data[0], ..] = self.controls.session.interrupt.take_pending().to_le_bytes();
                true
            }
            Some((Region::Device, offset)) => {
                self.controls.session.device.read_config(offset, data);
                true
            }
            Some((Region::Table, offset)) => self.msix.read_table(offset, data),
            Some((Region::Pending, offset)) => self.msix.read_pending(offset, data),
            Some((Region::Isr | Region::Notify, _)) | None => false,
        }
    }

    fn try_write(&mut self, offset: u64, data: &[u8]) -> bool {
        match Region::of(offset) {
            Some((Region::Common, offset)) => {
                common::write(&mut self.controls, &self.vectors, offset, data)
            }
            Some((Region::Device, offset)) => {
                self.controls.write_config(offset, data);
                true
            }
            // What the host's kernel does not take, as when the BAR could not be watched.
            Some((Region::Notify, offset)) if offset % u64::from(NOTIFY_STRIDE) == 0 => {
                let queue = u32::try_from(offset / u64::from(NOTIFY_STRIDE));
                queue
                    .map(|queue| self.controls.session.notify(queue))
                    .is_ok()
            }
            Some((Region::Table, offset)) => self.msix.write_table(offset, data),
            Some((Region::Isr | Region::Notify | Region::Pending, _)) | None => false,
        }
    }

    fn for_each_notification(
        &self,
        at: u64,
        act: impl Fn(&dyn Host, u64, &EventFd) -> io::Result<()>,
    ) {
        let first = at + u64::from(NOTIFY);
        for (queue, kick) in (0..).zip(self.controls.session.kicks()) {
            let address = first + queue * u64::from(NOTIFY_STRIDE);
            if let Err(error) = act(&*self.host, address, kick) {
                // Notifications come as stores to the BAR then. A driver may move it as often as it likes.
                log::debug!("notifications of queue {queue}: {error}");
            }
        }
    }
}

impl Front for PciTransport {
    fn controls(&self) -> &Controls {
        &self.controls
    }

    fn controls_mut(&mut self) -> &mut Controls {
        &mut self.controls
    }

    fn place(&self) -> Option<u8> {
        self.device
    }

    fn whole_state(&mut self) -> TransportState {
        let pci = PciState {
            device: self.device.unwrap_or_default(),
            registers: self.config.state(),
            vectors: self.vectors.state(),
            table: self.msix.state(),
        };
        TransportState {
            pci: Some(pci),
            ..self.controls.state()
        }
    }

    fn take_over(&mut self, mut state: TransportState) -> Result<(), StateError> {
        // Where it is was said when it was added.
        let PciState {
            device: _,
            registers,
            vectors,
            table,
        } = state.pci.take().ok_or(StateError::Transport)?;
        if !self.config.restore(&registers) || !self.vectors.restore(vectors) {
            return Err(StateError::Pci);
        }
        self.controls.restore(state)?;
        match self.msix.restore(&self.config, &table) {
            true => Ok(()),
            false => Err(StateError::Pci),
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.try_read(offset, data) {
            self.controls.bad_access();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !self.try_write(offset, data) {
            self.controls.bad_access();
        }
    }
}

impl Function for PciTransport {
    fn read_config(&mut self, register: usize) -> u32 {
        if let Some((offset, len)) = self.access.target(&self.config, register) {
            let mut data = [0; 4];
            self.read(offset, &mut data[..len]);
            self.config
                .write(register, u32::from_le_bytes(data), u32::MAX);
        }
        let isr = self.controls.session.interrupt.pending() != 0 && !self.msix.is_enabled();
        self.config.read(register) | layout::interrupt_status(register, isr)
    }

    fn write_config(&mut self, register: usize, value: u32, mask: u32) {
        self.config.write(register, value, mask);
        self.msix.configured(&self.config, register);
        if let Some((offset, len)) = self.access.target(&self.config, register) {
            let data = self.config.read(register).to_le_bytes();
            self.write(offset, &data[..len]);
        }
    }

    fn bar_len(&self) -> u64 {
        BAR_LEN.into()
    }

    fn wanted(&self) -> Option<u64> {
        self.config.memory()
    }

    fn moved(&mut self, address: Option<u64>) {
        if let Some(before) = std::mem::replace(&mut self.at, address) {
            self.for_each_notification(before, |host, address, kick| host.unwatch(address, kick));
        }
        if let Some(now) = address {
            self.for_each_notification(now, |host, address, kick| host.watch(address, kick));
        }
    }

    fn placed(&mut self, device: Option<u8>) {
        self.device = device;
        if device.is_none() {
            self.msix.close_all();
        }
    }
}

#[cfg(test)]
mod tests;
