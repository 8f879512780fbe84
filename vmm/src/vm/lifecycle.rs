//! The life of a VM: what it is at each time, and what it can become.
//!
//! ```text
//!          create          boot             pause
//!   None ─────────▶ Created ────▶ Running ─────────▶ Paused
//!     ▲                │            │  ▲               │
//!     │                │   shutdown │  └──── resume ───┤
//!     │                │            ▼                  │ shutdown
//!     └──── delete ────┴──────── Shutdown ◀────────────┘
//! ```
//!
//! A snapshot is taken of a paused VM. A restored one is paused too, unless its request says `resume`: then it
//! runs when that is answered.
//!
//! Owned by `control`, which carries out one request at a time. None of them
//! waits for the guest, and writing a snapshot, which may take minutes, is left to a thread: meanwhile the VM
//! is told of as it was, and stays so.

mod blame;
mod devices;

use std::sync::mpsc::channel;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use api::{
    Answer, ApiError, Ping, Request, Resize, Restore, Snapshot, State, VmConfig, VmInfo, chain,
};
use serde_json::{Value, json};

use self::blame::{contradiction, not_recorded, not_saved, refusal};
use crate::build::{self, Surroundings};
use crate::console::command::Command;
use crate::console::transcript::Transcript;
use crate::host::thread::Kind;
use crate::inbox::{Event, Inbox, Reply};
use crate::machine::Machine;
use crate::snapshot::{self, Loaded, SaveError};
use crate::vm::events::Events;
use crate::vm::metrics;

/// What outlives a machine.
#[derive(Debug)]
pub(crate) struct Surround {
    /// Where machines report.
    pub inbox: Inbox,
    /// What the agent is to run, if anything.
    pub command: Option<Command>,
    /// Keeps the end of what consoles print.
    pub transcript: Transcript,
    /// Whether the terminal is in raw mode, so that escapes end the VM.
    pub terminal: bool,
    /// Who is told what happens.
    pub events: Events,
}

/// A VM and where it is in its life.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    around: Surround,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    None,
    Created(Box<VmConfig>),
    Running(Box<VmConfig>, Box<Machine>),
    Paused(Box<VmConfig>, Box<Machine>),
    /// Paused, and a thread has the machine while it writes a snapshot of it.
    Saving(Box<Saving>),
    Shutdown(Box<VmConfig>),
}

/// A snapshot that is being written.
#[derive(Debug)]
struct Saving {
    config: Box<VmConfig>,
    writer: JoinHandle<(Box<Machine>, Result<(), SaveError>)>,
    /// The client who waits for the snapshot.
    reply: Reply,
    folder: Value,
    /// What is said of the machine meanwhile: it is paused.
    info: VmInfo,
    counters: Value,
    metrics: String,
}

impl Phase {
    fn state(&self) -> State {
        match self {
            Self::None => State::None,
            Self::Created(_) => State::Created,
            Self::Running(..) => State::Running,
            Self::Paused(..) | Self::Saving(_) => State::Paused,
            Self::Shutdown(_) => State::Shutdown,
        }
    }

    fn config(&self) -> Option<&VmConfig> {
        match self {
            Self::None => None,
            Self::Created(config)
            | Self::Running(config, _)
            | Self::Paused(config, _)
            | Self::Shutdown(config) => Some(config),
            Self::Saving(saving) => Some(&saving.config),
        }
    }

    fn machine(&self) -> Option<&Machine> {
        match self {
            Self::Running(_, machine) | Self::Paused(_, machine) => Some(machine),
            Self::None | Self::Created(_) | Self::Saving(_) | Self::Shutdown(_) => None,
        }
    }

    /// The snapshot of it that is being written.
    fn saving(&self) -> Option<&Saving> {
        match self {
            Self::Saving(saving) => Some(saving),
            _ => None,
        }
    }
}

impl Lifecycle {
    /// A lifecycle that has no VM yet.
    pub(crate) fn new(around: Surround) -> Self {
        Self {
            around,
            phase: Phase::None,
        }
    }

    /// Which life of the VM it is.
    pub(crate) fn life(&self) -> u32 {
        self.around.inbox.life()
    }

    /// Who is told what happens.
    pub(crate) fn events(&mut self) -> &mut Events {
        &mut self.around.events
    }

    /// What the VM is defined as, if there is one.
    pub(crate) fn config(&self) -> Option<&VmConfig> {
        self.phase.config()
    }

