//! The devices of a configuration, from what it says to what the guest finds.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::{DiskConfig, Output, RateLimit, RateLimits, VmConfig, VsockConfig};
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
use crate::machine::attach::{Attacher, irqfd};
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
    for (index, net) in config.net.iter().enumerate() {
        let device = format!("network device {index}");
        let made = tap::device(net).map_err(|source| BuildError::Device {
            device: device.clone(),
            source: source.into(),
        })?;
        attach(attacher, &format!("net{index}"), &device, Box::new(made))?;
    }
    for (index, share) in config.fs.iter().enumerate() {
        let device = format!("share '{}'", share.tag);
        let made = share::device(share, index, config.fs.len());
        let made = made.map_err(|source| BuildError::Device {
            device: device.clone(),
            source: source.into(),
        })?;
        attach(attacher, &format!("fs{index}"), &device, made)?;
    }
    if let Some(VsockConfig { cid, socket, .. }) = &config.vsock {
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
pub(super) fn attach_memory(
    config: &VmConfig,
    attacher: &mut Attacher,
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
        let mem =
            Mem::new(attacher.memory.clone(), start, memory.hotplug_size.0).map_err(failed)?;
        let handle = handles.mem.insert(mem.handle());
        handle.request(memory.hotplugged_size.0).map_err(failed)?;
        attach(attacher, "mem", device, Box::new(mem))?;
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
        queues: disk.num_queues,
        queue_size: disk.queue_size,
        serial: disk.serial.clone().unwrap_or_else(|| name.clone()),
        rates: rates(&disk.rate_limiter_config),
        name,
    }
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
