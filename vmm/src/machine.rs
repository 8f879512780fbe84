//! What exists while a guest lives. Dropping it ends the guest and gives
//! everything back to the host.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use devices::virtio::MmioTransport;
use kvm_ioctls::VmFd;
use thiserror::Error;

use crate::io::IoThreads;
use crate::memory::Ram;
use crate::vcpu::{ExitCounters, Vcpu};

/// A device could not be put back on its loop.
#[derive(Debug, Error)]
#[error("resume a device")]
pub struct ResumeError(#[source] io::Error);

/// A guest with its vCPUs, devices and RAM. Fields are dropped in this order:
/// first nobody runs, then nobody serves, then KVM lets go of RAM, then RAM goes.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    /// How many of them run; the others are parked for good.
    pub(crate) running: usize,
    pub(crate) transports: Vec<Arc<Mutex<MmioTransport>>>,
    pub(crate) _io: Arc<IoThreads>,
    pub(crate) exits: Arc<ExitCounters>,
    pub(crate) _vm: VmFd,
    pub(crate) _ram: Ram,
}

impl Machine {
    /// Lets the vCPUs into the guest.
    pub fn start(&self) {
        self.vcpus.iter().take(self.running).for_each(Vcpu::run);
    }

    /// Takes the vCPUs out of the guest and the devices off their loops. Nothing
    /// moves until [`Machine::resume`].
    pub fn pause(&self) {
        self.vcpus.iter().for_each(Vcpu::park);
        self.each_transport(|mut transport| transport.pause());
    }

    /// Puts the devices back on their loops and lets the vCPUs go on.
    pub fn resume(&self) -> Result<(), ResumeError> {
        for transport in &self.transports {
            lock(transport).resume().map_err(ResumeError)?;
        }
        self.start();
        Ok(())
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
        self.vcpus.iter().take(self.running).all(Vcpu::is_halted)
    }

    /// Exits to user space so far.
    pub fn exits(&self) -> &ExitCounters {
        &self.exits
    }

    /// How often to look whether the guest has halted: nobody says so, as KVM
    /// keeps a halted vCPU to itself.
    pub const HALT_CHECK: Duration = Duration::from_secs(1);

    fn each_transport(&self, mut act: impl FnMut(MutexGuard<'_, MmioTransport>)) {
        self.transports
            .iter()
            .for_each(|transport| act(lock(transport)));
    }
}

fn lock(transport: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    transport
        .lock()
        .expect("no thread panics while it holds a device")
}
