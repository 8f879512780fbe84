//! A pod: its VM, and the containers in it.

pub(crate) mod cgroup;
pub(crate) mod error;
mod events;
pub(crate) mod figures;
pub(crate) mod guest;
mod kill;
pub(crate) mod mounts;
pub(crate) mod publish;
mod resources;
pub(crate) mod size;
pub(crate) mod spec;
pub(crate) mod state;
pub(crate) mod task;
pub(crate) mod teardown;
pub(crate) mod waiting;
mod watch;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use protocol::agent::oci::{Process as OciProcess, Spec};
use protocol::containerd::events::{Event, TaskOnly};
use protocol::containerd::task::Mount;

use crate::agent::Target;
use crate::agent::stdio::{Paths, Stdio};
use crate::config::Config;
use crate::host::phases::Phases;
use crate::host::place::Place;
use crate::pod::error::{Error, asked};
use crate::pod::guest::{Birth, Guest};
use crate::pod::publish::Publisher;
use crate::pod::size::Limits;
use crate::pod::spec::hooks::Hooks;
use crate::pod::state::{Exit, State};
use crate::pod::task::{Container, NOT_STARTED, Process};
use crate::pod::waiting::Waiting;

/// How long a change of a VM may take that is to end.
const CHANGE_PATIENCE: Duration = Duration::from_secs(2);
/// The time between looks at whether a change is over.
const PAUSE: Duration = Duration::from_millis(10);

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// What containerd says of a container to be made.
#[derive(Debug)]
pub(crate) struct Creation {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) paths: Paths,
    /// The path of the configuration.
    pub(crate) config: PathBuf,
}

/// The pod of this shim.
pub(crate) struct Pod {
    id: String,
    place: Place,
    events: Publisher,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// A lock that is held while the VM is made, resized or ended.
    changing: Mutex<()>,
    /// Held while the pod ends.
    ending: Mutex<()>,
    guest: Mutex<Option<Arc<Guest>>>,
    /// The number of the pod's VMM, which is kept after its end; 0 before there is one.
    vmm: AtomicU32,
    phases: Mutex<Phases>,
    /// A VM that waited for the pod, until it is the pod's.
    waiting: Mutex<Option<Waiting>>,
}

