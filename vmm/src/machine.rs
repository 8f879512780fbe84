//! What exists while a guest lives. Dropping it ends the guest and gives
//! everything back to the host.

pub(crate) mod attach;
pub(crate) mod io_threads;
pub(crate) mod messages;
pub(crate) mod resize;
mod timeline;
pub(crate) mod vcpu;
pub(crate) mod vcpus;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use api::chain;
use arch::state::CpuFeatures;
use devices::legacy::{Serial, SerialState};
use devices::pci::BridgeState;
use devices::virtio::{Busy, Counters, ResizeError, Transport, TransportState, VirtioDevice};
use kvm_ioctls::VmFd;
use thiserror::Error;

use self::attach::{AttachError, Backplane, PlugEvent};
use self::resize::MemoryHandles;
pub(crate) use self::timeline::Timeline;
use self::vcpu::{ExitCounters, Vcpu};
use self::vcpus::{VcpuError, Vcpus};
use crate::console::socket::SocketConsole;
use crate::console::streams::PowerButton;
use crate::memory::Ram;
use crate::memory::remote_ram::{Patience, RemoteRam};

/// A virtio device that the guest has.
pub(crate) type Plugged = Arc<Mutex<dyn Transport>>;

/// A device could not be put back on its loop.
#[derive(Debug, Error)]
#[error("resume a device")]
pub(crate) struct ResumeError(#[source] io::Error);

/// A device is busy with what the host does not finish.
#[derive(Debug, Error)]
#[error("pause {device}")]
pub(crate) struct PauseError {
    /// Id of the device in vm.counters.
    device: String,
    source: Busy,
}

/// Which snapshot the RAM of a machine is of.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) folder: PathBuf,
    pub(crate) id: String,
}

/// A guest with its vCPUs, devices and RAM. Fields are dropped in this order:
/// first the vCPUs end, then the threads that serve devices, then KVM lets go of
/// RAM, then RAM goes.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vcpus: Vcpus,
    /// How many vCPUs may run, and do unless they are parked.
    pub(crate) running: u8,
    /// vCPUs beyond `running` that the guest has not given up yet.
    pub(crate) shrinking: Option<Shrinking>,
    pub(crate) backplane: Backplane,
    /// Devices that are to go, and until when their drivers are waited for.
    pub(crate) leaving: Vec<(String, Instant)>,
    pub(crate) memory: MemoryHandles,
    pub(crate) _sockets: Vec<SocketConsole>,
    /// Asks the agent to end its command.
    pub(crate) button: Option<PowerButton>,
    /// How long the phases of the machine's start took.
    pub(crate) timeline: Timeline,
    pub(crate) serial: Option<Arc<Mutex<Serial>>>,
    /// What KVM could do for the vCPUs when the guest started.
    pub(crate) features: CpuFeatures,
    /// Who gives RAM, page by page.
    pub(crate) remote: Option<RemoteRam>,
    /// Which snapshot RAM is of, if it is of one.
    pub(crate) source: Option<Source>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: Ram,
}

/// vCPUs that are too many and that the guest has not given up. To stop them would stop the guest: the
/// others wait for their answers to interrupts, with their locks held. So they run on, and slowly once
/// the guest has had its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shrinking {
    /// vCPUs that run, those that are too many included.
    from: u8,
    /// When the vCPUs that are too many become slow.
    deadline: Instant,
    /// Whether they run: while they are slow that is so for [`Machine::SLICE`] in each
    /// [`Machine::PERIOD`].
    run: bool,
    warned: bool,
}

impl Shrinking {
    fn new(from: u8, deadline: Instant) -> Self {
        Self {
            from,
            deadline,
            run: true,
            warned: false,
        }
    }
}

impl Machine {
    /// Lets the vCPUs into the guest.
    pub(crate) fn start(&mut self) {
        self.allowed().for_each(Vcpu::run);
        if let Some(shrinking) = &mut self.shrinking {
            shrinking.run = true;
        }
    }

    /// Takes the vCPUs out of the guest and the devices off their loops. Nothing
    /// moves until [`Machine::resume`]. If a device cannot be stopped, all of them go on.
    pub(crate) fn pause(&mut self) -> Result<(), PauseError> {
        self.vcpus.iter().for_each(Vcpu::park);
        let busy = self
            .backplane
            .transports
            .iter()
            .find_map(|(id, transport)| {
                let source = lock(transport).pause().err()?;
                let device = id.clone();
                Some(PauseError { device, source })
            });
        let Some(busy) = busy else { return Ok(()) };
        if let Err(error) = self.resume() {
            log::error!("{}", chain(&error).join(": "));
        }
        Err(busy)
    }

