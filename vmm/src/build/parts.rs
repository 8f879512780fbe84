//! The devices of a configuration, from what it says to what the guest finds.

use std::error::Error;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::{DiskConfig, FsConfig, NetConfig, Output, RateLimit, RateLimits, VmConfig, VsockConfig};
use arch::layout::SERIAL_GSI;
use arch::ram;
use devices::bus::Bus;
use devices::legacy::i8042::{I8042_BASE, I8042_LEN};
use devices::legacy::serial::{COM1_BASE, SERIAL_LEN};
use devices::legacy::{I8042, Serial};
use devices::virtio::balloon::{self, Balloon};
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::console::Console;
use devices::virtio::mem::{self, Mem};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{self, Vsock};
use devices::virtio::{Limits, Rate, VirtioDevice};
use kvm_ioctls::VmFd;

use super::{BuildError, Surroundings};
use crate::build::{share, tap};
use crate::console::keyboard;
use crate::console::socket::SocketConsole;
use crate::console::streams::{self, HostEnd, PowerButton};
use crate::inbox::{Ending, Event};
use crate::machine::Machine;
use crate::machine::attach::{Backplane, irqfd};
use crate::machine::resize::MemoryHandles;
use crate::snapshot::Loaded;

/// What is reached by ports.
pub(super) struct Ports {
    pub(super) bus: Bus,
    pub(super) serial: Option<Arc<Mutex<Serial>>>,
}

/// The serial port and the reset line. A socket of the former is added to `sockets`.
pub(super) fn port_devices(
    config: &VmConfig,
    around: &Surroundings,
    vm: &VmFd,
    loaded: Option<&Loaded>,
    sockets: &mut Vec<SocketConsole>,
) -> Result<Ports, BuildError> {
    let bus = Bus::new();
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
        return Ok(Ports { bus, serial: None });
    };
    let typed = end.input.take();
    sockets.extend(end.socket.take());
    let device = || "the serial port".to_string();
    let line = irqfd(vm, SERIAL_GSI).map_err(|source| BuildError::Attach {
        device: device(),
        source,
    })?;
    let output = end.into_serial(&around.transcript);
    let made = match loaded {
        None => Serial::new(line, output),
        Some(loaded) => Serial::restored(loaded.serial()?, line, output),
    };
    let serial = made.map_err(|source| BuildError::Device {
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
    Ok(Ports {
        bus,
        serial: Some(serial),
    })
}

/// The devices in the order the guest finds them. A console's socket is added to `sockets`. Returns
/// the agent's power button, if there is one.
pub(super) fn attach_devices(
    config: &VmConfig,
    around: &Surroundings,
    slots: &mut Slots<'_>,
    sockets: &mut Vec<SocketConsole>,
) -> Result<Option<PowerButton>, BuildError> {
    for disk in &config.disks {
        slots.attach(name(&disk.id), a_disk(disk)?)?;
    }
    for net in &config.net {
        slots.attach(name(&net.id), a_network(net)?)?;
    }
    for share in &config.fs {
        slots.attach(name(&share.id), a_share(share, config.fs.len())?)?;
    }
    if let Some(vsock) = &config.vsock {
        slots.attach(name(&vsock.id), a_vsock(vsock)?)?;
    }
    let rng = Made::new("the entropy device", Rng::new());
    slots.attach("rng", rng)?;
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
        let made = Made::of("the console device".into(), Console::new(ports))?;
        slots.attach("console", made)?;
    }
    Ok(button)
}

/// Memory that can be plugged, and the balloon.
pub(super) fn attach_memory(
    config: &VmConfig,
    slots: &mut Slots<'_>,
) -> Result<MemoryHandles, BuildError> {
    let mut handles = MemoryHandles::default();
    let memory = &config.memory;
    if memory.hotplug_size.0 > 0 {
        let device = "the memory device";
        let failed = |source: mem::MemError| BuildError::Device {
            device: device.into(),
            source: source.into(),
        };
        let start = ram::hotplug_start(memory.size.bytes());
        let ram = slots.backplane.memory.clone();
        let mem = Mem::new(ram, start, memory.hotplug_size.0).map_err(failed)?;
        let handle = handles.mem.insert(mem.handle());
        handle.request(memory.hotplugged_size.0).map_err(failed)?;
        slots.attach("mem", Made::new(device, mem))?;
    }
    if let Some(balloon) = &config.balloon {
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
        let balloon = made.map_err(|source| BuildError::Device {
            device: device.into(),
            source: source.into(),
        })?;
        handles.balloon = Some(balloon.handle());
        slots.attach("balloon", Made::new(device, balloon))?;
    }
    Ok(handles)
}

