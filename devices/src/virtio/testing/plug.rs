//! The device as the driver reaches it. Drivers of the tests name registers by virtio-mmio's offsets; over PCI
//! those stand for the registers that mean the same there, and any other access goes to the BAR as it is.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::pci::testing::Recorder;
use crate::pci::{COMMAND, Function};
use crate::virtio::transport::pci::{BAR_LEN, NOTIFY, NOTIFY_STRIDE};
use crate::virtio::{
    Busy, Counters, Memory, MmioTransport, PciTransport, Runner, StateError, Transport,
    TransportState, VirtioDevice,
};

/// Which transport a device is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    Mmio,
    Pci,
}

impl Wiring {
    pub const ALL: [Self; 2] = [Self::Mmio, Self::Pci];
}

/// A device on its bus.
#[derive(Debug)]
pub enum Plug {
    Mmio(MmioTransport),
    Pci(Box<PciTransport>, Arc<Recorder>),
}

/// What a register of virtio-mmio is over PCI: an offset behind the BAR, and a width.
fn place(register: u32) -> Option<(u64, usize)> {
    Some(match register {
        VIRTIO_MMIO_DEVICE_FEATURES_SEL => (0x00, 4),
        VIRTIO_MMIO_DEVICE_FEATURES => (0x04, 4),
        VIRTIO_MMIO_DRIVER_FEATURES_SEL => (0x08, 4),
        VIRTIO_MMIO_DRIVER_FEATURES => (0x0c, 4),
        VIRTIO_MMIO_STATUS => (0x14, 1),
        VIRTIO_MMIO_CONFIG_GENERATION => (0x15, 1),
        VIRTIO_MMIO_QUEUE_SEL => (0x16, 2),
        VIRTIO_MMIO_QUEUE_NUM_MAX | VIRTIO_MMIO_QUEUE_NUM => (0x18, 2),
        VIRTIO_MMIO_QUEUE_READY => (0x1c, 2),
        VIRTIO_MMIO_QUEUE_DESC_LOW => (0x20, 4),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => (0x24, 4),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => (0x28, 4),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (0x2c, 4),
        VIRTIO_MMIO_QUEUE_USED_LOW => (0x30, 4),
        VIRTIO_MMIO_QUEUE_USED_HIGH => (0x34, 4),
        VIRTIO_MMIO_INTERRUPT_STATUS | VIRTIO_MMIO_INTERRUPT_ACK => (0x1000, 1),
        _ => return None,
    })
}

const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
const DEVICE_CONFIG: u64 = 0x2000;
const TABLE: u64 = 0x4000;
/// The register of the MSI-X capability, and its bit for on.
const MSIX: usize = 16;
const MSIX_ENABLE: u32 = 1 << 31;
/// Where a test has the BAR.
const BAR_START: u32 = 0xe000_0000;

impl Plug {
    pub(super) fn new(
        wiring: Wiring,
        memory: Memory,
        device: Box<dyn VirtioDevice>,
        irqfd: EventFd,
        runner: Arc<dyn Runner>,
    ) -> io::Result<Self> {
        Ok(match wiring {
            Wiring::Mmio => Self::Mmio(MmioTransport::new(memory, device, irqfd, runner)?),
            Wiring::Pci => {
                let host = Arc::new(Recorder::default());
                let transport = PciTransport::new(memory, device, host.clone(), runner)?;
                Self::Pci(Box::new(transport), host)
            }
        })
    }

    pub(super) fn wiring(&self) -> Wiring {
        match self {
            Self::Mmio(_) => Wiring::Mmio,
            Self::Pci(..) => Wiring::Pci,
        }
    }

    fn transport(&self) -> &dyn Transport {
        match self {
            Self::Mmio(transport) => transport,
            Self::Pci(transport, _) => &**transport,
        }
    }

    fn transport_mut(&mut self) -> &mut dyn Transport {
        match self {
            Self::Mmio(transport) => transport,
            Self::Pci(transport, _) => &mut **transport,
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

    /// Messages that the device sent since the last time.
    pub(super) fn messages(&self) -> u64 {
        match self {
            Self::Mmio(_) => 0,
            Self::Pci(_, host) => host.sent(),
        }
    }

    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let transport = match self {
            Self::Mmio(transport) => return transport.read(offset, data),
            Self::Pci(transport, _) => transport,
        };
        match translated(offset, data.len()) {
            Some((offset, width)) if data.len() == 4 => transport.read(offset, &mut data[..width]),
            Some((offset, _)) => transport.read(offset, data),
            None => transport.read(offset, data),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let transport = match self {
            Self::Mmio(transport) => return transport.write(offset, data),
            Self::Pci(transport, _) => transport,
        };
        let place = translated(offset, data.len());
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        match (u32::try_from(offset), value, place) {
            (Ok(VIRTIO_MMIO_QUEUE_NOTIFY), Ok(queue), _) => {
                let at = u64::from(NOTIFY) + u64::from(queue) * u64::from(NOTIFY_STRIDE);
                transport.write(at, &[0; 2]);
            }
            // It is acknowledged by being read.
            (Ok(VIRTIO_MMIO_INTERRUPT_ACK), ..) => transport.read(0x1000, &mut [0]),
            (Ok(register), Ok(value), Some((offset, width))) => {
                match (register, value) {
                    (VIRTIO_MMIO_STATUS, 1) => switch_on(transport),
                    (VIRTIO_MMIO_QUEUE_READY, 1) => choose_vector(transport),
                    _ => {}
                }
                transport.write(offset, &data[..width]);
            }
            (.., Some((offset, _))) => transport.write(offset, data),
            (.., None) => transport.write(offset, data),
        }
    }
}

/// Where an access by virtio-mmio's offsets goes.
fn translated(offset: u64, len: usize) -> Option<(u64, usize)> {
    if let Some(offset) = offset.checked_sub(CONFIG) {
        return Some((DEVICE_CONFIG + offset, len));
    }
    let register = u32::try_from(offset).ok()?;
    place(register).filter(|_| len == 4)
}

/// What the kernel of a guest does before its virtio driver comes: memory, and all vectors unmasked.
fn switch_on(transport: &mut PciTransport) {
    transport.write_config(COMMAND, 1 << 1, u32::MAX);
    for vector in 0..=u64::try_from(transport.kicks().len()).expect("there are few") {
        for (word, value) in [0xfee0_0000, 0, 0x20, 0_u32].into_iter().enumerate() {
            let at = TABLE + vector * 16 + 4 * u64::try_from(word).expect("it is one of four");
            transport.write(at, &value.to_le_bytes());
        }
    }
    transport.write_config(MSIX, MSIX_ENABLE, 0xffff_0000);
    // The configuration has the first vector.
    transport.write(0x10, &0_u16.to_le_bytes());
    transport.moved(Some(BAR_START.into()));
    assert!(transport.bar_len() == u64::from(BAR_LEN));
}

/// Each queue has the vector that follows its number.
fn choose_vector(transport: &mut PciTransport) {
    let mut queue = [0; 2];
    transport.read(0x16, &mut queue);
    let vector = u16::from_le_bytes(queue).saturating_add(1);
    transport.write(0x1a, &vector.to_le_bytes());
}