    /// Puts the devices back on their loops and lets the vCPUs go on.
    pub(crate) fn resume(&mut self) -> Result<(), ResumeError> {
        for (_, transport) in &self.backplane.transports {
            lock(transport).resume().map_err(ResumeError)?;
        }
        self.start();
        Ok(())
    }

    /// What a snapshot keeps of each device, which is paused.
    pub(crate) fn device_states(&self) -> Vec<(String, TransportState)> {
        let transports = self.backplane.transports.iter();
        let state = |(id, it): &(String, Plugged)| (id.clone(), lock(it).state());
        transports.map(state).collect()
    }

    /// What a snapshot keeps of the PCI bus, if there is one.
    pub(crate) fn bridge_state(&self) -> Option<BridgeState> {
        let bridge = self.backplane.bridge.as_ref()?.lock();
        Some(bridge.expect("no thread panics while it holds it").state())
    }

    /// What a snapshot keeps of the serial port.
    pub(crate) fn serial_state(&self) -> Option<SerialState> {
        let serial = self.serial.as_ref()?;
        let serial = serial.lock().expect("no thread panics while it holds it");
        Some(serial.state())
    }

    /// A guard to be held while the machine is told to do something.
    pub(crate) fn patience(&self) -> Option<Patience> {
        self.remote.as_ref().map(RemoteRam::patience)
    }

    /// Ends the guest's life but keeps what is needed to talk about it. What the
    /// guest has queued for its devices is done first: its last words count. Devices do that at the
    /// same time, so that those the host does not answer are waited for once.
    pub(crate) fn stop(&self) {
        self.vcpus.iter().for_each(Vcpu::park);
        thread::scope(|scope| {
            for (_, transport) in &self.backplane.transports {
                let drain = || lock(transport).drain();
                if Builder::new().spawn_scoped(scope, drain).is_err() {
                    drain();
                }
            }
        });
    }

    /// Whether the guest can never do anything again: every vCPU that runs has
    /// halted with interrupts off.
    pub(crate) fn is_halted(&self) -> bool {
        // One that is parked for now may go on.
        self.shrinking.is_none_or(|it| it.run) && self.allowed().all(Vcpu::is_halted)
    }

    /// Whether devices can come and go while the guest runs.
    pub(crate) fn takes_devices(&self) -> bool {
        self.backplane.bridge.is_some()
    }

    /// Has the guest get one more device. Returns its number on the PCI bus, where the guest finds it when it
    /// looks.
    pub(crate) fn plug(
        &mut self,
        id: String,
        device: Box<dyn VirtioDevice>,
    ) -> Result<u8, AttachError> {
        self.backplane.attach(id.clone(), device, None)?;
        self.backplane.tell(&id, PlugEvent::Came);
        let place = self.transport(&id).and_then(|it| lock(it).place());
        Ok(place.expect("it was just given one"))
    }

    /// Takes a device away, at once if no driver has it. Otherwise that waits for the driver: false.
    pub(crate) fn unplug(&mut self, id: &str) -> bool {
        if self.is_held(id) {
            if !self.leaving.iter().any(|(other, _)| other == id) {
                let deadline = Instant::now() + Self::LEAVE;
                self.leaving.push((id.into(), deadline));
            }
            self.backplane.tell(id, PlugEvent::Leave);
            return false;
        }
        self.backplane.detach(id);
        self.leaving.retain(|(other, _)| other != id);
        true
    }

    /// Devices that are to go once their drivers let go of them.
    pub(crate) fn leaving(&self) -> Vec<String> {
        self.leaving.iter().map(|(id, _)| id.clone()).collect()
    }

    /// Takes those devices away that are to go and that no driver has any more, and those off the list that were
    /// waited for long enough. Says which of them are gone.
    pub(crate) fn settle_devices(&mut self) -> Vec<(String, bool)> {
        let mut settled = Vec::new();
        for (id, deadline) in std::mem::take(&mut self.leaving) {
            if !self.is_held(&id) {
                self.backplane.detach(&id);
                settled.push((id, true));
            } else if Instant::now() >= deadline {
                settled.push((id, false));
            } else {
                self.leaving.push((id, deadline));
            }
        }
        settled
    }

