//! A pod: its VM, and the containers in it.

mod watch;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use agent::protocol::oci::{LinuxResources, Process as OciProcess, Spec};
use agent::ttrpc::{CallError, Code};

use crate::config::Config;
use crate::error::{Error, asked, expect, state};
use crate::guest::{Birth, Guest, leave};
use crate::phases::Phases;
use crate::place::Place;
use crate::protocol::events::{Event, TaskExecStarted, TaskExit, TaskOnly, TaskStart};
use crate::protocol::{figures, task, timestamp};
use crate::publish::Publisher;
use crate::size::{self, Limits};
use crate::spec;
use crate::stdio::{Paths, Stdio, Target};
use crate::task::{Container, Exit, KILLED, NOT_STARTED, Process, State};
use crate::waiting::Waiting;

/// How long a guest that did not do as told may take to say that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// How long a process may take to end once the guest has taken the SIGKILL for it. It has no say in
/// that, but its guest's kernel may be busy with what it leaves behind.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// What containerd says of a container to be made.
#[derive(Debug)]
pub(crate) struct Creation {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<task::Mount>,
    pub(crate) paths: Paths,
    /// Of the configuration.
    pub(crate) config: PathBuf,
}

/// The pod of this shim.
pub(crate) struct Pod {
    id: String,
    place: Place,
    events: Publisher,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Held while the VM is made, resized or ended.
    changing: Mutex<()>,
    guest: Mutex<Option<Arc<Guest>>>,
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
            guest: Mutex::default(),
            phases: Mutex::new(phases),
            waiting: Mutex::new(waiting),
        })
    }

    pub(crate) fn publish(&self, event: Event) {
        self.events.publish(event);
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

    /// The process that stands for all in the pod: its VMM. Without one it is the shim.
    pub(crate) fn pid(&self) -> u32 {
        self.guest()
            .map_or_else(|_| std::process::id(), |guest| guest.vm.pid())
    }

    /// The number that stands for a container. The first has the VMM's, by whose namespaces others look
    /// at the pod. The others have that of a thread of the shim: `/proc` has an entry for it too, and a
    /// later container that is to see their processes is told them by it.
    pub(crate) fn pid_of(&self, container: &Container) -> u32 {
        match container.thread.get() {
            Some(thread) if container.id != self.id => *thread,
            _ => self.pid(),
        }
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
    pub(crate) fn create(self: &Arc<Self>, creation: Creation) -> Result<(), Error> {
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
            let booted = self.boot(&spec, &config);
            booted.inspect_err(|_| self.end())?
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
            oom_score: process.map_or(0, |process| process.oom_score_adj),
        });
        // So that the end of the VM is the end of it as well.
        self.containers().insert(id.clone(), Arc::clone(&container));
        let made = self
            .resize(true)
            .and_then(|()| guest.make(&id, spec, target.as_deref(), &rootfs, &bundle));
        if let Err(error) = made {
            self.containers().remove(&id);
            guest.unmake(&id);
            if is_pod {
                self.end();
            }
            return Err(error);
        }
        self.set_oom_score();
        self.pin();
        self.phases().note("container");
        Ok(())
    }

    /// Makes the VM for the pod that `spec` describes.
    fn boot(self: &Arc<Self>, spec: &Spec, config: &Path) -> Result<Arc<Guest>, Error> {
        let _changing = self.changing.lock().expect("a panic ends the process");
        let config = Config::read(config)?.for_pod(&spec.annotations)?;
        log::set_max_level(config.log_level);
        let made = Guest::boot(
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
        *self.guest.lock().expect("a panic ends the process") = Some(Arc::clone(&guest));
        self.watch(&guest)?;
        Ok(guest)
    }

    /// Notes the end of a process, once, and tells containerd.
    fn ended(&self, container: &Container, process: &Process, exit: Exit) {
        let has_run = process.state() != State::Created || process.target.exec.is_empty();
        if !process.enter(State::Stopped(exit)) || !has_run {
            return;
        }
        let exec = &process.target.exec;
        self.publish(Event::Exit(TaskExit {
            container_id: container.id.clone(),
            id: if exec.is_empty() {
                container.id.clone()
            } else {
                exec.clone()
            },
            pid: self.pid_of(container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        }));
    }

    /// Starts a container's first process.
    pub(crate) fn start(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        expect(&container.first, id, State::Created)?;
        if id == self.id {
            guest.connect_late()?;
        }
        let stdio = Stdio::open(&container.first.paths)?;
        container.first.starts.store(true, Ordering::Relaxed);
        let started = guest.agent.start_container(id);
        container.first.starts.store(false, Ordering::Relaxed);
        if let Err(error) = started {
            self.ended(&container, &container.first, Exit::now(NOT_STARTED));
            if id == self.id {
                // What it has on the host is another pod's to use.
                self.end();
            }
            return Err(asked("start the container")(error));
        }
        container.first.enter(State::Running);
        self.attend(&guest, &container, &container.first, stdio)?;
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
        expect(&container.first, id, State::Running)?;
        expect(&process, exec_id, State::Created)?;
        let stdio = Stdio::open(&process.paths)?;
        let spec = process.spec.clone().unwrap_or_default();
        let asked_for = guest.agent.exec(&process.target, spec);
        asked_for.map_err(asked("start the process"))?;
        process.enter(State::Running);
        self.publish(Event::ExecStarted(TaskExecStarted {
            container_id: id.into(),
            exec_id: exec_id.into(),
            pid: self.pid(),
        }));
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
        let terminal = process.paths.terminal;
        let outputs = stdio.carry(&guest.agent, &process.target, terminal, &given_up)?;
        let close = Arc::clone(&outputs.close);
        *process.close.lock().expect("a panic ends the process") = Some(close);
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let (tell, told) = mpsc::channel::<()>();
        let wait = move || {
            if process.target.exec.is_empty() {
                let thread = rustix::thread::gettid().as_raw_nonzero().get();
                // It is attended once, and its number is positive.
                let _ = container.thread.set(thread.unsigned_abs());
                pod.publish(Event::Start(TaskStart {
                    container_id: container.id.clone(),
                    pid: pod.pid_of(&container),
                }));
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

    /// Signals a process. A guest that does not even kill is ended.
    pub(crate) fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        if let State::Stopped(_) = process.state() {
            let what = if exec_id.is_empty() { id } else { exec_id };
            return Err(Error::NotFound(format!("process of {what}: it has ended")));
        }
        let is_kill = signal == 9;
        if process.state() == State::Created && !exec_id.is_empty() {
            // Nor while it is being started: then it would start all the same.
            return Err(Error::NotFound(format!("process {exec_id} in {id} yet")));
        }
        if process.state() == State::Created && !process.starts.load(Ordering::Relaxed) {
            self.drop_created(&container);
            return Ok(());
        }
        let guest = self.guest()?;
        if is_kill && !process.killed.swap(true, Ordering::Relaxed) {
            insist(&guest, &process)?;
        }
        // All of a container are signalled by what stands for it.
        let target = if all {
            first_of(id)
        } else {
            process.target.clone()
        };
        match guest.agent.signal(&target, signal) {
            Err(error @ CallError::Late { .. })
                if is_kill || guest.agent.check(SIGN_OF_LIFE).is_err() =>
            {
                log::error!("kill {id} {exec_id}: {error}, so its VM is ended");
                guest.vm.kill();
                Ok(())
            }
            // With its VM it has ended.
            Err(CallError::Gone(_) | CallError::Send { .. }) => {
                guest.vm.kill();
                Ok(())
            }
            // It has ended meanwhile.
            Err(CallError::Refused(status)) if status.code == Code::NotFound => Ok(()),
            answer => answer.map_err(asked("signal the process")),
        }
    }

    /// Ends a container that was never started.
    fn drop_created(&self, container: &Container) {
        if let Ok(guest) = self.guest() {
            let target = &container.first.target;
            if let Err(error) = guest.agent.signal(target, 9) {
                log::warn!("{}: {error}", container.id);
            }
        }
        self.ended(container, &container.first, Exit::now(KILLED));
    }

    /// Forgets a process that has ended.
    pub(crate) fn delete_exec(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let exit = match process.state() {
            State::Stopped(exit) => exit,
            // One that never ran has no end to wait for.
            State::Created => Exit::now(0),
            _ => return Err(state(exec_id, process.state(), "stopped")),
        };
        container
            .execs
            .lock()
            .expect("a panic ends the process")
            .remove(exec_id);
        Ok(exit)
    }

    /// Forgets a container that has ended; with the last of the pod, its VM.
    pub(crate) fn delete(&self, id: &str) -> Result<Exit, Error> {
        let container = self.container(id)?;
        let exit = match container.first.state() {
            State::Stopped(exit) => exit,
            State::Created => {
                self.drop_created(&container);
                container.first.wait()
            }
            running => return Err(state(id, running, "stopped")),
        };
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
        Ok(exit)
    }

    fn end_guest(&self, guest: &Guest) {
        let _changing = self.changing.lock().expect("a panic ends the process");
        guest.end();
    }

    /// Ends the VM and takes away all that the pod has on the host.
    pub(crate) fn end(&self) {
        let guest = self.guest.lock().expect("a panic ends the process").take();
        if let Some(guest) = guest {
            self.end_guest(&guest);
            guest.cgroup.iter().for_each(leave);
        }
        crate::teardown::pod(&self.place);
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
        expect(&container.first, id, State::Running)?;
        self.guest()?
            .agent
            .pause(id)
            .map_err(asked("pause the container"))?;
        container.first.enter(State::Paused);
        self.publish(Event::Paused(TaskOnly {
            container_id: id.into(),
        }));
        Ok(())
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        expect(&container.first, id, State::Paused)?;
        self.guest()?
            .agent
            .resume(id)
            .map_err(asked("resume the container"))?;
        container.first.enter(State::Running);
        self.publish(Event::Resumed(TaskOnly {
            container_id: id.into(),
        }));
        Ok(())
    }

    /// What a container has used, in the guest; of the pod's sandbox, what all of it has, on the
    /// host.
    pub(crate) fn figures(&self, id: &str) -> Result<figures::Metrics, Error> {
        self.container(id)?;
        let guest = self.guest()?;
        match &guest.cgroup {
            Some(cgroup) if guest.is_sandbox(id, &self.id) => Ok(cgroup.figures()),
            _ => {
                let stats = guest
                    .agent
                    .stats(id)
                    .map_err(asked("tell what it has used"))?;
                Ok(crate::figures::of_guest(&stats, guest.bounds()))
            }
        }
    }

    /// Changes what a container may use, and the VM's size with it.
    pub(crate) fn update(&self, id: &str, mut resources: LinuxResources) -> Result<(), Error> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        let cpus = spec::cpus(&resources);
        spec::check_cpus(&cpus)?;
        let (before, after) = {
            let mut limits = container.limits.lock().expect("a panic ends the process");
            let before = *limits;
            *limits = before.updated(&resources);
            (before, *limits)
        };
        let announced = guest.announced();
        guest.announce(announced.less(before, after));
        if id == self.id
            && !guest.is_sandbox(id, &self.id)
            && let Some(cgroup) = &guest.cgroup
        {
            cgroup.update(|limits| limits.updated(&guest.config, &resources));
        }
        spec::resources_for_guest(&mut resources);
        let update = || -> Result<(), Error> {
            // What grows has room before it is used, what shrinks is used no more before it goes.
            self.resize(false)?;
            let updated = guest.agent.update(id, resources);
            updated.map_err(asked("update the container"))?;
            if !cpus.is_empty() {
                container.set_cpus(&cpus);
                self.pin();
            }
            self.resize(true)
        };
        update().inspect_err(|_| {
            if before != after {
                *container.limits.lock().expect("a panic ends the process") = before;
                guest.announce(announced);
                let _ = self.resize(true);
            }
        })
    }

    /// Gives the VM the size that its containers need.
    fn resize(&self, may_shrink: bool) -> Result<(), Error> {
        let _changing = self.changing.lock().expect("a panic ends the process");
        let guest = self.guest()?;
        let containers: Vec<_> = self.containers().values().cloned().collect();
        let workloads = containers
            .iter()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let limits = |container: &Arc<Container>| {
            *container.limits.lock().expect("a panic ends the process")
        };
        let mut limits: Vec<_> = workloads.map(limits).collect();
        if limits.is_empty() {
            limits.push(guest.announced());
        }
        let size = size::size(&guest.config, guest.announced(), limits.into_iter());
        guest.resize(size, may_shrink)
    }

    /// Has the VM run on the CPUs of its containers together; on all if one of them may.
    fn pin(&self) {
        let Ok(guest) = self.guest() else { return };
        let containers: Vec<_> = self.containers().values().cloned().collect();
        let workloads = containers
            .iter()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let sets: Vec<_> = workloads.map(|container| container.cpus()).collect();
        guest.pin(&sets);
    }

    /// The host ends a VM as it would end the most dispensable of its containers.
    fn set_oom_score(&self) {
        let Ok(guest) = self.guest() else { return };
        let containers = self.containers();
        let workloads = containers
            .values()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let score = workloads
            .map(|container| container.oom_score)
            .max()
            .unwrap_or(0);
        drop(containers);
        let path = format!("/proc/{}/oom_score_adj", guest.vm.pid());
        if let Err(error) = fs::write(&path, score.to_string()) {
            log::debug!("{path}: {error}");
        }
    }
}

/// Sees to it that a process ends that is killed. A guest whose kernel or agent keeps it all the same
/// is ended: what it answers to a signal is only its word.
fn insist(guest: &Arc<Guest>, process: &Arc<Process>) -> Result<(), Error> {
    let (guest, process) = (Arc::clone(guest), Arc::clone(process));
    let wait = move || {
        if !process.ends_within(LAST_PATIENCE) {
            log::error!(
                "{}: {} s after SIGKILL it has not ended, so its VM is ended",
                process.target,
                LAST_PATIENCE.as_secs()
            );
            guest.vm.kill();
        }
    };
    let thread = thread::Builder::new()
        .name("insist".into())
        .stack_size(64 << 10);
    thread.spawn(wait).map(drop).map_err(Error::Thread)
}

fn first_of(id: &str) -> Target {
    Target {
        container: id.into(),
        exec: String::new(),
    }
}
