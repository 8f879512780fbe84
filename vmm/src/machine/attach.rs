//! Joins a virtio device to the guest: a window on the MMIO bus, an interrupt
//! through irqfd, its queues' notifications through ioeventfds, and the kernel
//! parameter by which the guest finds it. Or a place on the PCI bus.

use std::io;
use std::sync::{Arc, Mutex};

use arch::layout::{DEVICE_GSIS, MMIO_WINDOW_BYTES, MMIO_WINDOWS_START};
use devices::bus::{Bus, BusError};
use devices::pci::{Bridge, Full};
use devices::virtio::transport::mmio::QUEUE_NOTIFY;
use devices::virtio::transport::pci;
use devices::virtio::{Memory, MmioTransport, PciTransport, Runner, Transport, VirtioDevice};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vm_memory::Address;
use vmm_sys_util::eventfd::EventFd;

use super::Plugged;
use super::messages::Routes;

/// Why a device could not be attached.
#[derive(Debug, Error)]
pub(crate) enum AttachError {
    /// All interrupt lines are taken.
    #[error(
        "no interrupt line is left: {max} virtio devices are possible",
        max = DEVICE_GSIS.count()
    )]
    TooManyDevices,
    /// eventfd failed.
    #[error("create an event fd")]
    EventFd(#[source] io::Error),
    /// KVM_IRQFD failed.
    #[error("connect interrupt line {gsi} to KVM")]
    Irqfd {
        /// IOAPIC pin.
        gsi: u32,
        source: kvm_ioctls::Error,
    },
    /// KVM_IOEVENTFD failed.
    #[error("connect the notification of queue {queue} to KVM")]
    Ioeventfd {
        /// Queue index.
        queue: u32,
        source: kvm_ioctls::Error,
    },
    /// All places on the PCI bus are taken.
    #[error(transparent)]
    Full(#[from] Full),
    /// KVM takes no more routes.
    #[error("there are more interrupt vectors than KVM has routes for")]
    Vectors,
    /// Two devices at one address.
    #[error("put the device on the bus")]
    Bus(#[from] BusError),
}

/// An event fd whose writes raise IOAPIC pin `gsi`.
pub(crate) fn irqfd(vm: &VmFd, gsi: u32) -> Result<EventFd, AttachError> {
    let irqfd =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(AttachError::EventFd)?;
    vm.register_irqfd(&irqfd, gsi)
        .map_err(|source| AttachError::Irqfd { gsi, source })?;
    Ok(irqfd)
}

/// Hands out windows and interrupt lines, or places on the PCI bus, in the order devices come.
pub(crate) struct Attacher<'a> {
    pub(crate) vm: &'a VmFd,
    pub(crate) memory: Memory,
    pub(crate) runner: Arc<dyn Runner>,
    /// The bus being filled.
    pub(crate) mmio: Arc<Bus>,
    /// The PCI bus, if devices are to be there.
    pub(crate) bridge: Option<Arc<Mutex<Bridge>>>,
    /// Where PCI devices' messages go.
    pub(crate) routes: Arc<Routes>,
    /// What was attached so far, by id.
    pub(crate) transports: Vec<(String, Plugged)>,
    /// Kernel parameters that name it.
    pub(crate) parameters: Vec<String>,
}

impl Attacher<'_> {
    pub(crate) fn attach(
        &mut self,
        id: String,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), AttachError> {
        let transport = match &self.bridge {
            Some(bridge) => self.on_pci(bridge, device)?,
            None => self.in_window(device)?,
        };
        self.transports.push((id, transport));
        Ok(())
    }

    fn in_window(&mut self, device: Box<dyn VirtioDevice>) -> Result<Plugged, AttachError> {
        let index = self.transports.len();
        let gsi = DEVICE_GSIS
            .clone()
            .nth(index)
            .ok_or(AttachError::TooManyDevices)?;
        let window = MMIO_WINDOWS_START.raw_value() + index as u64 * MMIO_WINDOW_BYTES;

        let irqfd = irqfd(self.vm, gsi)?;
        let transport = MmioTransport::new(self.memory.clone(), device, irqfd, self.runner.clone())
            .map_err(AttachError::EventFd)?;
        for (queue, kick) in (0_u32..).zip(transport.kicks()) {
            let address = IoEventAddress::Mmio(window + QUEUE_NOTIFY);
            self.vm
                .register_ioevent(kick, &address, queue)
                .map_err(|source| AttachError::Ioeventfd { queue, source })?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio
            .insert(window, MMIO_WINDOW_BYTES, transport.clone())?;
        // Linux, virtio_mmio.c: <size>@<base address>:<interrupt>
        self.parameters
            .push(format!("virtio_mmio.device=4K@{window:#x}:{gsi}"));
        Ok(transport)
    }

    /// The guest finds it by itself, and KVM is told of its event fds when the guest has set it up.
    fn on_pci(
        &self,
        bridge: &Mutex<Bridge>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Plugged, AttachError> {
        let host = self.routes.function(pci::vectors(&*device));
        let host = host.ok_or(AttachError::Vectors)?;
        let runner = self.runner.clone();
        let transport = PciTransport::new(self.memory.clone(), device, Arc::new(host), runner)
            .map_err(AttachError::EventFd)?;
        let transport = Arc::new(Mutex::new(transport));
        let mut bridge = bridge.lock().expect("no other thread has it yet");
        bridge.add(transport.clone())?;
        Ok(transport)
    }
}