    /// Makes a disk longer or shorter: `bytes`. None if there is no such device.
    pub(crate) fn resize_device(&self, id: &str, bytes: u64) -> Option<Result<(), ResizeError>> {
        let transport = self.transport(id)?;
        Some(lock(transport).resize(bytes))
    }

    fn is_held(&self, id: &str) -> bool {
        self.transport(id).is_some_and(|it| lock(it).is_held())
    }

    fn transport(&self, id: &str) -> Option<&Plugged> {
        let mut all = self.backplane.transports.iter();
        all.find_map(|(other, transport)| (other == id).then_some(transport))
    }

    /// Exits to user space so far.
    pub(crate) fn exits(&self) -> &ExitCounters {
        self.vcpus.exits()
    }

    /// The vCPUs that may run.
    fn allowed(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter().take(self.vcpus_running().into())
    }

    /// The vCPUs that may run but are too many.
    fn extra(&self) -> impl Iterator<Item = &Vcpu> {
        self.allowed().skip(self.running.into())
    }

    /// Each device's id and what it has done.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (&str, Arc<Counters>)> {
        self.backplane
            .transports
            .iter()
            .map(|(id, transport)| (id.as_str(), lock(transport).counters()))
    }

    /// vCPUs that the host lets run.
    pub(crate) fn vcpus_running(&self) -> u8 {
        self.shrinking.as_ref().map_or(self.running, |it| it.from)
    }

    /// Lets `count` vCPUs run, from 1 to all that are possible; where the machine is `paused`, once it is
    /// resumed. More run at once, as far as the guest starts them. Those that are too many are parked
    /// when the guest has taken them offline, and are slow after [`Self::PATIENCE`]: the guest is asked
    /// first, by others. If one cannot be made, as many run as before.
    pub(crate) fn resize_vcpus(&mut self, count: u8, paused: bool) -> Result<(), VcpuError> {
        self.vcpus.grow(&self.vm, count)?;
        let (before, old) = (self.vcpus_running(), self.running);
        self.running = count;
        if !paused {
            self.vcpus
                .iter()
                .take(count.into())
                .skip(old.into())
                .for_each(Vcpu::run);
        }
        self.shrinking = (count < before).then(|| match self.shrinking {
            Some(earlier) if count >= old => earlier,
            Some(earlier) => Shrinking {
                deadline: Instant::now() + Self::PATIENCE,
                ..earlier
            },
            None => Shrinking::new(before, Instant::now() + Self::PATIENCE),
        });
        self.settle_vcpus();
        Ok(())
    }

    /// Has those of the first `started` vCPUs that are too many treated as after a resize: their guest
    /// was restored with them.
    pub(crate) fn shrink_from(&mut self, started: u8) {
        if started > self.running {
            self.shrinking = Some(Shrinking::new(started, Instant::now() + Self::PATIENCE));
        }
    }

    /// Parks vCPUs that are too many as soon as they may be, and has them be slow when they are late.
    /// Returns when to do so again.
    pub(crate) fn settle_vcpus(&mut self) -> Option<Duration> {
        let shrinking = self.shrinking?;
        // A vCPU that is parked counts as halted.
        if shrinking.run && self.extra().all(Vcpu::is_halted) {
            self.park_extra();
            self.shrinking = None;
            return None;
        }
        let left = shrinking.deadline.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        if !shrinking.warned {
            log::warn!("the guest keeps vCPUs that it should give up; they run slowly");
        }
        if shrinking.run {
            self.park_extra();
        } else {
            self.extra().for_each(Vcpu::run);
        }
        self.shrinking = Some(Shrinking {
            run: !shrinking.run,
            warned: true,
            ..shrinking
        });
        Some(if shrinking.run {
            Self::PERIOD - Self::SLICE
        } else {
            Self::SLICE
        })
    }

    fn park_extra(&self) {
        let _patience = self.patience();
        self.extra().for_each(Vcpu::park);
    }

    /// How long a driver may keep a device that is to go.
    const LEAVE: Duration = Duration::from_secs(30);
    /// How long a guest may use vCPUs that it should have given up as it likes.
    pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
    /// How much of how much time the guest may use them after that. Short enough for the guest not
    /// to take one that stands still for locked up.
    const SLICE: Duration = Duration::from_millis(5);
    const PERIOD: Duration = Duration::from_millis(100);
}

fn lock(transport: &Mutex<dyn Transport>) -> MutexGuard<'_, dyn Transport + 'static> {
    transport
        .lock()
        .expect("no thread panics while it holds a device")
}
