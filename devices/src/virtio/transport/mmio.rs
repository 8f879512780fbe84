//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2, Virtio Over MMIO).
//!
//! Knows registers; devices do not. Queue notifications normally arrive by ioeventfd and never
//! come here: the VMM registers each of [`kicks`](super::Transport::kicks) at [`QUEUE_NOTIFY`] with the
//! queue's index as datamatch.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use super::Front;
use super::controls::Controls;
use crate::bus::BusDevice;
use crate::virtio::session::Session;
use crate::virtio::setup::{Area, Half};
use crate::virtio::{Interrupt, Memory, Runner, VirtioDevice};

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
pub struct MmioTransport(Controls);

impl MmioTransport {
    /// `irqfd` raises the device's line. Handlers run on `runner` while the driver is ready.
    pub fn new(
        memory: Memory,
        device: Box<dyn VirtioDevice>,
        irqfd: EventFd,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        let interrupt = Interrupt::new(irqfd, device.counters().clone());
        let session = Session::new(memory, device, interrupt, runner)?;
        Ok(Self(Controls::new(session)))
    }

    fn read_register(&mut self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.0.session.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => self.0.offered_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.0.queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.0.queue().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.0.session.interrupt.pending(),
            VIRTIO_MMIO_STATUS => self.0.session.read_status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => self.0.session.interrupt.generation(),
            // VIRTIO_F_RING_RESET is not offered.
            QUEUE_RESET => 0,
            _ => {
                self.0.bad_access();
                0
            }
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        let understood = match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => {
                self.0.device_features_page = value;
                true
            }
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => {
                self.0.driver_features_page = value;
                true
            }
            VIRTIO_MMIO_DRIVER_FEATURES => self.0.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => {
                self.0.selected_queue = value;
                true
            }
            VIRTIO_MMIO_QUEUE_NUM => self.0.set_up(|queue| queue.set_size(value)),
            VIRTIO_MMIO_QUEUE_READY => self.0.write_ready(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.0.set_address(Area::Descriptors, Half::Low, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.0.set_address(Area::Descriptors, Half::High, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.0.set_address(Area::Driver, Half::Low, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.0.set_address(Area::Driver, Half::High, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.0.set_address(Area::Device, Half::Low, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.0.set_address(Area::Device, Half::High, value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                self.0.session.notify(value);
                true
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.0.session.interrupt.acknowledge(value);
                true
            }
            VIRTIO_MMIO_STATUS => {
                self.0.session.write_status(value);
                true
            }
            // There is no region to select.
            VIRTIO_MMIO_SHM_SEL => true,
            _ => false,
        };
        if !understood {
            self.0.bad_access();
        }
    }
}

impl Front for MmioTransport {
    fn controls(&self) -> &Controls {
        &self.0
    }

    fn controls_mut(&mut self) -> &mut Controls {
        &mut self.0
    }
}

/// "The driver MUST only use 32 bit wide and aligned reads and writes to access the control
/// registers" (§4.2.2.2): anything else reads as zero and changes nothing. The configuration
/// space takes any width.
impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.0.session.device.read_config(offset, data);
            return;
        }
        match (register(offset), <&mut [u8; 4]>::try_from(data)) {
            (Some(register), Ok(data)) => *data = self.read_register(register).to_le_bytes(),
            _ => self.0.bad_access(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.0.write_config(offset, data);
            return;
        }
        match (register(offset), <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(data)) => self.write_register(register, u32::from_le_bytes(data)),
            _ => self.0.bad_access(),
        }
    }
}

fn register(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset % 4 == 0)
}

#[cfg(test)]
mod tests;
