//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2, Virtio Over MMIO).
//!
//! Knows registers; devices do not. Queue notifications normally arrive by ioeventfd and never
//! come here: the VMM registers each of [`MmioTransport::kicks`] at [`QUEUE_NOTIFY`] with the
//! queue's index as datamatch.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use super::session::Session;
use super::setup::{Area, Half, QueueSetup};
use super::{Busy, Counters, Memory, Runner, StateError, TransportState, VirtioDevice};
use crate::bus::BusDevice;

/// Size of a device's window: its registers and its configuration space.
pub const WINDOW_LEN: u64 = 0x1000;
/// Where in the window the driver notifies the device, for ioeventfds of 4 bytes.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "pod ", little-endian. Drivers only show it.
const VENDOR: u32 = 0x2064_6f70;
/// What the SHMLen and SHMBase registers read as for a region that does not exist.
const NO_REGION: u32 = u32::MAX;
const QUEUE_RESET: u32 = 0x0c0;

/// A virtio device in a window of the guest's physical address space.
#[derive(Debug)]
pub struct MmioTransport {
    session: Session,
    device_features_page: u32,
    driver_features_page: u32,
    selected_queue: u32,
}

impl MmioTransport {
    /// `irqfd` raises the device's line. Handlers run on `runner` while the driver is ready.
    pub fn new(
        memory: Memory,
        device: Box<dyn VirtioDevice>,
        irqfd: EventFd,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        Ok(Self {
            session: Session::new(memory, device, irqfd, runner)?,
            device_features_page: 0,
            driver_features_page: 0,
            selected_queue: 0,
        })
    }

    /// The event fd by which each queue is notified. They stay the same for the device's life.
    pub fn kicks(&self) -> &[EventFd] {
        self.session.kicks()
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.session.counters.clone()
    }

    /// Takes the device's handlers off their loops and keeps them: when this returns the device
    /// does nothing more until [`resume`](Self::resume). The vCPUs are to stand still. If the host does
    /// not finish a request for some seconds, the device goes on as it was.
    pub fn pause(&mut self) -> Result<(), Busy> {
        self.session.pause()
    }

    /// Like [`pause`](Self::pause), and finishes what the guest has queued. Used before the VM
    /// ends, so that nothing it said is lost. What the host does not finish for some seconds is given
    /// up: the device is not to be used any more then.
    pub fn drain(&mut self) {
        self.session.drain();
    }

    /// Puts the handlers back on their loops. Does nothing to a device that was not paused.
    pub fn resume(&mut self) -> io::Result<()> {
        self.session.resume()
    }

    /// Pauses the device and says all that another one needs to go on in its place. Panics if it cannot
    /// be paused, which who pauses it first learns without.
    pub fn state(&mut self) -> TransportState {
        let (device, rings) = self.session.state();
        TransportState {
            device_features_page: self.device_features_page,
            driver_features_page: self.driver_features_page,
            selected_queue: self.selected_queue,
            negotiation: self.session.negotiation.state(),
            interrupt: self.session.interrupt.state(),
            queues: self.session.queues.clone(),
            rings,
            device,
        }
    }

    /// Takes over where the device that `state` is of was paused; [`resume`](Self::resume) goes
    /// on. Only for a device no driver has touched, and to be thrown away if it fails.
    pub fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        let TransportState {
            device_features_page,
            driver_features_page,
            selected_queue,
            negotiation,
            interrupt,
            queues,
            rings,
            device,
        } = state;
        self.device_features_page = device_features_page;
        self.driver_features_page = driver_features_page;
        self.selected_queue = selected_queue;
        self.session.negotiation.restore(negotiation)?;
        self.session.interrupt.restore(interrupt);
        self.session.restore(queues, rings, device)
    }

    fn queue(&mut self) -> Option<&mut QueueSetup> {
        let index = usize::try_from(self.selected_queue).ok()?;
        self.session.queues.get_mut(index)
    }

    /// The selected queue, if the driver may set it up now. While a queue is ready its registers
    /// stand still.
    fn queue_to_set_up(&mut self) -> Option<&mut QueueSetup> {
        if !self.session.negotiation.sets_up_queues() {
            return None;
        }
        self.queue().filter(|queue| !queue.ready)
    }

    fn read_register(&mut self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.session.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => self
                .session
                .negotiation
                .offered_page(self.device_features_page),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.session.interrupt.pending(),
            VIRTIO_MMIO_STATUS => self.session.status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => self.session.interrupt.generation(),
            // VIRTIO_F_RING_RESET is not offered.
            QUEUE_RESET => 0,
            _ => {
                self.session.counters.bad_accesses.increment();
                0
            }
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let understood = match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => {
                self.device_features_page = value;
                true
            }
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => {
                self.driver_features_page = value;
                true
            }
            VIRTIO_MMIO_DRIVER_FEATURES => self
                .session
                .negotiation
                .accept_page(self.driver_features_page, value),
            VIRTIO_MMIO_QUEUE_SEL => {
                self.selected_queue = value;
                true
            }
            VIRTIO_MMIO_QUEUE_NUM => self.set_up(|queue| queue.set_size(value)),
            VIRTIO_MMIO_QUEUE_READY => self.write_ready(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.set_address(Area::Descriptors, Half::Low, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.set_address(Area::Descriptors, Half::High, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.set_address(Area::Driver, Half::Low, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.set_address(Area::Driver, Half::High, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.set_address(Area::Device, Half::Low, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_address(Area::Device, Half::High, value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                self.session.notify(value);
                true
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.session.interrupt.acknowledge(value);
                true
            }
            VIRTIO_MMIO_STATUS => {
                self.session.write_status(value);
                true
            }
            // There is no region to select.
            VIRTIO_MMIO_SHM_SEL => true,
            _ => false,
        };
        if !understood {
            self.session.counters.bad_accesses.increment();
        }
    }

    fn set_up(&mut self, set: impl FnOnce(&mut QueueSetup)) -> bool {
        self.queue_to_set_up().map(set).is_some()
    }

    fn set_address(&mut self, area: Area, half: Half, value: u32) -> bool {
        self.set_up(|queue| queue.set_address(area, half, value))
    }

    /// A queue can be unready again until DRIVER_OK. After that only a device reset stops it, for
    /// want of VIRTIO_F_RING_RESET.
    fn write_ready(&mut self, value: u32) -> bool {
        let open = self.session.negotiation.sets_up_queues();
        match (self.queue(), value) {
            (Some(queue), 0 | 1) if open => {
                queue.ready = value == 1;
                true
            }
            _ => false,
        }
    }
}

/// "The driver MUST only use 32 bit wide and aligned reads and writes to access the control
/// registers" (§4.2.2.2): anything else reads as zero and changes nothing. The configuration
/// space takes any width.
impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.session.device.read_config(offset, data);
            return;
        }
        match (register(offset), <&mut [u8; 4]>::try_from(data)) {
            (Some(register), Ok(data)) => *data = self.read_register(register).to_le_bytes(),
            _ => self.session.counters.bad_accesses.increment(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if self.session.negotiation.has_driver() {
                self.session.device.write_config(offset, data);
            }
            return;
        }
        match (register(offset), <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(data)) => self.write_register(register, u32::from_le_bytes(data)),
            _ => self.session.counters.bad_accesses.increment(),
        }
    }
}

fn register(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset % 4 == 0)
}

#[cfg(test)]
mod tests;
