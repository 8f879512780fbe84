//! A vCPU: a thread named `vcpu<N>` in a loop around KVM_RUN.
//!
//! ```text
//!          Run              Stop
//! Parked ───────▶ Running ───────▶ (thread ends)
//!    ▲   ◀───────    │
//!    │     Park      │ the guest is over
//!    └───────────────┘
//! ```
//!
//! A parked thread is not in KVM_RUN: the host decides who runs. Commands
//! arrive through a channel; a signal brings a running thread out of KVM_RUN to
//! look. The thread waits on nothing but its channel and KVM; what it finds
//! goes to `control`'s inbox.

mod exit;
mod kick;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use arch::state::{MsrIndices, VcpuState};
use devices::bus::Bus;
use devices::counter::Counter;
use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use kick::Kick;

use crate::host::thread::Kind;
use crate::inbox::Ending;

/// What the guest's accesses reach.
#[derive(Clone, Debug)]
pub(crate) struct Buses {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
}

/// Exits to user space by kind. KVM's own exits do not count here.
#[derive(Debug, Default, serde::Serialize)]
pub(crate) struct ExitCounters {
    /// Port reads.
    pub io_in: Counter,
    /// Port writes.
    pub io_out: Counter,
    /// MMIO reads.
    pub mmio_read: Counter,
    /// MMIO writes.
    pub mmio_write: Counter,
    /// Signals: commands from `control`.
    pub kicks: Counter,
}

/// What a vCPU thread is told.
enum Command {
    /// Enter the guest.
    Run,
    /// Leave the guest and answer.
    Park(Sender<()>),
    /// Say whether nothing will ever happen on this vCPU again by itself.
    IsHalted(Sender<bool>),
    /// Say what KVM holds of the vCPU.
    Save(
        Arc<MsrIndices>,
        Sender<Result<VcpuState, arch::state::StateError>>,
    ),
    /// End the thread.
    Stop,
}

/// The handle on a vCPU's thread. Dropping it stops and joins the thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: u8,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread, parked. `ended` gets at most one message. If there can be no thread, the vCPU is
    /// given back.
    pub(crate) fn spawn(
        index: u8,
        fd: VcpuFd,
        buses: Buses,
        memory: GuestMemoryMmap,
        exits: Arc<ExitCounters>,
        ended: Box<dyn Fn(Ending) + Send>,
    ) -> Result<Self, (io::Error, VcpuFd)> {
        if let Err(error) = kick::install_handler() {
            return Err((error, fd));
        }
        let (commands, inbox) = channel();
        // A thread that cannot be started drops its closure, so that does not hold the vCPU yet. Once it
        // has taken it, the thread has its name, by which Kata's shim looks for vCPUs.
        let (give, given) = sync_channel(0);
        let name = format!("vcpu{index}");
        let thread = Kind::Vcpu.spawn(Builder::new().name(name), move || {
            let Ok(fd) = given.recv() else { return };
            Thread {
                kick: Kick::for_this_thread(fd),
                buses,
                memory,
                exits,
                inbox,
                ended,
            }
            .main();
        });
        let thread = match thread {
            Ok(thread) => thread,
            Err(error) => return Err((error, fd)),
        };
        give.send(fd).expect("the thread waits for it");
        Ok(Self {
            index,
            commands,
            thread: Some(thread),
        })
    }

    pub(crate) fn run(&self) {
        self.send(Command::Run);
    }

    /// Returns when the thread has left the guest.
    pub(crate) fn park(&self) {
        let (reply, parked) = channel();
        self.send(Command::Park(reply));
        // An error means that the thread has ended, which is as good.
        let _ = parked.recv();
    }

    /// Whether the vCPU halted for good: HLT with interrupts off, or waiting for
    /// another vCPU to start it.
    pub(crate) fn is_halted(&self) -> bool {
        let (reply, halted) = channel();
        self.send(Command::IsHalted(reply));
        match halted.recv_timeout(Self::PROMPT) {
            Ok(halted) => halted,
            // It waits for something, such as a page of RAM.
            Err(RecvTimeoutError::Timeout) => false,
            // Its thread has ended.
            Err(RecvTimeoutError::Disconnected) => true,
        }
    }

    /// How long a vCPU that is not busy with itself takes to answer.
    const PROMPT: Duration = Duration::from_millis(200);

    /// What KVM holds of the vCPU, which is parked. None if its thread has ended.
    pub(crate) fn save(
        &self,
        indices: &Arc<MsrIndices>,
    ) -> Option<Result<VcpuState, arch::state::StateError>> {
        let (reply, state) = channel();
        self.send(Command::Save(Arc::clone(indices), reply));
        state.recv().ok()
    }

    fn send(&self, command: Command) {
        // The receiver is gone only when the thread has ended. Then there is
        // no thread to tell.
        let _ = self.commands.send(command);
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of vCPU {} panicked", self.index);
        }
    }
}

