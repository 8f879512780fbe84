//! A VM from its creation to its end: the library's own interface, and what stands behind it.

pub(crate) mod control;
pub(crate) mod events;
pub(crate) mod lifecycle;
mod metrics;
pub(crate) mod service;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use api::{Answer, ApiError, Request, Resize, Restore, Snapshot, VmConfig, VmInfo};
use serde_json::{Value, json};
use thiserror::Error;

use self::events::Events;
use self::lifecycle::{Lifecycle, Surround};
use self::service::{Service, ServiceError};
use crate::console::command::Command;
use crate::console::transcript::Transcript;
use crate::inbox::{Ending, Event, Inbox, Reply};
use crate::snapshot::{Loaded, RestoreError};

/// Why there is no VM.
#[derive(Debug, Error)]
pub enum StartError {
    /// The API cannot be served.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// There is no such snapshot, or it is damaged.
    #[error("snapshot {}", .folder.display())]
    Restore {
        /// Where it should be.
        folder: PathBuf,
        /// What is wrong with it.
        source: RestoreError,
    },
    /// The machine cannot be built as it is described, or not on this host.
    #[error("{0}")]
    Build(ApiError),
}

/// Starts a VM: what it is given besides its configuration.
///
/// ```no_run
/// use vmm::VmBuilder;
/// use vmm::api::{PayloadConfig, VmConfig};
///
/// let config = VmConfig {
///     payload: PayloadConfig { kernel: "vmlinux".into(), ..PayloadConfig::default() },
///     ..VmConfig::default()
/// };
/// let mut vm = VmBuilder::new().boot(config)?;
/// println!("{}", vm.run());
/// # Ok::<(), vmm::StartError>(())
/// ```
#[derive(Debug)]
pub struct VmBuilder {
    inbox: Inbox,
    queue: Receiver<(u32, Event)>,
    api_socket: Option<PathBuf>,
    events: Events,
    command: Option<Command>,
    terminal: bool,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl VmBuilder {
    /// A VM without an API, whose events are only logged.
    pub fn new() -> Self {
        let (inbox, queue) = Inbox::new();
        Self {
            inbox,
            queue,
            api_socket: None,
            events: Events::new(None),
            command: None,
            terminal: false,
        }
    }

    /// Serves the HTTP API on the unix socket `path`, which is made, as long as the VM is there.
    #[must_use]
    pub fn api_socket(self, path: &Path) -> Self {
        Self {
            api_socket: Some(path.into()),
            ..self
        }
    }

    /// Writes what happens to the VM to `output`, a line of JSON for each event. A pipe that is full
    /// loses events rather than hold up the VM.
    #[must_use]
    pub fn events(self, output: File) -> Self {
        Self {
            events: Events::new(Some(output)),
            ..self
        }
    }

    /// A handle for other threads, to ask the VM and to end it.
    pub fn handle(&self) -> Handle {
        Handle {
            inbox: self.inbox.clone(),
        }
    }

    /// Has podvmm's agent, which the guest must boot, run a command with this process's streams.
    /// `terminal` says that they are a terminal in raw mode, whose escapes end the VM.
    pub(crate) fn streams(self, command: Option<Command>, terminal: bool) -> Self {
        Self {
            command,
            terminal,
            ..self
        }
    }

    /// Tells the event monitor that podvmm has started.
    pub(crate) fn started(mut self) -> Self {
        self.events.vmm("started");
        self
    }

    /// Builds the VM and lets its vCPUs run.
    ///
    /// # Errors
    ///
    /// With nothing left behind, if the API's socket cannot be made or the machine not be built.
    pub fn boot(self, config: VmConfig) -> Result<Vm, StartError> {
        let mut vm = self.serve()?;
        let booted = vm.life.start(Box::new(config));
        booted.map_err(StartError::Build)?;
        Ok(vm)
    }

    /// Makes the VM of a snapshot, and lets it go on if `restore.resume` says so.
    ///
    /// # Errors
    ///
    /// With nothing left behind, if the snapshot is damaged or of another host, or as for
    /// [`VmBuilder::boot`].
    pub fn restore(self, restore: Restore) -> Result<Vm, StartError> {
        let (folder, resume) = (restore.folder.clone(), restore.resume);
        let opened = Loaded::open(restore);
        let (loaded, config) = opened.map_err(|source| StartError::Restore { folder, source })?;
        self.revive(config, loaded, resume)
    }

    /// Makes the VM of a snapshot that was opened.
    pub(crate) fn revive(
        self,
        config: VmConfig,
        loaded: Loaded,
        resume: bool,
    ) -> Result<Vm, StartError> {
        let mut vm = self.serve()?;
        let revived = vm.life.revive(Box::new(config), loaded, resume);
        revived.map_err(StartError::Build)?;
        Ok(vm)
    }

    /// Leaves it to clients of the API to say what the VM is.
    ///
    /// # Errors
    ///
    /// If the API's socket cannot be made.
    pub fn serve(self) -> Result<Vm, StartError> {
        let service = match &self.api_socket {
            None => None,
            Some(socket) => Some(Service::start(socket, self.inbox.clone())?),
        };
        let transcript = Transcript::default();
        let handle = self.handle();
        let had_command = self.command.is_some();
        let life = Lifecycle::new(Surround {
            inbox: self.inbox,
            command: self.command,
            transcript: transcript.clone(),
            terminal: self.terminal,
            events: self.events,
        });
        Ok(Vm {
            course: Course::Open {
                queue: self.queue,
                service,
            },
            life,
            handle,
            transcript,
            had_command,
        })
    }
}

/// A VM, which [`Vm::run`] sees to its end. Dropping it ends the guest.
#[derive(Debug)]
pub struct Vm {
    course: Course,
    life: Lifecycle,
    handle: Handle,
    transcript: Transcript,
    had_command: bool,
}

/// Whether the VM can still be asked.
#[derive(Debug)]
enum Course {
    Open {
        queue: Receiver<(u32, Event)>,
        service: Option<Service>,
    },
    Ended(Ending),
}

impl Vm {
    /// A handle for other threads, to ask the VM and to end it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves the VM, its handles and its API on this thread until the guest ends, or is ended, and
    /// says how that came. Afterwards it says the same at once.
    pub fn run(&mut self) -> Ending {
        let ended = Course::Ended(Ending::Dismissed);
        let ending = match std::mem::replace(&mut self.course, ended) {
            Course::Ended(ending) => ending,
            Course::Open { queue, service } => {
                let ending = control::serve(&mut self.life, queue);
                // Ends when its clients have their answers.
                drop(service);
                self.with_panic(ending)
            }
        };
        self.course = Course::Ended(ending.clone());
        ending
    }