    /// Carries out a request that is answered at once.
    pub(crate) fn answer(&mut self, request: Request) -> Result<Answer, ApiError> {
        match request {
            Request::Ping => Ok(Answer::Ping(ping())),
            Request::Exit | Request::Snapshot(_) => unreachable!("control sees to them itself"),
            Request::Create(config) => self.create(config).map(done),
            Request::Add(device) => self.add(device),
            Request::Boot => self.boot().map(done),
            Request::Info => self.info().map(|info| Answer::Info(Box::new(info))),
            Request::Counters => self.counters().map(Answer::Counters),
            Request::Pause => self.pause().map(done),
            Request::Resume => self.resume().map(done),
            Request::Resize(sizes) => self.resize(sizes).map(done),
            Request::RecordWorkingSet => self.record_working_set().map(done),
            Request::Restore(restore) => self.restore(*restore).map(done),
            Request::PowerButton => self.press_power_button().map(done),
            Request::Remove(id) => self.remove(&id).map(done),
            Request::ResizeDisk(size) => self.resize_disk(&size).map(done),
            Request::Shutdown => self.shutdown().map(done),
            Request::Reboot => {
                self.shutdown()?;
                self.boot().map(done)
            }
            Request::Delete => self.delete().map(done),
            Request::Metrics => Ok(Answer::Metrics(self.metrics())),
        }
    }

    /// Defines the VM.
    fn create(&mut self, mut config: Box<VmConfig>) -> Result<(), ApiError> {
        if !matches!(self.phase, Phase::None) {
            return Err(self.wrong("vm.create", "not created"));
        }
        config.name_devices();
        config.check().map_err(contradiction)?;
        self.phase = Phase::Created(config);
        self.around.events.vm("created", Value::Null);
        Ok(())
    }

    /// Has the VM run, where there is none yet.
    pub(crate) fn start(&mut self, config: Box<VmConfig>) -> Result<(), ApiError> {
        self.create(config)?;
        self.boot()
    }

    /// Asks the guest to end. Whether and when it does is its own affair.
    fn press_power_button(&mut self) -> Result<(), ApiError> {
        let Phase::Running(_, machine) = &mut self.phase else {
            return Err(self.wrong("vm.power-button", "Running"));
        };
        let Some(button) = &mut machine.button else {
            let why = "podvmm's agent runs no command in this guest, and no other agent hears \
                       this: ask the agent it has, or use vm.shutdown";
            return Err(ApiError::Impossible(vec![why.into()]));
        };
        button.press();
        self.around.events.vm("power-button", Value::Null);
        Ok(())
    }

    /// Builds the machine and lets it run. A VM that cannot be built stays what
    /// it was.
    fn boot(&mut self) -> Result<(), ApiError> {
        let (Phase::Created(config) | Phase::Shutdown(config)) = &self.phase else {
            return Err(self.wrong("vm.boot", "Created or Shutdown"));
        };
        let config = config.clone();
        self.around.events.vm("booting", Value::Null);
        let around = self.surroundings();
        let mut machine = build::boot(&config, &around).map_err(refusal)?;
        log::info!("built; entering the guest");
        machine.start();
        let phases = machine.timeline.json();
        let events = &mut self.around.events;
        events.vm("booted", json!({ "phases_us": phases }));
        self.phase = Phase::Running(config, Box::new(machine));
        Ok(())
    }

    /// What the machine of the next life is given.
    fn surroundings(&mut self) -> Surroundings {
        Surroundings {
            command: self.around.command.clone(),
            inbox: self.around.inbox.next_life(),
            transcript: self.around.transcript.clone(),
            terminal: self.around.terminal,
        }
    }

    /// Has a thread take the snapshot, and the client answered when it is done.
    pub(crate) fn snapshot(&mut self, snapshot: Snapshot, reply: Reply) {
        if !matches!(self.phase, Phase::Paused(..)) {
            return reply.send(Err(self.wrong("vm.snapshot", "Paused")));
        }
        let (metrics, info, counters) = (self.metrics(), self.info(), self.counters());
        let Phase::Paused(config, machine) = std::mem::replace(&mut self.phase, Phase::None) else {
            unreachable!("it was just seen");
        };
        let folder = json!({ "folder": snapshot.folder });
        let inbox = self.around.inbox.clone();
        let written = config.clone();
        // The thread gets the machine once there is a thread.
        let (give, take) = channel::<Box<Machine>>();
        let builder = Builder::new().name("snapshot".into());
        let writer = Kind::Snapshot.spawn(builder, move || {
            let mut machine = take.recv().expect("it is given below");
            let Snapshot {
                folder,
                incremental,
            } = &snapshot;
            let saved = snapshot::save(&mut machine, &written, folder, *incremental);
            // Without `control` podvmm is ending, and waits for this thread.
            let _ = inbox.send(Event::Saved);
            (machine, saved)
        });
        let writer = match writer {
            Ok(writer) => writer,
            Err(error) => {
                self.phase = Phase::Paused(config, machine);
                let why = format!("start a thread: {error}");
                return reply.send(Err(ApiError::Host(vec![why])));
            }
        };
        self.around.events.vm("snapshotting", folder.clone());
        give.send(machine).expect("the thread waits for it");
        self.phase = Phase::Saving(Box::new(Saving {
            config,
            writer,
            reply,
            folder,
            info: info.expect("there is a VM"),
            counters: counters.expect("there is a machine"),
            metrics,
        }));
    }

