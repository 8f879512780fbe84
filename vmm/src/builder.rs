//! From a configuration to a machine: a straight line, in the order in which
//! the parts need one another. What fails drops what was made so far.

mod parts;

use std::io;
use std::sync::{Arc, Mutex};

use api::VmConfig;
use arch::boot::{self, BootError, BootInfo, Entry, KernelImage};
use arch::irqchip::IrqchipError;
use arch::mptable::MptableError;
use arch::state::{CpuFeatures, VcpuState};
use arch::{cpuid, irqchip, mptable, pmu, ram, vcpu as arch_vcpu};
use devices::bus::{Bus, BusError};
use devices::virtio::{Memory, MmioTransport};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use thiserror::Error;
use vm_memory::GuestAddress;

pub(crate) use self::parts::rates;
use self::parts::{Ports, attach_devices, attach_memory, port_devices};
use crate::attach::{AttachError, Attacher};
use crate::command::Command;
use crate::control::Inbox;
use crate::events::Timeline;
use crate::host::KvmKind;
use crate::image::{LoadError, load_initramfs, load_kernel};
use crate::io::IoThreads;
use crate::machine::Machine;
use crate::memory::{Ram, RamError};
use crate::remote_ram::{RemoteRam, RemoteRamError};
use crate::snapshot::{Loaded, Pages, RestoreError};
use crate::streams::StreamError;
use crate::transcript::Transcript;
use crate::vcpu::Buses;
use crate::vcpus::{Common, Vcpus};