    /// The last lines that the guest's consoles printed, `count` at most, without control characters.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.transcript.last_lines(count)
    }

    /// What the VM is defined as, if it is.
    pub fn config(&self) -> Option<&VmConfig> {
        self.life.config()
    }

    /// Tells the event monitor of the end, with podvmm's exit code.
    pub(crate) fn exited(&mut self, ending: &Ending) -> u8 {
        let code = ending.exit_code(self.had_command);
        let detail = match ending {
            Ending::Dismissed => Value::Null,
            other => other.to_string().into(),
        };
        let properties = json!({ "reason": ending.reason(), "detail": detail, "code": code });
        self.life.events().vm("exited", properties);
        code
    }

    /// A panicked Linux resets itself; what it printed tells the two apart.
    fn with_panic(&self, ending: Ending) -> Ending {
        match ending {
            Ending::Reset | Ending::Halted | Ending::TripleFault(_) => {
                self.transcript.panic().map_or(ending, Ending::Panic)
            }
            other => other,
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // One that has ended is stopped, or waits for RAM that does not come: then its threads are not
        // to be waited for.
        if let Course::Open { .. } = self.course {
            self.life.stop();
        }
    }
}

/// Asks a VM and orders it, from another thread than the one that calls [`Vm::run`], which alone
/// answers. Each method waits for its answer, and fails with [`ApiError::Ending`] when there is none any more.
#[derive(Clone, Debug)]
pub struct Handle {
    inbox: Inbox,
}

impl Handle {
    /// Stops the vCPUs and the devices.
    pub fn pause(&self) -> Result<(), ApiError> {
        self.ask(Request::Pause).map(drop)
    }

    /// Lets a paused VM go on.
    pub fn resume(&self) -> Result<(), ApiError> {
        self.ask(Request::Resume).map(drop)
    }

    /// Sets sizes. The guest follows when it can; [`Handle::info`] says what is so already.
    pub fn resize(&self, sizes: Resize) -> Result<(), ApiError> {
        self.ask(Request::Resize(sizes)).map(drop)
    }

    /// Writes the VM, which is paused, to a folder.
    pub fn snapshot(&self, snapshot: Snapshot) -> Result<(), ApiError> {
        self.ask(Request::Snapshot(snapshot)).map(drop)
    }

    /// Says what the VM is and how large.
    pub fn info(&self) -> Result<VmInfo, ApiError> {
        match self.ask(Request::Info)? {
            Answer::Info(info) => Ok(*info),
            other => unreachable!("the answer to another request: {other:?}"),
        }
    }

    /// Ends the guest, and with it [`Vm::run`]: it was [`Ending::Dismissed`].
    pub fn end(&self) -> Result<(), ApiError> {
        self.ask(Request::Exit).map(drop)
    }

    /// Ends the guest because of a signal.
    pub(crate) fn signal(&self, signal: i32) {
        // After the end of the VM there is nothing left to end.
        let _ = self.inbox.send(Event::Signal(signal));
    }

    fn ask(&self, request: Request) -> Result<Answer, ApiError> {
        let (reply, answer) = Reply::to_thread();
        // Without the VM the event is dropped, and its reply says so.
        let _ = self.inbox.send(Event::Call(Box::new(request), reply));
        answer.recv().unwrap_or(Err(ApiError::Ending))
    }
}