impl Pod {
    pub(crate) fn new(
        id: String,
        place: Place,
        events: Publisher,
        phases: Phases,
        waiting: Option<Waiting>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            place,
            events,
            containers: Mutex::default(),
            changing: Mutex::default(),
            ending: Mutex::default(),
            guest: Mutex::default(),
            vmm: AtomicU32::new(0),
            phases: Mutex::new(phases),
            waiting: Mutex::new(waiting),
        })
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().expect("a panic ends the process")
    }

    fn phases(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().expect("a panic ends the process")
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let containers = self.containers();
        let container = containers.get(id).cloned();
        container.ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Error> {
        let process = self.container(id)?.process(exec_id);
        process.ok_or_else(|| Error::NotFound(format!("process {exec_id} in {id}")))
    }

    fn guest(&self) -> Result<Arc<Guest>, Error> {
        let guest = self.guest.lock().expect("a panic ends the process");
        guest.clone().ok_or(Error::NoVm)
    }

    /// The container whose processes another is to see, by the path of a pid namespace.
    fn target(&self, spec: &Spec) -> Option<String> {
        let pid = spec::process_of(spec::pid_namespace(spec)?)?;
        let containers = self.containers();
        let mut others = containers.values().filter(|it| it.id != self.id);
        // The number of one that has ended may be another thread's by now.
        let runs = |it: &Container| it.first.state().exit().is_none();
        let target = others.find(|it| it.thread.get() == Some(&pid) && runs(it))?;
        Some(target.id.clone())
    }

    /// Makes a container; with the first, the VM.
    pub(crate) fn create(self: &Arc<Self>, creation: Creation) -> Result<Arc<Container>, Error> {
        let Creation {
            id,
            bundle,
            rootfs,
            paths,
            config,
        } = creation;
        let spec = spec::read(&bundle)?;
        let is_pod = id == self.id;
        spec::check(&spec, is_pod)?;
        if self.containers().contains_key(&id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        let resources = spec
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.as_ref());
        let limits = resources.map_or_else(Limits::default, Limits::of);
        let cpus = resources.map_or_else(String::new, spec::cpus);
        spec::check_cpus(&cpus)?;
        let guest = if is_pod {
            let made = self.make_guest(&spec, &config);
            made.inspect_err(|_| self.end())?
        } else {
            self.guest()?
        };
        let target = self.target(&spec);
        let process = spec.process.as_ref();
        let container = Arc::new(Container {
            id: id.clone(),
            bundle: bundle.clone(),
            first: Arc::new(Process::new(first_of(&id), paths, None)),
            thread: OnceLock::new(),
            execs: Mutex::default(),
            limits: Mutex::new(limits),
            cpus: Mutex::new(cpus),
            hooks: Hooks::of(&spec, &id, &bundle),
            oom_score: process.map_or(0, |process| process.oom_score_adj),
        });
        // So that the end of the VM is the end of it as well.
        self.containers().insert(id.clone(), Arc::clone(&container));
        let made = self
            .resize(true)
            .and_then(|()| guest.make(&id, spec, target.as_deref(), &rootfs, &bundle))
            .and_then(|()| Ok(container.hooks.created(guest.vm.pid())?));
        if let Err(error) = made {
            self.containers().remove(&id);
            guest.unmake(&id);
            if is_pod {
                self.end();
            }
            container.hooks.stopped();
            return Err(error);
        }
        self.set_oom_score();
        self.pin();
        self.phases().note("container");
        Ok(container)
    }

    /// Makes the guest for the pod that `spec` describes, and watches it from then on.
    fn make_guest(self: &Arc<Self>, spec: &Spec, config: &Path) -> Result<Arc<Guest>, Error> {
        let _changing = self.changing.lock().expect("a panic ends the process");
        let config = Config::read(config)?.for_pod(&spec.annotations)?;
        log::set_max_level(config.log_level);
        let made = Guest::start(
            &Birth {
                pod: &self.id,
                place: &self.place,
                spec,
                phases: &self.phases,
                waiting: &self.waiting,
            },
            config,
        );
        let guest = Arc::new(made?);
        self.vmm.store(guest.vm.pid(), Ordering::Relaxed);
        *self.guest.lock().expect("a panic ends the process") = Some(Arc::clone(&guest));
        self.watch(&guest)?;
        Ok(guest)
    }

    fn open(&self, process: &Process) -> Result<Stdio, Error> {
        let owner = process.owner(&self.events.namespace);
        Ok(Stdio::open(&process.paths, owner)?)
    }

    /// Starts a container's first process.
    pub(crate) fn start(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        let process = &container.first;
        process.expect(State::Created)?;
        if id == self.id {
            guest.connect_late()?;
        }
        let stdio = self.open(process)?;
        process.change(State::begin)?;
        let started = guest.agent.start_container(id);
        let started = started.map_err(asked("start the container"));
        let started = started.and_then(|()| process.change(State::started));
        if let Err(error) = started {
            self.ended(&container, process, Exit::now(NOT_STARTED));
            if id == self.id {
                // What it has on the host is another pod's to use.
                self.end();
            }
            return Err(error);
        }
        self.attend(&guest, &container, process, stdio)?;
        if let Err(error) = container.hooks.started(guest.vm.pid()) {
            // As with runc it has failed to start then.
            let _ = self.kill(id, "", SIGKILL, true);
            return Err(error.into());
        }
        let mut phases = self.phases();
        phases.note("start");
        if id == self.id {
            log::info!("{phases}");
        }
        Ok(())
    }

    /// Starts one more process in a container.
    pub(crate) fn exec(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let guest = self.guest()?;
        container.first.expect(State::Running)?;
        process.expect(State::Created)?;
        let stdio = self.open(&process)?;
        let spec = process.spec.clone().unwrap_or_default();
        process.change(State::begin)?;
        if let Err(error) = guest.agent.exec(&process.target, spec) {
            // It stays as it is if it ended meanwhile, with its VM.
            let _ = process.change(State::not_started);
            return Err(asked("start the process")(error));
        }
        process.change(State::started)?;
        self.tell_exec_start(&container, exec_id);
        self.attend(&guest, &container, &process, stdio)
    }

    /// Carries a running process's streams, and waits for its end. Of a container's first it tells the
    /// start.
    fn attend(
        self: &Arc<Self>,
        guest: &Arc<Guest>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let given_up: Arc<dyn Fn() -> bool + Send + Sync> = {
            let (process, guest) = (Arc::clone(process), Arc::clone(guest));
            Arc::new(move || process.is_given_up() || guest.vm.life.has_ended())
        };
        let has_ended = {
            let process = Arc::clone(process);
            move || process.state().exit().is_some()
        };
        let terminal = process.paths.terminal;
        let target = &process.target;
        let mut outputs = stdio.carry(&guest.agent, target, terminal, &given_up, has_ended)?;
        let close = Arc::clone(&outputs.close);
        *process.close.lock().expect("a panic ends the process") = Some(close);
        process.has_logger(outputs.logger.take());
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let (tell, told) = mpsc::channel::<()>();
        let wait = move || {
            if process.target.exec.is_empty() {
                let thread = rustix::thread::gettid().as_raw_nonzero().get();
                // It is attended once, and its number is positive.
                let _ = container.thread.set(thread.unsigned_abs());
                pod.tell_start(&container);
            }
            drop(tell);
            outputs.drain();
            match guest.agent.wait(&process.target) {
                Ok(status) => {
                    let status = process.status(status);
                    pod.ended(&container, &process, Exit::now(status));
                }
                Err(error) => {
                    // The end of the VM tells the end of all in it.
                    log::debug!("{}: wait for {:?}: {error}", container.id, process.target);
                    guest.vm.life.wait();
                }
            }
            process.close_stdin();
            if container.id == pod.id && process.target.exec.is_empty() {
                // Without its first process there is no pod.
                pod.end_guest(&guest);
            }
        };
        let thread = thread::Builder::new()
            .name("wait".into())
            .stack_size(64 << 10);
        thread.spawn(wait).map_err(Error::Thread)?;
        // Nothing is sent: it has told the start once its end is closed.
        let _ = told.recv();
        Ok(())
    }

    /// Adds a process that is yet to be started.
    pub(crate) fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        paths: Paths,
        mut spec: OciProcess,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        spec::process_for_guest(&mut spec);
        spec.terminal = paths.terminal;
        let target = Target {
            container: id.into(),
            exec: exec_id.into(),
        };
        let mut execs = container.execs.lock().expect("a panic ends the process");
        if execs.contains_key(exec_id) {
            return Err(Error::Exists(format!("process {exec_id} in {id}")));
        }
        let process = Arc::new(Process::new(target, paths, Some(spec)));
        execs.insert(exec_id.into(), process);
        Ok(())
    }

    /// Forgets a process that has ended.
    pub(crate) fn delete_exec(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let exit = process.delete()?;
        process.end_logger();
        container
            .execs
            .lock()
            .expect("a panic ends the process")
            .remove(exec_id);
        Ok(exit)
    }

    /// Forgets a container that has ended. With the pod's first one the pod ends, and its VM.
    pub(crate) fn delete(&self, id: &str) -> Result<Exit, Error> {
        let container = self.container(id)?;
        if container.first.state() == State::Created {
            self.drop_created(&container);
        }
        let exit = container.first.delete()?;
        // It runs in a cgroup that may be the pod's.
        let processes = container.processes();
        processes.iter().for_each(|process| process.end_logger());
        self.containers().remove(id);
        if id == self.id {
            self.end();
        } else if let Ok(guest) = self.guest() {
            guest.unmake(id);
            self.pin();
            // What it needed is the host's again.
            if let Err(error) = self.resize(true) {
                log::warn!("{id}: {}", api::chain(&error).join(": "));
            }
        }
        container.hooks.stopped();
        Ok(exit)
    }

    /// Ends the guest. One that does not let a change of its VM come to an end has no last words.
    fn end_guest(&self, guest: &Guest) {
        let deadline = Instant::now() + CHANGE_PATIENCE;
        let _changing = loop {
            match self.changing.try_lock() {
                Ok(changing) => break changing,
                Err(_) if Instant::now() < deadline => thread::sleep(PAUSE),
                Err(_) => {
                    // What waits for the guest fails then.
                    guest.vm.kill();
                    break self.changing.lock().expect("a panic ends the process");
                }
            }
        };
        guest.end();
    }

    /// Ends the VM and takes away all that the pod has on the host. Who asks once more meanwhile waits until that is
    /// done: the shim is in the pod's cgroup at first, and the record of what there is goes last.
    pub(crate) fn end(&self) {
        let _ending = self.ending.lock().expect("a panic ends the process");
        let guest = self.guest.lock().expect("a panic ends the process").take();
        if let Some(guest) = guest {
            self.end_guest(&guest);
            guest.take_down();
        }
        crate::pod::teardown::pod(&self.place);
    }

    /// Waits until what was published is told.
    pub(crate) fn flush(&self) {
        self.events.flush();
    }

    pub(crate) fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.process(id, exec_id)?.close_stdin();
        Ok(())
    }

    pub(crate) fn resize_terminal(
        &self,
        id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        let process = self.process(id, exec_id)?;
        let guest = self.guest()?;
        let resized = guest.agent.resize_terminal(&process.target, rows, columns);
        resized.map_err(asked("resize the terminal"))
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.first.expect(State::Running)?;
        self.guest()?
            .agent
            .pause(id)
            .map_err(asked("pause the container"))?;
        container.first.change(State::paused)?;
        self.publish(Event::Paused(TaskOnly {
            container_id: id.into(),
        }));
        Ok(())
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.first.expect(State::Paused)?;
        self.guest()?
            .agent
            .resume(id)
            .map_err(asked("resume the container"))?;
        container.first.change(State::resumed)?;
        self.publish(Event::Resumed(TaskOnly {
            container_id: id.into(),
        }));
        Ok(())
    }
}

fn first_of(id: &str) -> Target {
    Target {
        container: id.into(),
        exec: String::new(),
    }
}