    /// Waits until a snapshot is written, if one is being written, and answers who asked for it.
    pub(crate) fn saved(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::None) {
            Phase::Saving(saving) => {
                let (machine, saved) = saving.writer.join().expect("a panic ends the process");
                self.phase = Phase::Paused(saving.config, machine);
                if saved.is_ok() {
                    self.around.events.vm("snapshotted", saving.folder);
                }
                saving.reply.send(saved.map(done).map_err(not_saved));
            }
            other => self.phase = other,
        }
    }

    /// Notes beside the snapshot which of its RAM the VM has touched.
    fn record_working_set(&mut self) -> Result<(), ApiError> {
        let Some(machine) = self.phase.machine() else {
            return Err(self.wrong("vm.record-working-set", "Running or Paused"));
        };
        let bytes = snapshot::record(machine).map_err(not_recorded)?;
        let properties = json!({ "bytes": bytes });
        self.around.events.vm("working-set-recorded", properties);
        Ok(())
    }

    /// Makes a VM of a snapshot. If that fails there is none, as before.
    fn restore(&mut self, restore: Restore) -> Result<(), ApiError> {
        if !matches!(self.phase, Phase::None) {
            return Err(self.wrong("vm.restore", "not created"));
        }
        let resume = restore.resume;
        let opened = Loaded::open(restore);
        let (loaded, config) = opened.map_err(|error| ApiError::Impossible(chain(&error)))?;
        self.revive(Box::new(config), loaded, resume)
    }

    /// Makes the VM of a snapshot that was opened, where there is none yet.
    pub(crate) fn revive(
        &mut self,
        mut config: Box<VmConfig>,
        loaded: Loaded,
        resume: bool,
    ) -> Result<(), ApiError> {
        config.name_devices();
        config.check().map_err(contradiction)?;
        self.around.events.vm("restoring", Value::Null);
        let around = self.surroundings();
        let machine = build::restore(&config, &around, loaded).map_err(refusal)?;
        let phases = machine.timeline.json();
        self.phase = Phase::Paused(config, Box::new(machine));
        let events = &mut self.around.events;
        events.vm("restored", json!({ "phases_us": phases }));
        if resume { self.resume() } else { Ok(()) }
    }

    fn pause(&mut self) -> Result<(), ApiError> {
        match std::mem::replace(&mut self.phase, Phase::None) {
            Phase::Running(config, mut machine) => {
                let _patience = machine.patience();
                let paused = machine.pause();
                self.phase = if paused.is_ok() {
                    self.around.events.vm("paused", Value::Null);
                    Phase::Paused(config, machine)
                } else {
                    Phase::Running(config, machine)
                };
                paused.map_err(|error| ApiError::Host(chain(&error)))
            }
            other => {
                self.phase = other;
                Err(self.wrong("vm.pause", "Running"))
            }
        }
    }

    fn resume(&mut self) -> Result<(), ApiError> {
        match std::mem::replace(&mut self.phase, Phase::None) {
            Phase::Paused(config, mut machine) => {
                let _patience = machine.patience();
                let resumed = machine.resume();
                self.phase = if resumed.is_ok() {
                    self.around.events.vm("resumed", Value::Null);
                    Phase::Running(config, machine)
                } else {
                    Phase::Paused(config, machine)
                };
                resumed.map_err(|error| ApiError::Host(chain(&error)))
            }
            other => {
                self.phase = other;
                Err(self.wrong("vm.resume", "Paused"))
            }
        }
    }

    /// Ends the guest at once; what it has queued for its devices is done first.
    fn shutdown(&mut self) -> Result<(), ApiError> {
        match std::mem::replace(&mut self.phase, Phase::None) {
            Phase::Running(config, machine) | Phase::Paused(config, machine) => {
                let leaving = machine.leaving();
                end(machine);
                // Whatever the machine still had to say is of an earlier life.
                self.around.inbox.next_life();
                self.phase = Phase::Shutdown(config);
                leaving.iter().for_each(|id| self.left(id, true));
                self.around.events.vm("shutdown", Value::Null);
                Ok(())
            }
            other => {
                self.phase = other;
                Err(self.wrong("vm.shutdown", "Running or Paused"))
            }
        }
    }

    fn delete(&mut self) -> Result<(), ApiError> {
        if let Phase::None | Phase::Saving(_) = self.phase {
            return Err(self.wrong("vm.delete", "created"));
        }
        self.stop();
        self.phase = Phase::None;
        self.around.events.vm("deleted", Value::Null);
        Ok(())
    }

    /// Ends the guest if there is one, once a snapshot of it is written.
    pub(crate) fn stop(&mut self) {
        self.saved();
        if self.phase.machine().is_some() {
            // It is running or paused, so it can be shut down.
            let _ = self.shutdown();
        }
    }

    /// Leaves the guest as it is, for the end of the process: threads that wait for RAM which does not
    /// come cannot be ended otherwise.
    pub(crate) fn abandon(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::None) {
            Phase::Running(config, machine) | Phase::Paused(config, machine) => {
                std::mem::forget(machine);
                self.phase = Phase::Shutdown(config);
            }
            other => self.phase = other,
        }
    }

    /// Looks at what nothing reports: whether the guest has halted for good.
    pub(crate) fn has_halted(&self) -> bool {
        match &self.phase {
            Phase::Running(_, machine) => machine.is_halted(),
            _ => false,
        }
    }

    /// Sees to vCPUs and devices that the guest should give up. Returns when to do so again, if that is before
    /// long.
    pub(crate) fn settle(&mut self) -> Option<Duration> {
        let soon = self.settle_devices();
        let Phase::Running(_, machine) = &mut self.phase else {
            return None;
        };
        machine.settle_vcpus().into_iter().chain(soon).min()
    }

    fn resize(&mut self, sizes: Resize) -> Result<(), ApiError> {
        let paused = matches!(self.phase, Phase::Paused(..));
        let (Phase::Running(config, machine) | Phase::Paused(config, machine)) = &mut self.phase
        else {
            return Err(self.wrong("vm.resize", "Running or Paused"));
        };
        let memory = config.memory.clone();
        if let Some(why) = machine.memory.refusal(&memory, sizes) {
            return Err(ApiError::Impossible(vec![why]));
        }
        if let Some(wanted) = sizes.desired_vcpus {
            let max = config.cpus.max();
            if wanted > max {
                return Err(ApiError::Impossible(vec![format!(
                    "desired_vcpus: {wanted}: this VM can have 1 to {max}"
                )]));
            }
            machine
                .resize_vcpus(wanted.get(), paused)
                .map_err(|error| refusal(error.into()))?;
            // At once: memory may fail, and what the vCPUs are by then is so all the same.
            let vcpus = Resize {
                desired_vcpus: Some(wanted),
                ..Resize::default()
            };
            config.resize(vcpus).map_err(contradiction)?;
        }
        machine
            .memory
            .request(&memory, sizes)
            .map_err(|why| ApiError::Host(vec![why]))?;
        config.resize(sizes).map_err(contradiction)?;
        self.around.events.vm("resized", json!(sizes));
        Ok(())
    }

    fn info(&self) -> Result<VmInfo, ApiError> {
        if let Some(saving) = self.phase.saving() {
            return Ok(saving.info.clone());
        }
        let config = self
            .phase
            .config()
            .ok_or_else(|| self.wrong("vm.info", "created"))?;
        let size = config.memory.size.bytes();
        Ok(VmInfo {
            config: config.clone(),
            state: self.phase.state(),
            memory_actual_size: match self.phase.machine() {
                Some(machine) => machine.memory.actual(size),
                None => size,
            },
            vcpus_actual: self.phase.machine().map_or(0, Machine::vcpus_running),
            leaving: match self.phase.machine() {
                Some(machine) => machine.leaving(),
                None => Vec::new(),
            },
        })
    }

    fn counters(&self) -> Result<Value, ApiError> {
        if let Some(saving) = self.phase.saving() {
            return Ok(saving.counters.clone());
        }
        let machine = self
            .phase
            .machine()
            .ok_or_else(|| self.wrong("vm.counters", "Running or Paused"))?;
        Ok(metrics::counters(machine))
    }

    fn metrics(&self) -> String {
        match self.phase.saving() {
            Some(saving) => saving.metrics.clone(),
            None => metrics::text(self.phase.state(), self.phase.machine()),
        }
    }

    fn wrong(&self, request: &'static str, needed: &'static str) -> ApiError {
        if self.phase.saving().is_some() {
            return ApiError::Busy { request };
        }
        ApiError::State {
            request,
            state: self.phase.state(),
            needed,
        }
    }
}

fn done((): ()) -> Answer {
    Answer::Done
}

fn ping() -> Ping {
    Ping {
        version: env!("CARGO_PKG_VERSION").into(),
        build_version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        features: Vec::new(),
    }
}

fn end(machine: Box<Machine>) {
    let _patience = machine.patience();
    machine.stop();
    let exits = machine.exits();
    log::info!(
        "exits: {} port reads, {} port writes, {} MMIO reads, {} MMIO writes, {} kicks",
        exits.io_in.get(),
        exits.io_out.get(),
        exits.mmio_read.get(),
        exits.mmio_write.get(),
        exits.kicks.get(),
    );
    drop(machine);
}
