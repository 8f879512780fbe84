//! What exists while a guest lives. Dropping it ends the guest and gives
//! everything back to the host.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arch::state::CpuFeatures;
use devices::legacy::{Serial, SerialState};
use devices::virtio::{Counters, MmioTransport, TransportState};
use kvm_ioctls::VmFd;
use thiserror::Error;

use crate::builder::BuildError;
use crate::events::Timeline;
use crate::io::IoThreads;
use crate::memory::Ram;
use crate::remote_ram::{Patience, RemoteRam};
use crate::resize::MemoryHandles;
use crate::snapshot::Source;
use crate::socket_console::SocketConsole;
use crate::streams::PowerButton;
use crate::vcpu::{ExitCounters, Vcpu};
use crate::vcpus::Vcpus;

/// A device could not be put back on its loop.
#[derive(Debug, Error)]
#[error("resume a device")]
pub struct ResumeError(#[source] io::Error);

/// A guest with its vCPUs, devices and RAM. Fields are dropped in this order:
/// first nobody runs, then nobody serves, then KVM lets go of RAM, then RAM goes.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    /// How many of them may run, and do unless they are parked.
    pub(crate) running: u8,
    /// vCPUs beyond `running` that the guest has not given up yet.
    pub(crate) shrinking: Option<Shrinking>,
    pub(crate) transports: Vec<(String, Arc<Mutex<MmioTransport>>)>,
    pub(crate) memory: MemoryHandles,
    pub(crate) _io: Arc<IoThreads>,
    pub(crate) _sockets: Vec<SocketConsole>,
    /// Asks the agent to end its command.
    pub(crate) button: Option<PowerButton>,
    /// How it came to be.
    pub(crate) timeline: Timeline,
    pub(crate) serial: Option<Arc<Mutex<Serial>>>,
    /// What KVM could do for the vCPUs when the guest started.
    pub(crate) features: CpuFeatures,
    /// Who gives RAM, page by page.
    pub(crate) remote: Option<RemoteRam>,
    /// Which snapshot RAM is of, if it is of one.
    pub(crate) source: Option<Source>,
    pub(crate) vm: VmFd,
    pub(crate) ram: Ram,
}

/// vCPUs that are too many and run all the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shrinking {
    /// How many run with them.
    from: u8,
    /// When they are stopped at the latest.
    deadline: Instant,
}

impl Machine {
    /// Lets the vCPUs into the guest.
    pub fn start(&self) {
        self.active().for_each(Vcpu::run);
    }

    /// Takes the vCPUs out of the guest and the devices off their loops. Nothing
    /// moves until [`Machine::resume`].
    pub fn pause(&self) {
        self.vcpus.iter().for_each(Vcpu::park);
        self.each_transport(|mut transport| transport.pause());
    }

    /// Puts the devices back on their loops and lets the vCPUs go on.
    pub fn resume(&self) -> Result<(), ResumeError> {
        for (_, transport) in &self.transports {
            lock(transport).resume().map_err(ResumeError)?;
        }
        self.start();
        Ok(())
    }

    /// What a snapshot keeps of each device, which is paused.
    pub(crate) fn device_states(&self) -> Vec<(String, TransportState)> {
        let transports = self.transports.iter();
        let state = |(id, it): &(String, Arc<Mutex<MmioTransport>>)| (id.clone(), lock(it).state());
        transports.map(state).collect()
    }

    /// What it keeps of the serial port.
    pub(crate) fn serial_state(&self) -> Option<SerialState> {
        let serial = self.serial.as_ref()?;
        let serial = serial.lock().expect("no thread panics while it holds it");
        Some(serial.state())
    }

    /// To be held while the machine is told to do something.
    pub(crate) fn patience(&self) -> Option<Patience> {
        self.remote.as_ref().map(RemoteRam::patience)
    }

    /// Ends the guest's life but keeps what is needed to talk about it. What the
    /// guest has queued for its devices is done first: its last words count.
    pub fn stop(&self) {
        self.vcpus.iter().for_each(Vcpu::park);
        self.each_transport(|mut transport| transport.drain());
    }

    /// Whether the guest can never do anything again: every vCPU that runs has
    /// halted with interrupts off.
    pub fn is_halted(&self) -> bool {
        self.active().all(Vcpu::is_halted)
    }

    /// Exits to user space so far.
    pub fn exits(&self) -> &ExitCounters {
        self.vcpus.exits()
    }

    /// The vCPUs that may run.
    fn active(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter().take(self.running.into())
    }

    /// Each device's id and what it has done.
    pub fn devices(&self) -> impl Iterator<Item = (&str, Arc<Counters>)> {
        self.transports
            .iter()
            .map(|(id, transport)| (id.as_str(), lock(transport).counters()))
    }

    /// vCPUs that the host lets run.
    pub fn vcpus_running(&self) -> u8 {
        self.shrinking.as_ref().map_or(self.running, |it| it.from)
    }

    /// Lets `count` vCPUs run, from 1 to all that are possible; where the machine is `paused`, once it is
    /// resumed. More run at once, as far as the guest starts them. Those that are too many are parked
    /// when the guest has taken them offline, at the latest after [`Self::PATIENCE`]: the guest is asked
    /// first, by others, and the host has the last word. If one cannot be made, as many run as before.
    pub fn resize_vcpus(&mut self, count: u8, paused: bool) -> Result<(), BuildError> {
        self.vcpus.grow(&self.vm, count)?;
        let (before, old) = (self.vcpus_running(), self.running);
        self.running = count;
        if !paused {
            self.active().skip(old.into()).for_each(Vcpu::run);
        }
        let deadline = match self.shrinking {
            Some(earlier) if count >= old => earlier.deadline,
            _ => Instant::now() + Self::PATIENCE,
        };
        self.shrinking = (count < before).then_some(Shrinking {
            from: before,
            deadline,
        });
        self.settle_vcpus();
        Ok(())
    }

    /// Parks vCPUs that are too many as soon as they may be.
    pub(crate) fn settle_vcpus(&mut self) {
        let Some(Shrinking { from, deadline }) = self.shrinking else {
            return;
        };
        let extra = || {
            self.vcpus
                .iter()
                .take(from.into())
                .skip(self.running.into())
        };
        let late = Instant::now() >= deadline;
        if late || extra().all(Vcpu::is_halted) {
            if late {
                log::warn!("the guest kept vCPUs that it should give up; they are stopped");
            }
            let _patience = self.patience();
            extra().for_each(Vcpu::park);
            self.shrinking = None;
        }
    }

    /// How long a guest may use vCPUs that it should have given up.
    pub const PATIENCE: Duration = Duration::from_secs(3);

    fn each_transport(&self, mut act: impl FnMut(MutexGuard<'_, MmioTransport>)) {
        self.transports
            .iter()
            .for_each(|(_, transport)| act(lock(transport)));
    }
}

fn lock(transport: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    transport
        .lock()
        .expect("no thread panics while it holds a device")
}