/// What the next step of the thread is.
enum Step {
    Continue,
    Park,
    Stop,
}

struct Thread {
    kick: Kick,
    buses: Buses,
    memory: GuestMemoryMmap,
    exits: Arc<ExitCounters>,
    inbox: Receiver<Command>,
    ended: Box<dyn Fn(Ending) + Send>,
}

impl Thread {
    fn main(mut self) {
        loop {
            // Parked: sleep until told something.
            match self.inbox.recv() {
                Ok(Command::Run) => {}
                Ok(Command::Park(reply)) => {
                    let _ = reply.send(());
                    continue;
                }
                Ok(Command::IsHalted(reply)) => {
                    let _ = reply.send(true);
                    continue;
                }
                Ok(Command::Save(indices, reply)) => {
                    // What the vCPU last left for was completed when the kick brought it out of
                    // KVM_RUN (kvm/api.rst 4.10).
                    let _ = reply.send(VcpuState::save(self.kick.vcpu(), &indices));
                    continue;
                }
                Ok(Command::Stop) | Err(_) => return,
            }
            match self.run() {
                Step::Stop => return,
                Step::Park | Step::Continue => {}
            }
        }
    }

    /// Runs the guest until told otherwise or until it is over.
    fn run(&mut self) -> Step {
        // A kick that came while this thread was being born left nothing but its
        // command.
        match self.obey() {
            Step::Continue => {}
            step => return step,
        }
        loop {
            match self.step() {
                Ok(Step::Continue) => {}
                Ok(step) => return step,
                Err(ending) => {
                    (self.ended)(ending);
                    return Step::Park;
                }
            }
        }
    }

    /// One KVM_RUN and what it asks for.
    fn step(&mut self) -> Result<Step, Ending> {
        use kvm_ioctls::VcpuExit;

        match self.kick.vcpu().run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                self.exits.io_in.increment();
                self.buses.ports.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.exits.io_out.increment();
                self.buses.ports.write(port.into(), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.exits.mmio_read.increment();
                self.buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.exits.mmio_write.increment();
                self.buses.mmio.write(address, data);
            }
            // EAGAIN: a start-up interrupt made this vCPU runnable.
            Ok(VcpuExit::Intr) => return Ok(self.kicked()),
            Err(error) if error.errno() == libc::EAGAIN => return Ok(self.kicked()),
            Err(error) if error.errno() == libc::EINTR => return Ok(self.kicked()),
            Ok(exit) => {
                let kind = exit::Kind::of(&exit);
                return Err(exit::ending(kind, self.kick.vcpu(), &self.memory));
            }
            Err(error) => {
                let kind = exit::Kind::RunFailed(error);
                return Err(exit::ending(kind, self.kick.vcpu(), &self.memory));
            }
        }
        Ok(Step::Continue)
    }

    fn kicked(&mut self) -> Step {
        self.exits.kicks.increment();
        self.obey()
    }

    /// Takes the commands that kicks announced.
    fn obey(&mut self) -> Step {
        // First clear, then look: a kick after the look finds the flag set again.
        self.kick.clear();
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Run => {}
                Command::Park(reply) => {
                    self.announce_pause();
                    let _ = reply.send(());
                    return Step::Park;
                }
                Command::IsHalted(reply) => {
                    let _ = reply.send(self.is_halted());
                }
                // Only a parked vCPU is asked; this one has its answer all the same.
                Command::Save(indices, reply) => {
                    let _ = reply.send(VcpuState::save(self.kick.vcpu(), &indices));
                }
                Command::Stop => return Step::Stop,
            }
        }
        Step::Continue
    }

    /// Has KVM's clock tell the guest, once it runs again, that the host had stopped this vCPU
    /// (KVM_KVMCLOCK_CTRL, kvm/api.rst 4.76). Linux's watchdog would report a soft lockup otherwise.
    fn announce_pause(&mut self) {
        // This fails if the guest does not use KVM's clock. There is no other way to tell it.
        let _ = self.kick.vcpu().kvmclock_ctrl();
    }

    fn is_halted(&mut self) -> bool {
        const RFLAGS_IF: u64 = 1 << 9;
        let vcpu = self.kick.vcpu();
        match (vcpu.get_mp_state(), vcpu.get_regs()) {
            (Ok(state), Ok(regs)) if state.mp_state == KVM_MP_STATE_HALTED => {
                regs.rflags & RFLAGS_IF == 0
            }
            (Ok(state), _) => state.mp_state != kvm_bindings::KVM_MP_STATE_RUNNABLE,
            (Err(_), _) => false,
        }
    }
}