/// Why a machine could not be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// `/dev/kvm` is missing, closed to us or too old.
    #[error("{0}")]
    Kvm(String, #[source] kvm_ioctls::Error),
    /// More vCPUs than KVM allows.
    #[error("{wanted} vCPUs: this host's KVM allows at most {max}")]
    TooManyCpus {
        /// Asked for.
        wanted: u8,
        /// Possible.
        max: usize,
    },
    /// RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Interrupt controllers and timer.
    #[error(transparent)]
    Irqchip(#[from] IrqchipError),
    /// Kernel or initramfs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Boot parameters.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// MP table.
    #[error(transparent)]
    Mptable(#[from] MptableError),
    /// Port devices on one another.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device's host side.
    #[error("{device}")]
    Device {
        /// Which one.
        device: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device's guest side.
    #[error("attach {device}")]
    Attach {
        /// Which one.
        device: String,
        /// Why.
        source: AttachError,
    },
    /// A console or stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// CPUID has no room for the VM's topology.
    #[error("more CPUID leaves than KVM takes")]
    ManyLeaves,
    /// vCPU creation.
    #[error("create vCPU {index}")]
    CreateVcpu {
        /// Which one.
        index: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// vCPU registers.
    #[error("set up vCPU {index}")]
    ConfigureVcpu {
        /// Which one.
        index: u8,
        /// Why.
        source: arch_vcpu::VcpuError,
    },
    /// A thread.
    #[error("start the thread of {0}")]
    Thread(String, #[source] io::Error),
    /// The snapshot does not fit.
    #[error(transparent)]
    Snapshot(#[from] RestoreError),
    /// The snapshot's RAM.
    #[error("map the snapshot's RAM")]
    SnapshotRam(#[source] io::Error),
    /// The process that is to give its RAM.
    #[error(transparent)]
    RemoteRam(#[from] RemoteRamError),
    /// A device's state in the snapshot.
    #[error("the state of {device} in the snapshot")]
    DeviceState {
        /// Which one.
        device: String,
        /// Why.
        source: devices::virtio::StateError,
    },
    /// A vCPU's state in the snapshot.
    #[error("the state of vCPU {index} in the snapshot")]
    VcpuState {
        /// Which one.
        index: u8,
        /// Why.
        source: arch_vcpu::VcpuError,
    },
    /// The interrupt controllers', timer's or clock's.
    #[error("the state of the board in the snapshot")]
    BoardState(#[source] arch::state::StateError),
}

/// Where a guest comes from.
#[derive(Debug)]
pub enum Origin {
    /// It boots the configuration's kernel.
    Kernel,
    /// It goes on where another one was.
    Snapshot(Box<Loaded>),
}

/// What a VM is given besides its configuration.
#[derive(Debug)]
pub struct Surroundings {
    /// What the agent is to run, if anything.
    pub command: Option<Command>,
    /// Where the machine reports.
    pub inbox: Inbox,
    /// Keeps the end of what consoles print.
    pub transcript: Transcript,
    /// Whether the terminal is in raw mode, so that escapes end the VM.
    pub terminal: bool,
}

/// Builds a machine whose vCPUs are parked, at the kernel's entry point or where a snapshot was
/// taken. Its devices rest, too, where they were at work.
pub fn build(
    config: &VmConfig,
    around: &Surroundings,
    mut origin: Origin,
) -> Result<Machine, BuildError> {
    let mut timeline = Timeline::start();
    let kvm = open_kvm()?;
    let count = config.cpus.max().get();
    let max = kvm.get_max_vcpus();
    if usize::from(count) > max {
        return Err(BuildError::TooManyCpus { wanted: count, max });
    }
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| BuildError::Kvm("read the CPUID that KVM supports".into(), source))?;
    let cpuid = match &origin {
        Origin::Kernel => cpuid::for_guest(&supported, count).ok_or(BuildError::ManyLeaves)?,
        Origin::Snapshot(loaded) => loaded.cpuid(&kvm, &supported)?,
    };
    let features = CpuFeatures::of(&cpuid);
    timeline.mark("kvm");
    let mut ram = Ram::new(&config.memory)?;
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

    let kernel = match &origin {
        Origin::Kernel => Some(load(config, around, &mut ram)?),
        Origin::Snapshot(_) => None,
    };
    timeline.mark("kernel");

    let mut sockets = Vec::new();
    let Ports { bus, serial } = port_devices(config, around, &vm, &origin, &mut sockets)?;
    let io = Arc::new(IoThreads::default());
    let mut attacher = Attacher {
        vm: &vm,
        memory: Memory::new(ram.memory().clone()),
        runner: io.clone(),
        mmio: Bus::new(),
        transports: Vec::new(),
        parameters: Vec::new(),
    };
    let button = attach_devices(config, around, &mut attacher, &mut sockets)?;
    let memory = attach_memory(config, &mut attacher)?;
    let Attacher {
        mmio,
        transports,
        parameters,
        ..
    } = attacher;
    timeline.mark("devices");

    let remote = match &mut origin {
        Origin::Kernel => None,
        Origin::Snapshot(loaded) => restore(config, loaded, around, &transports, &mut ram)?,
    };
    // KVM may look into RAM when it is given a vCPU's state.
    let patience = remote.as_ref().map(RemoteRam::patience);
    let entry = match &kernel {
        Some(kernel) => Some(kernel.prepare(config, &parameters, &ram)?),
        None => None,
    };
    timeline.mark("memory");

    let buses = Buses {
        ports: Arc::new(bus),
        mmio: Arc::new(mmio),
    };
    let common = Common {
        possible: count,
        cpuid,
        buses,
        memory: ram.memory().clone(),
        exits: Arc::default(),
        inbox: around.inbox.clone(),
    };
    let running = config.cpus.boot().get();
    let vcpus = match &origin {
        Origin::Kernel => {
            let entry = entry.expect("a guest that boots has a kernel");
            Vcpus::boot(common, &vm, running, entry)?
        }
        Origin::Snapshot(loaded) => {
            let vcpus = Vcpus::restore(common, &vm, running, loaded.vcpus(count)?)?;
            let board = loaded.board();
            board.restore(&vm).map_err(BuildError::BoardState)?;
            vcpus
        }
    };
    drop(patience);
    timeline.mark("vcpus");
    let source = match &origin {
        Origin::Kernel => None,
        Origin::Snapshot(loaded) => Some(loaded.source().clone()),
    };
    let started = match &origin {
        Origin::Kernel => 0,
        Origin::Snapshot(loaded) => VcpuState::last_started(loaded.vcpus(count)?),
    };
    let mut machine = Machine {
        timeline,
        button,
        vcpus,
        running,
        shrinking: None,
        transports,
        memory,
        _io: io,
        _sockets: sockets,
        serial,
        features,
        remote,
        source,
        vm,
        ram,
    };
    machine.shrink_from(started);
    Ok(machine)
}

/// A kernel in RAM, and what it is to find.
struct Kernel {
    image: KernelImage,
    initramfs: Option<(GuestAddress, u64)>,
}

fn load(config: &VmConfig, around: &Surroundings, ram: &mut Ram) -> Result<Kernel, BuildError> {
    let image = load_kernel(ram, &config.kernel.path)?;
    let initramfs = match &config.kernel.initramfs {
        None => None,
        Some(path) => {
            let appended = around
                .command
                .as_ref()
                .map(Command::archive)
                .unwrap_or_default();
            Some(load_initramfs(ram, path, &appended, image.end)?)
        }
    };
    mptable::write(ram.memory(), config.cpus.max().get())?;
    Ok(Kernel { image, initramfs })
}

impl Kernel {
    /// Tells it what there is, and says where it is entered.
    fn prepare(
        &self,
        config: &VmConfig,
        parameters: &[String],
        ram: &Ram,
    ) -> Result<Entry, BuildError> {
        let cmdline = cmdline(config, parameters);
        log::debug!("kernel command line: {cmdline}");
        let ranges = ram::ranges(config.memory.size.bytes());
        let info = BootInfo {
            ram: &ranges,
            cmdline: &cmdline,
            initramfs: self.initramfs,
        };
        boot::write(ram.memory(), &self.image, info)?;
        Ok(self.image.entry)
    }
}

/// Devices first: they decide which RAM there is. Returns who else gives RAM, if somebody does.
fn restore(
    config: &VmConfig,
    loaded: &mut Loaded,
    around: &Surroundings,
    transports: &[(String, Arc<Mutex<MmioTransport>>)],
    ram: &mut Ram,
) -> Result<Option<RemoteRam>, BuildError> {
    let allowed = loaded.memory(&config.memory)?;
    let states = loaded.take_devices(transports.iter().map(|(id, _)| id.as_str()))?;
    for ((id, transport), state) in transports.iter().zip(states) {
        let mut transport = transport.lock().expect("nobody else has it yet");
        transport
            .restore(state)
            .map_err(|source| BuildError::DeviceState {
                device: id.clone(),
                source,
            })?;
    }
    match loaded.pages() {
        Pages::Files { layers, prefetch } => {
            ram.lay(layers, &allowed, false)
                .map_err(BuildError::SnapshotRam)?;
            if *prefetch {
                ram.prefetch(loaded.working_set().as_deref());
            }
            Ok(None)
        }
        Pages::Socket { .. } if !ram.is_private() => Err(RemoteRamError::NotPrivate.into()),
        Pages::Socket { path, covered } => {
            let inbox = around.inbox.clone();
            let remote = RemoteRam::hand_over(path, inbox, |userfault| {
                ram.expect(covered, &allowed, userfault)
            })?;
            Ok(Some(remote))
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

/// The kernel's command line: ours first, so that the user has the last word.
fn cmdline(config: &VmConfig, devices: &[String]) -> String {
    let mut words: Vec<String> = KvmKind::of_this_host()
        .kernel_parameters()
        .map(String::from)
        .collect();
    let (boot, max) = (config.cpus.boot(), config.cpus.max());
    if boot < max {
        words.push(format!("maxcpus={boot}"));
    }
    if config.memory.hotplug_size.0 > 0 {
        // Plugged memory is used at once, for what can be moved and so taken away again.
        words.push("memhp_default_state=online_movable".into());
    }
    words.extend_from_slice(devices);
    if !config.kernel.cmdline.is_empty() {
        words.push(config.kernel.cmdline.clone());
    }
    words.join(" ")
}
