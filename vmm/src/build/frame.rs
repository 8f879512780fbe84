//! What a machine has however it comes to be: KVM's VM with its RAM, and devices.

use std::sync::{Arc, Mutex};

use api::{TransportConfig, VmConfig};
use arch::layout::{PCI_EVENT_GSI, PCI_HOTPLUG_PORTS, PCI_HOTPLUG_PORTS_LEN, PCI_WINDOW};
use arch::state::CpuFeatures;
use arch::{irqchip, pmu};
use devices::bus::Bus;
use devices::legacy::Serial;
use devices::pci::{Bridge, CONFIG_PORTS, CONFIG_PORTS_LEN, EventPorts};
use devices::virtio::Memory;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};

use super::parts::{Ports, Slots, attach_devices, attach_memory, port_devices};
use super::{BuildError, Surroundings};
use crate::console::socket::SocketConsole;
use crate::console::streams::PowerButton;
use crate::machine::attach::{Backplane, irqfd};
use crate::machine::messages::Routes;
use crate::machine::resize::MemoryHandles;
use crate::machine::vcpu::Buses;
use crate::machine::vcpus::{Common, Vcpus};
use crate::machine::{Machine, Timeline};
use crate::memory::Ram;
use crate::snapshot::Loaded;

/// What the host has for a VM.
pub(super) struct Host {
    timeline: Timeline,
    pub(super) kvm: Kvm,
    /// What KVM supports.
    pub(super) cpuid: CpuId,
}

impl Host {
    pub(super) fn open(config: &VmConfig) -> Result<Self, BuildError> {
        let timeline = Timeline::start();
        let kvm = open_kvm()?;
        let (wanted, max) = (config.cpus.max().get(), kvm.get_max_vcpus());
        if usize::from(wanted) > max {
            return Err(BuildError::TooManyCpus { wanted, max });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| BuildError::Kvm("read the CPUID that KVM supports".into(), source))?;
        Ok(Self {
            timeline,
            kvm,
            cpuid,
        })
    }
}

/// A VM of KVM's, which has RAM and no vCPUs yet.
pub(super) struct Frame {
    pub(super) timeline: Timeline,
    pub(super) ram: Ram,
    pub(super) vm: Arc<VmFd>,
    cpuid: CpuId,
}

/// What the guest finds, and the host's side of it.
pub(super) struct Devices {
    ports: Arc<Bus>,
    /// The virtio devices, and how the guest finds them.
    pub(super) backplane: Backplane,
    sockets: Vec<SocketConsole>,
    serial: Option<Arc<Mutex<Serial>>>,
    button: Option<PowerButton>,
    memory: MemoryHandles,
}

impl Frame {
    /// Gives each vCPU `cpuid`, but for what tells them apart.
    pub(super) fn new(host: Host, config: &VmConfig, cpuid: CpuId) -> Result<Self, BuildError> {
        let Host {
            mut timeline, kvm, ..
        } = host;
        timeline.mark("kvm");
        let ram = Ram::new(&config.memory)?;
        timeline.mark("ram");
        let vm = kvm
            .create_vm()
            .map_err(|source| BuildError::Kvm("create a VM".into(), source))?;
        // RAM first: both calls change what vCPUs read under SRCU, but the change of
        // RAM alone waits for readers, and long after another one has just begun.
        ram.register(&vm)?;
        irqchip::create(&vm)?;
        pmu::disable(&vm)
            .map_err(|source| BuildError::Kvm("disable performance counters".into(), source))?;
        timeline.mark("vm");
        Ok(Self {
            timeline,
            ram,
            vm: Arc::new(vm),
            cpuid,
        })
    }

    /// Makes the devices, as they were in a snapshot if there is one.
    pub(super) fn devices(
        &mut self,
        config: &VmConfig,
        around: &Surroundings,
        loaded: Option<&Loaded>,
    ) -> Result<Devices, BuildError> {
        let mut sockets = Vec::new();
        let Ports { bus, serial } = port_devices(config, around, &self.vm, loaded, &mut sockets)?;
        let mmio = Arc::new(Bus::new());
        let bridge = match config.transport {
            TransportConfig::Mmio => None,
            TransportConfig::Pci => {
                let line = irqfd(&self.vm, PCI_EVENT_GSI).map_err(|source| BuildError::Attach {
                    device: "the PCI bus".into(),
                    source,
                })?;
                let bridge = Arc::new(Mutex::new(Bridge::new(mmio.clone(), PCI_WINDOW, line)));
                bus.insert(CONFIG_PORTS, CONFIG_PORTS_LEN, bridge.clone())?;
                let events = Arc::new(Mutex::new(EventPorts(bridge.clone())));
                let (ports, len) = (PCI_HOTPLUG_PORTS, PCI_HOTPLUG_PORTS_LEN);
                bus.insert(ports.into(), len.into(), events)?;
                Some(bridge)
            }
        };
        let backplane = Backplane {
            transports: Vec::new(),
            bridge,
            mmio,
            parameters: Vec::new(),
            memory: Memory::new(self.ram.memory().clone()),
            io: Arc::default(),
            routes: Routes::new(&self.vm),
            vm: self.vm.clone(),
        };
        let mut slots = Slots { backplane, loaded };
        let button = attach_devices(config, around, &mut slots, &mut sockets)?;
        let memory = attach_memory(config, &mut slots)?;
        self.timeline.mark("devices");
        Ok(Devices {
            ports: Arc::new(bus),
            backplane: slots.backplane,
            sockets,
            serial,
            button,
            memory,
        })
    }

    /// What all vCPUs have.
    pub(super) fn common(
        &self,
        config: &VmConfig,
        around: &Surroundings,
        devices: &Devices,
    ) -> Common {
        Common {
            possible: config.cpus.max().get(),
            cpuid: self.cpuid.clone(),
            buses: Buses {
                ports: devices.ports.clone(),
                mmio: devices.backplane.mmio.clone(),
            },
            memory: self.ram.memory().clone(),
            exits: Arc::default(),
            inbox: around.inbox.clone(),
        }
    }

    /// Makes the machine, with the vCPUs in it.
    pub(super) fn machine(mut self, config: &VmConfig, devices: Devices, vcpus: Vcpus) -> Machine {
        self.timeline.mark("vcpus");
        Machine {
            timeline: self.timeline,
            button: devices.button,
            vcpus,
            running: config.cpus.boot().get(),
            shrinking: None,
            backplane: devices.backplane,
            leaving: Vec::new(),
            memory: devices.memory,
            _sockets: devices.sockets,
            serial: devices.serial,
            features: CpuFeatures::of(&self.cpuid),
            remote: None,
            source: None,
            vm: self.vm,
            ram: self.ram,
        }
    }
}

fn open_kvm() -> Result<Kvm, BuildError> {
    const STABLE_API: i32 = 12;
    let kvm = Kvm::new().map_err(|source| {
        let remedy = match source.errno() {
            libc::ENOENT => "is there a KVM module, and was the device passed in?",
            libc::EACCES | libc::EPERM => "may this user open it? (group kvm)",
            _ => "see podvmm --check",
        };
        BuildError::Kvm(format!("open /dev/kvm: {remedy}"), source)
    })?;
    match kvm.get_api_version() {
        STABLE_API => Ok(kvm),
        other => Err(BuildError::Kvm(
            format!("KVM API version {other} instead of {STABLE_API}"),
            kvm_ioctls::Error::new(libc::ENOSYS),
        )),
    }
}
