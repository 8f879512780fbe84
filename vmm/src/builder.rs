//! From a configuration to a machine: a straight line, in the order in which
//! the parts need one another. What fails drops what was made so far.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::{DiskConfig, Output, RateLimit, RateLimits, VmConfig, VsockConfig};
use arch::boot::{self, BootError, BootInfo};
use arch::irqchip::IrqchipError;
use arch::layout::SERIAL_GSI;
use arch::mptable::MptableError;
use arch::{irqchip, mptable, ram, vcpu as arch_vcpu};
use devices::bus::{Bus, BusError};
use devices::legacy::i8042::{I8042_BASE, I8042_LEN};
use devices::legacy::serial::{COM1_BASE, SERIAL_LEN};
use devices::legacy::{I8042, Serial};
use devices::virtio::balloon::{self, Balloon};
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::console::Console;
use devices::virtio::mem::{self, Mem};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{self, Vsock};
use devices::virtio::{Limits, Memory, Rate, VirtioDevice};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;

use crate::attach::{AttachError, Attacher, irqfd};
use crate::command::Command;
use crate::control::{Event, Inbox};
use crate::ending::Ending;
use crate::events::Timeline;
use crate::host::KvmKind;
use crate::image::{LoadError, load_initramfs, load_kernel};
use crate::io::IoThreads;
use crate::keyboard;
use crate::machine::Machine;
use crate::memory::{Ram, RamError};
use crate::resize::MemoryHandles;
use crate::share;
use crate::socket_console::SocketConsole;
use crate::streams::{self, HostEnd, PowerButton, StreamError};
use crate::tap;
use crate::transcript::Transcript;
use crate::vcpu::{Buses, Vcpu};

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

/// Builds a machine whose vCPUs are parked at the kernel's entry point.
pub fn build(config: &VmConfig, around: &Surroundings) -> Result<Machine, BuildError> {
    let mut timeline = Timeline::start();
    let kvm = open_kvm()?;
    let count = config.cpus.max().get();
    let max = kvm.get_max_vcpus();
    if usize::from(count) > max {
        return Err(BuildError::TooManyCpus { wanted: count, max });
    }
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
    timeline.mark("vm");

    let image = load_kernel(&ram, &config.kernel.path)?;
    let initramfs = match &config.kernel.initramfs {
        None => None,
        Some(path) => {
            let appended = around
                .command
                .as_ref()
                .map(Command::archive)
                .unwrap_or_default();
            Some(load_initramfs(&ram, path, &appended, image.end)?)
        }
    };
    mptable::write(ram.memory(), count)?;
    timeline.mark("kernel");

    let mut sockets = Vec::new();
    let ports = port_devices(config, around, &vm, &mut sockets)?;
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

    let cmdline = cmdline(config, &parameters);
    log::debug!("kernel command line: {cmdline}");
    let ranges = ram::ranges(config.memory.size.bytes());
    boot::write(
        ram.memory(),
        &image,
        BootInfo {
            ram: &ranges,
            cmdline: &cmdline,
            initramfs,
        },
    )?;

    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| BuildError::Kvm("read the CPUID that KVM supports".into(), source))?;
    let buses = Buses {
        ports: Arc::new(ports),
        mmio: Arc::new(mmio),
    };
    let exits = Arc::default();
    let mut vcpus = Vec::with_capacity(count.into());
    for index in 0..count {
        let fd = vm
            .create_vcpu(index.into())
            .map_err(|source| BuildError::CreateVcpu { index, source })?;
        arch_vcpu::configure(&fd, index, count, &supported, image.entry)
            .map_err(|source| BuildError::ConfigureVcpu { index, source })?;
        let inbox = around.inbox.clone();
        let ended = Box::new(move |ending| {
            // Nobody listens any more when the machine is being taken down.
            let _ = inbox.send(Event::Ended(ending));
        });
        let vcpu = Vcpu::spawn(
            index,
            fd,
            buses.clone(),
            ram.memory().clone(),
            Arc::clone(&exits),
            ended,
        )
        .map_err(|source| BuildError::Thread(format!("vCPU {index}"), source))?;
        vcpus.push(vcpu);
    }
    timeline.mark("vcpus");
    Ok(Machine {
        timeline,
        button,
        vcpus,
        running: config.cpus.boot().get().into(),
        shrinking: None,
        transports,
        memory,
        exits,
        _io: io,
        _sockets: sockets,
        _vm: vm,
        _ram: ram,
    })
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

/// The serial port and the reset line. A socket of the former is added to `sockets`.
fn port_devices(
    config: &VmConfig,
    around: &Surroundings,
    vm: &VmFd,
    sockets: &mut Vec<SocketConsole>,
) -> Result<Bus, BuildError> {
    let mut bus = Bus::new();
    let inbox = around.inbox.clone();
    let reset = Box::new(move || {
        let _ = inbox.send(Event::Ended(Ending::Reset));
    });
    bus.insert(
        I8042_BASE,
        I8042_LEN,
        Arc::new(Mutex::new(I8042::new(reset))),
    )?;
    let Some(mut end) = HostEnd::open(&config.serial)? else {
        return Ok(bus);
    };
    let typed = end.input.take();
    sockets.extend(end.socket.take());
    let device = || "the serial port".to_string();
    let line = irqfd(vm, SERIAL_GSI).map_err(|source| BuildError::Attach {
        device: device(),
        source,
    })?;
    let output = end.into_serial(&around.transcript);
    let serial = Serial::new(line, output).map_err(|source| BuildError::Device {
        device: device(),
        source: source.into(),
    })?;
    let serial = Arc::new(Mutex::new(serial));
    bus.insert(COM1_BASE, SERIAL_LEN, serial.clone())?;
    if let Some(typed) = typed {
        let inbox = around.inbox.clone();
        let end = move || {
            let _ = inbox.send(Event::Signal(libc::SIGINT));
        };
        let escapes = around.terminal && config.serial == Output::Tty;
        keyboard::attach(File::from(typed), &serial, escapes, end)
            .map_err(|source| BuildError::Thread("the keyboard".into(), source))?;
    }
    Ok(bus)
}