/// Has a guest that runs get the device `id` of `config`, on its PCI bus. Returns where it finds it.
pub(crate) fn plug(config: &VmConfig, id: &str, machine: &mut Machine) -> Result<u8, BuildError> {
    let is_it = |other: &Option<String>| other.as_deref() == Some(id);
    let made = if let Some(disk) = config.disks.iter().find(|disk| is_it(&disk.id)) {
        a_disk(disk)?
    } else if let Some(net) = config.net.iter().find(|net| is_it(&net.id)) {
        a_network(net)?
    } else if let Some(share) = config.fs.iter().find(|share| is_it(&share.id)) {
        a_share(share, config.fs.len())?
    } else {
        let vsock = config.vsock.as_ref().filter(|vsock| is_it(&vsock.id));
        a_vsock(vsock.expect("the device was just added to it"))?
    };
    let Made { called, device } = made;
    let attached = machine.plug(id.into(), device);
    attached.map_err(|source| BuildError::Attach {
        device: called,
        source,
    })
}

/// A device, and what errors call it.
struct Made {
    called: String,
    device: Box<dyn VirtioDevice>,
}

impl Made {
    fn new(called: &str, device: impl VirtioDevice + 'static) -> Self {
        Self {
            called: called.into(),
            device: Box::new(device),
        }
    }

    fn of<D: VirtioDevice + 'static, E: Error + Send + Sync + 'static>(
        called: String,
        made: Result<D, E>,
    ) -> Result<Self, BuildError> {
        match made {
            Ok(device) => Ok(Self::new(&called, device)),
            Err(source) => Err(BuildError::Device {
                device: called,
                source: source.into(),
            }),
        }
    }
}

/// Where devices are attached, and the snapshot that says where they were, if they are of one.
pub(super) struct Slots<'a> {
    pub(super) backplane: Backplane,
    pub(super) loaded: Option<&'a Loaded>,
}

impl Slots<'_> {
    fn attach(&mut self, id: &str, made: Made) -> Result<(), BuildError> {
        let place = self.loaded.and_then(|loaded| loaded.place(id));
        let Made { called, device } = made;
        self.backplane
            .attach(id.into(), device, place)
            .map_err(|source| BuildError::Attach {
                device: called,
                source,
            })
    }
}

fn name(id: &Option<String>) -> &str {
    id.as_deref()
        .expect("each device was named when the VM was defined")
}

fn a_disk(disk: &DiskConfig) -> Result<Made, BuildError> {
    let called = format!("disk {}", disk.path.display());
    Made::of(called, Blk::open(blk_config(disk)))
}

fn a_network(net: &NetConfig) -> Result<Made, BuildError> {
    let called = format!("network device {}", name(&net.id));
    Made::of(called, tap::device(net))
}

/// One of `count` shares.
fn a_share(share: &FsConfig, count: usize) -> Result<Made, BuildError> {
    let called = format!("share '{}'", share.tag);
    match share::device(share, start(name(&share.id), THREAD), count) {
        Ok(device) => Ok(Made { called, device }),
        Err(source) => Err(BuildError::Device {
            device: called,
            source: source.into(),
        }),
    }
}

fn a_vsock(config: &VsockConfig) -> Result<Made, BuildError> {
    let vsock = Vsock::new(vsock::VsockConfig {
        cid: config.cid,
        socket: config.socket.clone(),
    });
    Made::of("vsock".into(), vsock)
}

fn blk_config(disk: &DiskConfig) -> BlkConfig {
    let id = name(&disk.id);
    BlkConfig {
        path: disk.path.clone(),
        readonly: disk.readonly,
        direct: disk.direct,
        queues: disk.num_queues,
        queue_size: disk.queue_size,
        serial: disk.serial.clone().unwrap_or_else(|| start(id, SERIAL)),
        rates: rates(&disk.rate_limiter_config),
        name: start(id, THREAD),
    }
}

/// Bytes that a disk's serial number can have, and the name of a device in those of its threads.
const SERIAL: usize = 20;
const THREAD: usize = 11;

/// The first `len` bytes of a device's name, which is ASCII. Devices whose names begin alike share threads.
fn start(id: &str, len: usize) -> String {
    id.chars().take(len).collect()
}

/// What a device is held to.
pub(crate) fn rates(config: &RateLimits) -> Limits {
    let rate = |limit: RateLimit| Rate {
        size: limit.size,
        one_time_burst: limit.one_time_burst,
        refill_time: Duration::from_millis(limit.refill_time),
    };
    Limits {
        bandwidth: config.bandwidth.map(rate),
        operations: config.ops.map(rate),
    }
}
