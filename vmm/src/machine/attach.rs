//! Joins a virtio device to the guest: a window on the MMIO bus, an interrupt
//! through irqfd, its queues' notifications through ioeventfds, and the kernel
//! parameter by which the guest finds it. Or a place on the PCI bus, which it can have and leave while the
//! guest runs.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use arch::layout::{DEVICE_GSIS, MMIO_WINDOW_BYTES, MMIO_WINDOWS_START};
use devices::bus::{Bus, BusError};
use devices::pci::{AddError, Bridge};
use devices::virtio::transport::mmio::QUEUE_NOTIFY;
use devices::virtio::transport::pci;
use devices::virtio::{Memory, MmioTransport, PciTransport, Transport, VirtioDevice};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vm_memory::Address;
use vmm_sys_util::eventfd::EventFd;

use super::io_threads::IoThreads;
use super::messages::Routes;
use super::{Plugged, lock};

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
    /// There is no place on the PCI bus.
    #[error(transparent)]
    Bridge(#[from] AddError),
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

/// What a guest is told of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlugEvent {
    Came,
    Leave,
}

/// What virtio devices are joined to, and those that are. Hands out windows and interrupt lines, or places on
/// the PCI bus, in the order devices come.
#[derive(Debug)]
pub(crate) struct Backplane {
    /// What was attached so far, by id, in the order the guest finds it.
    pub(crate) transports: Vec<(String, Plugged)>,
    /// The PCI bus, if devices are to be there.
    pub(crate) bridge: Option<Arc<Mutex<Bridge>>>,
    /// Where devices' memory is.
    pub(crate) mmio: Arc<Bus>,
    /// Kernel parameters that name devices.
    pub(crate) parameters: Vec<String>,
    pub(crate) memory: Memory,
    /// The threads that serve devices.
    pub(crate) io: Arc<IoThreads>,
    /// Where PCI devices' messages go.
    pub(crate) routes: Arc<Routes>,
    pub(crate) vm: Arc<VmFd>,
}

impl Backplane {
    /// Attaches a device as `id`. On a PCI bus it gets the number `place`, or the lowest that is free.
    pub(crate) fn attach(
        &mut self,
        id: String,
        device: Box<dyn VirtioDevice>,
        place: Option<u8>,
    ) -> Result<(), AttachError> {
        let transport = match &self.bridge {
            Some(bridge) => self.on_pci(bridge, device, place)?,
            None => self.in_window(device)?,
        };
        self.transports.push((id, transport));
        Ok(())
    }

    /// Takes a device away that no driver has: when this returns, it is gone with all that it had of the host.
    pub(crate) fn detach(&mut self, id: &str) {
        /// A vCPU may be at an access to it. That is no work of a guest's choice, and ends soon.
        const MOMENT: Duration = Duration::from_secs(1);
        let position = self.transports.iter().position(|(other, _)| other == id);
        let (Some(position), Some(bridge)) = (position, &self.bridge) else {
            return;
        };
        let (_, transport) = self.transports.remove(position);
        let place = lock(&transport).place();
        if let Some(place) = place {
            hold(bridge).remove(place);
        }
        // So that the device ends on this thread, which may close and remove what it has.
        let deadline = Instant::now() + MOMENT;
        while Arc::strong_count(&transport) > 1 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells the guest that a device came, or asks it to let go of one.
    pub(crate) fn tell(&self, id: &str, event: PlugEvent) {
        let mut all = self.transports.iter();
        let found = all.find_map(|(other, it)| (other == id).then(|| lock(it).place()));
        if let (Some(Some(place)), Some(bridge)) = (found, &self.bridge) {
            match event {
                PlugEvent::Came => hold(bridge).announce(place),
                PlugEvent::Leave => hold(bridge).ask_to_leave(place),
            }
        }
    }

    fn in_window(&mut self, device: Box<dyn VirtioDevice>) -> Result<Plugged, AttachError> {
        let index = self.transports.len();
        let gsi = DEVICE_GSIS
            .clone()
            .nth(index)
            .ok_or(AttachError::TooManyDevices)?;
        let window = MMIO_WINDOWS_START.raw_value() + index as u64 * MMIO_WINDOW_BYTES;

        let irqfd = irqfd(&self.vm, gsi)?;
        let transport = MmioTransport::new(self.memory.clone(), device, irqfd, self.io.clone())
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
        place: Option<u8>,
    ) -> Result<Plugged, AttachError> {
        let host = self.routes.function(pci::vectors(&*device));
        let host = host.ok_or(AttachError::Vectors)?;
        let io = self.io.clone();
        let transport = PciTransport::new(self.memory.clone(), device, Arc::new(host), io)
            .map_err(AttachError::EventFd)?;
        let transport = Arc::new(Mutex::new(transport));
        hold(bridge).add(transport.clone(), place)?;
        Ok(transport)
    }
}

fn hold(bridge: &Mutex<Bridge>) -> MutexGuard<'_, Bridge> {
    bridge
        .lock()
        .expect("no thread panics while it holds the bridge")
}