/// The devices in the order the guest finds them. A console's socket is added to `sockets`. Returns
/// the agent's power button, if there is one.
fn attach_devices(
    config: &VmConfig,
    around: &Surroundings,
    attacher: &mut Attacher,
    sockets: &mut Vec<SocketConsole>,
) -> Result<Option<PowerButton>, BuildError> {
    for (index, disk) in config.disks.iter().enumerate() {
        let device = format!("disk {}", disk.path.display());
        let blk = Blk::open(blk_config(index, disk)).map_err(|source| BuildError::Device {
            device: device.clone(),
            source: source.into(),
        })?;
        attach(attacher, &format!("disk{index}"), &device, Box::new(blk))?;
    }
    for (index, net) in config.nets.iter().enumerate() {
        let device = format!("network device {index}");
        let made = tap::device(net).map_err(|source| BuildError::Device {
            device: device.clone(),
            source: source.into(),
        })?;
        attach(attacher, &format!("net{index}"), &device, Box::new(made))?;
    }
    for (index, share) in config.shares.iter().enumerate() {
        let device = format!("share '{}'", share.tag);
        let made = share::device(share, index, config.shares.len());
        let made = made.map_err(|source| BuildError::Device {
            device: device.clone(),
            source: source.into(),
        })?;
        attach(attacher, &format!("fs{index}"), &device, made)?;
    }
    if let Some(VsockConfig { cid, socket }) = &config.vsock {
        let device = "vsock";
        let vsock = Vsock::new(vsock::VsockConfig {
            cid: *cid,
            socket: socket.clone(),
        });
        let vsock = vsock.map_err(|source| BuildError::Device {
            device: device.into(),
            source: source.into(),
        })?;
        attach(attacher, "vsock", device, Box::new(vsock))?;
    }
    attach(attacher, "rng", "the entropy device", Box::new(Rng::new()))?;
    let mut ports = Vec::new();
    if let Some(mut end) = HostEnd::open(&config.console)? {
        sockets.extend(end.socket.take());
        ports.push(end.into_port(&around.transcript)?);
    }
    let mut button = None;
    if around.command.is_some() {
        let (of_command, its_button) = streams::command(around.inbox.clone())?;
        ports.extend(of_command);
        button = Some(its_button);
    }
    if !ports.is_empty() {
        let device = "the console device";
        let console = Console::new(ports).map_err(|source| BuildError::Device {
            device: device.into(),
            source: source.into(),
        })?;
        attach(attacher, "console", device, Box::new(console))?;
    }
    Ok(button)
}

/// Memory that can be plugged, and the balloon.
fn attach_memory(config: &VmConfig, attacher: &mut Attacher) -> Result<MemoryHandles, BuildError> {
    let mut handles = MemoryHandles::default();
    let memory = &config.memory;
    if memory.hotplug_size.0 > 0 {
        let device = "the memory device";
        let failed = |source: mem::MemError| BuildError::Device {
            device: device.into(),
            source: source.into(),
        };
        let start = ram::hotplug_start(memory.size.bytes());
        let mem =
            Mem::new(attacher.memory.clone(), start, memory.hotplug_size.0).map_err(failed)?;
        let handle = handles.mem.insert(mem.handle());
        handle.request(memory.hotplugged_size.0).map_err(failed)?;
        attach(attacher, "mem", device, Box::new(mem))?;
    }
    if let Some(balloon) = config.balloon {
        let device = "the balloon";
        if memory.hugepages {
            return Err(BuildError::Device {
                device: device.into(),
                source: "it gives back pages of 4K, and those of hugepages=on are of 2M".into(),
            });
        }
        let made = Balloon::new(balloon::BalloonConfig {
            size: balloon.size.0,
            deflate_on_oom: balloon.deflate_on_oom,
            free_page_reporting: balloon.free_page_reporting,
        });
        let made = made.map_err(|source| BuildError::Device {
            device: device.into(),
            source: source.into(),
        })?;
        handles.balloon = Some(made.handle());
        attach(attacher, "balloon", device, Box::new(made))?;
    }
    Ok(handles)
}

fn attach(
    attacher: &mut Attacher,
    id: &str,
    device: &str,
    made: Box<dyn VirtioDevice>,
) -> Result<(), BuildError> {
    attacher
        .attach(id.into(), made)
        .map_err(|source| BuildError::Attach {
            device: device.into(),
            source,
        })
}

fn blk_config(index: usize, disk: &DiskConfig) -> BlkConfig {
    let name = format!("blk{index}");
    BlkConfig {
        path: disk.path.clone(),
        readonly: disk.readonly,
        direct: disk.direct,
        queues: disk.queues,
        queue_size: disk.queue_size,
        serial: disk.id.clone().unwrap_or_else(|| name.clone()),
        rates: rates(&disk.rates),
        name,
    }
}

/// What a device is held to.
pub(crate) fn rates(config: &RateLimits) -> Limits {
    let rate = |limit: RateLimit| Rate {
        size: limit.size,
        one_time_burst: limit.one_time_burst,
        refill_time: Duration::from_millis(limit.refill_time_ms),
    };
    Limits {
        bandwidth: config.bandwidth.map(rate),
        operations: config.operations.map(rate),
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
