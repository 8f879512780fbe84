//! A pod's guest: its VM, the agent that speaks for it, and what it sees of the host.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use protocol::agent::messages::{CreateContainerRequest, CreateSandboxRequest, Storage};
use protocol::agent::oci::Spec;
use protocol::containerd::task;
use protocol::contract::{SANDBOX, SHARE_TAG, SHARED};
use protocol::ttrpc::{CallError, Code};

use crate::agent::{Abilities, Agent};
use crate::config::{Config, Size};
use crate::host::cpus;
use crate::host::labels::Labels;
use crate::host::network::{self, Settings};
use crate::host::phases::Phases;
use crate::host::place::Place;
use crate::host::record::Record;
use crate::pod::cgroup::{self, Cgroup};
use crate::pod::error::{Error, asked};
use crate::pod::figures::Bounds;
use crate::pod::mounts::Shared;
use crate::pod::size::{self, Limits};
use crate::pod::waiting::{self, CLONE_PATIENCE, Waiting, meet};
use crate::pod::{spec, teardown};
use crate::vm::template::{Stamp, Template};
use crate::vm::{self, Plan, Start, Vm};

/// How long the news of a VM's end may take behind that of its connections'.
const LAST_NEWS: Duration = Duration::from_secs(1);
/// Which part of its boot's time a guest is left to itself before it becomes a template, while its pod
/// waits.
const SETTLING_SHARE: u32 = 8;

/// What a guest is made for.
#[derive(Clone, Copy)]
pub(crate) struct Birth<'a> {
    /// The pod's name.
    pub(crate) pod: &'a str,
    pub(crate) place: &'a Place,
    /// The description of the pod's first container.
    pub(crate) spec: &'a Spec,
    pub(crate) phases: &'a Mutex<Phases>,
    /// A VM that waited for a pod.
    pub(crate) waiting: &'a Mutex<Option<Waiting>>,
}

impl Birth<'_> {
    fn note(&self, phase: &'static str) {
        let mut phases = self.phases.lock().expect("a panic ends the process");
        phases.note(phase);
    }
}

/// A VM whose agent has answered, on the pod's network. Dropping it takes the shared folder down, and does not
/// end the VM.
struct Met {
    vm: Vm,
    agent: Agent,
    shared: Shared,
}

/// The VM and what speaks for it.
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) agent: Arc<Agent>,
    pub(crate) config: Config,
    shared: Shared,
    pub(crate) cgroup: Option<Cgroup>,
    size: Mutex<Size>,
    /// Whether the first container is a sandbox, which uses next to nothing whatever it may.
    has_sandbox: bool,
    /// What the kubelet said of all of the pod, before its containers came, less what was taken from
    /// them since.
    announced: Mutex<Limits>,
    /// The host's CPUs that it may run on; empty for all.
    pinned: Mutex<Vec<usize>>,
    /// Whether the guest is being ended, so that what it does not answer any more is no fault.
    ends: AtomicBool,
    abilities: Abilities,
    /// Whether an interface may still come.
    waits_for_network: AtomicBool,
}

impl Guest {
    /// Starts a VM for the pod: one from the pool, one restored from a template, or one that boots. Waits for
    /// its agent and prepares it for the pod's containers.
    pub(crate) fn start(birth: &Birth<'_>, config: Config) -> Result<Self, Error> {
        let Birth { place, spec, .. } = *birth;
        // A VM that waited is in it.
        let mut record = Record::read(place);
        let linux = spec.linux.clone().unwrap_or_default();
        let limits = cgroup::Limits::of(&config, spec);
        let cgroup = Cgroup::enter(&linux.cgroups_path, limits)?;
        let make = || {
            if let Some(cgroup) = &cgroup {
                record.cgroups = cgroup.made().to_vec();
                record.scope = cgroup.scope().map(String::from);
                record.write(place).map_err(vm::Error::Record)?;
                config
                    .image
                    .iter()
                    .try_for_each(|image| cgroup.allow_disk(image))?;
            }
            let met = reach(birth, &config, record, cgroup.as_ref())?;
            Self::settle(birth, config, met)
        };
        let guest = make().inspect_err(|_| cgroup.iter().for_each(leave))?;
        Ok(Guest { cgroup, ..guest })
    }

    /// Prepares the guest for the pod's containers.
    fn settle(birth: &Birth<'_>, config: Config, met: Met) -> Result<Self, Error> {
        let Birth { pod, spec, .. } = *birth;
        let Met { vm, agent, shared } = met;
        let prepare = || {
            let request = sandbox(pod, spec);
            agent
                .create_sandbox(&request)
                .map_err(asked("create the sandbox"))?;
            let abilities = agent.abilities(config.policy.as_ref());
            let abilities = abilities.map_err(asked("tell its details"))?;
            birth.note("sandbox");
            Ok(abilities)
        };
        let abilities = prepare().inspect_err(|_: &Error| vm.kill())?;
        let size = size_of(&config, spec);
        let guest = Guest {
            waits_for_network: AtomicBool::new(vm.spare.is_some()),
            size: Mutex::new(vm.size),
            vm,
            agent: Arc::new(agent),
            config,
            shared,
            cgroup: None,
            has_sandbox: spec::is_sandbox(spec),
            announced: Mutex::new(announced(spec)),
            pinned: Mutex::default(),
            ends: AtomicBool::new(false),
            abilities,
        };
        let resized = guest.resize(size, false);
        resized.inspect_err(|_| guest.vm.kill())?;
        Ok(guest)
    }

    /// Ends the VM, after the guest has written its files.
    pub(crate) fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
        if self.vm.life.has_ended() {
            return;
        }
        if let Err(error) = self.agent.destroy_sandbox() {
            log::debug!("end the guest: {error}");
        }
        self.vm.kill();
    }

    /// Takes down what the host has of it, once its VM has ended.
    pub(crate) fn take_down(&self) {
        self.shared.take_down();
        self.cgroup.iter().for_each(leave);
    }

    /// Whether it ends as it was told to, or has ended: of that its agent's connection may tell first.
    pub(crate) fn is_ending(&self) -> bool {
        self.ends.load(Ordering::Relaxed) || self.vm.life.ends_within(LAST_NEWS)
    }

    /// Asks the agent for a sign of life. One that follows the clock is told the time by the same call, so
    /// that an idle guest wakes no more often.
    pub(crate) fn greet(&self, timeout: Duration) -> Result<(), CallError> {
        if self.abilities.follows_the_clock {
            return self.agent.tell_time(timeout);
        }
        self.agent.check(timeout)
    }

    pub(crate) fn announced(&self) -> Limits {
        *self.announced.lock().expect("a panic ends the process")
    }

    pub(crate) fn announce(&self, limits: Limits) {
        *self.announced.lock().expect("a panic ends the process") = limits;
    }

    /// What its containers cannot have used more than.
    pub(crate) fn bounds(&self) -> Bounds {
        let size = *self.size.lock().expect("a panic ends the process");
        Bounds {
            memory_bytes: size.memory_mib << 20,
            cpu_usec: self.vm.cpu_usec(),
        }
    }

    /// Has the VM run on the CPUs of its containers' sets, which are lists.
    pub(crate) fn pin(&self, sets: &[String]) {
        let wanted = cpus::together(sets);
        let mut pinned = self.pinned.lock().expect("a panic ends the process");
        if *pinned == wanted {
            return;
        }
        match cpus::pin_process(self.vm.pid(), &wanted) {
            Ok(()) => *pinned = wanted,
            Err(error) => log::warn!("have the VM run on the CPUs {wanted:?}: {error}"),
        }
    }

    /// Has the agent make a container of what is mounted for it, which sees the processes of the
    /// container `target`, if there is one.
    pub(crate) fn make(
        &self,
        id: &str,
        mut spec: Spec,
        target: Option<&str>,
        rootfs: &[task::Mount],
        bundle: &Path,
    ) -> Result<(), Error> {
        let root = spec
            .root
            .as_ref()
            .map_or("rootfs", |root| root.path.as_str());
        if let Some(cgroup) = &self.cgroup {
            let mut sources = rootfs.iter().map(|mount| Path::new(&mount.source));
            sources.try_for_each(|source| cgroup.allow_disk(source))?;
        }
        self.shared.root(id, rootfs, &bundle.join(root))?;
        let storages = self.shared.volumes(id, &mut spec)?;
        let shares_pids = spec::pid_namespace(&spec).is_some();
        spec::for_guest(&mut spec, id, self.abilities.seccomp, cgroup::is_unified());
        let target = target.filter(|_| self.abilities.pids_of_another);
        if let Some(target) = target {
            spec::see_processes_of(&mut spec, target);
        }
        let sandbox_pidns = shares_pids && target.is_none();
        let request = CreateContainerRequest {
            container_id: id.into(),
            exec_id: id.into(),
            storages,
            oci: Some(spec),
            sandbox_pidns,
            ..CreateContainerRequest::default()
        };
        let made = self.agent.create_container(&request);
        made.map_err(asked("create the container"))
    }

    /// Undoes [`Self::make`], as far as it was done.
    pub(crate) fn unmake(&self, id: &str) {
        if !self.vm.life.has_ended() {
            match self.agent.remove_container(id) {
                Ok(()) => {}
                Err(CallError::Refused(status)) if status.code == Code::NotFound => {}
                Err(error) => log::warn!("{id}: remove it from the guest: {error}"),
            }
        }
        if let Err(error) = self.shared.clear(id) {
            log::warn!("{id}: {error}");
        }
    }

    /// Connects the interface that came after the VM, if one did.
    pub(crate) fn connect_late(&self) -> Result<(), Error> {
        let Some(mac) = &self.vm.spare else {
            return Ok(());
        };
        if !self.waits_for_network.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let namespace = PathBuf::from(format!("/proc/{}/ns/net", self.vm.pid()));
        let found = network::within(&namespace, || network::connect_late(mac))?;
        match found {
            Some(settings) => self
                .agent
                .network(settings)
                .map_err(asked("set up the network")),
            None => Ok(()),
        }
    }

    /// Whether the container `id` is the sandbox of `pod`.
    pub(crate) fn is_sandbox(&self, id: &str, pod: &str) -> bool {
        self.has_sandbox && id == pod
    }

    /// Gives the VM that size, as far as it can have it; a smaller one only if it may shrink.
    pub(crate) fn resize(&self, wanted: Size, may_shrink: bool) -> Result<(), Error> {
        let mut size = self.size.lock().expect("a panic ends the process");
        // It cannot become smaller than it was at first.
        let least = if may_shrink { self.vm.size } else { *size };
        // vCPUs stay: the protocol has no way to have the guest give one back first.
        let wanted = Size {
            vcpus: wanted.vcpus.max(size.vcpus),
            memory_mib: wanted.memory_mib.max(least.memory_mib),
        };
        if *size == wanted {
            return Ok(());
        }
        log::info!("resize the VM from {size:?} to {wanted:?}");
        self.vm.resize(wanted)?;
        let has_more = wanted.vcpus > size.vcpus;
        *size = wanted;
        drop(size);
        if has_more {
            self.agent
                .online_cpus(wanted.vcpus)
                .map_err(asked("use more CPUs"))?;
        }
        Ok(())
    }
}

/// Has a VM whose agent answers: one from the pool, or else one restored from a template, or else
/// one that boots.
fn reach(
    birth: &Birth<'_>,
    config: &Config,
    record: Record,
    cgroup: Option<&Cgroup>,
) -> Result<Met, Error> {
    let template = template_of(config, birth.spec)?;
    let waiting = birth
        .waiting
        .lock()
        .expect("a panic ends the process")
        .take();
    if let Some(waiting) = waiting {
        let why = if template.as_ref() == Some(&waiting.template) {
            match adopt(birth, record.clone(), cgroup, waiting) {
                Ok(met) => return Ok(met),
                Err(error) => api::chain(&error).join(": "),
            }
        } else {
            "it is not what the pod needs".into()
        };
        log::warn!("the VM that waited is ended: {why}");
        teardown::vm(birth.place, &Record::read(birth.place));
    }
    let Some(template) = template else {
        return attempt(birth, config, record, None).map_err(Failure::into_error);
    };
    let failure = match attempt(birth, config, record.clone(), Some(&template)) {
        Ok(met) => {
            if matches!(met.vm.start, Start::Clone(_)) {
                template.worked();
            }
            return Ok(met);
        }
        Err(failure) => failure,
    };
    let Some(snapshot) = failure.snapshot else {
        return Err(failure.into_error());
    };
    let why = api::chain(&*failure.error).join(": ");
    log::warn!(
        "the VM boots, for its template {} fails: {why}",
        template.folder().display()
    );
    if failure.ran {
        // At once, for other pods may start while this one boots.
        template.failed(&snapshot, &why);
    }
    teardown::vm(birth.place, &Record::read(birth.place));
    let booted = attempt(birth, config, record, None).map_err(Failure::into_error)?;
    if !failure.ran {
        // Had the VM not booted either, the template would not be the reason.
        template.failed(&snapshot, &why);
    }
    Ok(booted)
}

/// Makes a VM that waited the pod's.
fn adopt(
    birth: &Birth<'_>,
    mut record: Record,
    cgroup: Option<&Cgroup>,
    waiting: Waiting,
) -> Result<Met, Error> {
    let Waiting {
        mut vm,
        agent,
        shared,
        ..
    } = waiting;
    if let Some(cgroup) = cgroup {
        cgroup.take(vm.pid())?;
    }
    let settings = match spec::network_namespace(birth.spec) {
        Some(pods) => {
            record.network = Some(pods.into());
            record.write(birth.place).map_err(vm::Error::Record)?;
            vm.join(pods)?
        }
        None => Settings::default(),
    };
    birth.note("prepare");
    vm.resume()?;
    birth.note("vmm");
    renew(birth, &agent)?;
    connect(birth, &agent, settings)?;
    Ok(Met { vm, agent, shared })
}

/// Tries to start a VM, from a template if one is given and ready, and waits for its agent.
fn attempt(
    birth: &Birth<'_>,
    config: &Config,
    mut record: Record,
    template: Option<&Template>,
) -> Result<Met, Failure> {
    let Birth { place, spec, .. } = *birth;
    let shared = Shared::make(place.shared()).map_err(Error::from)?;
    let plan = Plan {
        config,
        place,
        size: size_of(config, spec),
        template,
        network: spec::network_namespace(spec),
        labels: Labels::of(spec, config.labels),
    };
    birth.note("prepare");
    let snapshot = || template.and_then(Template::snapshot);
    let before = snapshot();
    let started = Vm::start(&plan, &mut record);
    let (vm, settings) = started.map_err(|error| Failure {
        // Without a snapshot the VM was to boot, and would fail again. Which of the two it was is
        // not known: the template may have been made, or set aside, while this one tried.
        snapshot: before
            .or_else(snapshot)
            .filter(|_| !matches!(error, vm::Error::Killed)),
        ran: false,
        error: Box::new(error.into()),
    })?;
    birth.note("vmm");
    let since = Instant::now();
    let ready = || {
        shared.show_to(vm.pid())?;
        let mut agent = meet(&vm, place, config)?;
        birth.note("guest");
        match &vm.start {
            // By KVM's wall clock, read once at the boot, it may be a second off.
            Start::Booted => tell_time(&agent)?,
            Start::Model(claim) => {
                drop(agent);
                if let Err(error) = claim.make(&vm, since.elapsed() / SETTLING_SHARE) {
                    log::warn!("there is no template: {}", api::chain(&error).join(": "));
                }
                birth.note("template");
                agent = meet(&vm, place, config)?;
                // Who reads the template would know its random numbers.
                renew(birth, &agent)?;
            }
            Start::Clone(_) => renew(birth, &agent)?,
        }
        connect(birth, &agent, settings)?;
        Ok(agent)
    };
    match ready() {
        Ok(agent) => Ok(Met { vm, agent, shared }),
        Err(error) => {
            let snapshot = match (vm.fail(), &vm.start) {
                (false, Start::Clone(snapshot)) => Some(snapshot.clone()),
                // A VM that was killed says nothing about its template.
                _ => None,
            };
            Err(Failure {
                snapshot,
                ran: true,
                error: Box::new(error),
            })
        }
    }
}

/// Gives a guest that shares its memory with a template random numbers of its own, and the time of day.
fn renew(birth: &Birth<'_>, agent: &Agent) -> Result<(), Error> {
    waiting::renew(agent)?;
    birth.note("renewal");
    Ok(())
}

fn tell_time(agent: &Agent) -> Result<(), Error> {
    agent
        .tell_time(CLONE_PATIENCE)
        .map_err(asked("set the time"))
}

fn connect(birth: &Birth<'_>, agent: &Agent, settings: Settings) -> Result<(), Error> {
    let connected = agent.network(settings);
    connected.map_err(asked("set up the network"))?;
    birth.note("network");
    Ok(())
}

/// A pod that does not start.
struct Failure {
    /// What its VM was restored from, if it may start by booting instead.
    snapshot: Option<Stamp>,
    /// Whether the VM was restored and its guest failed then.
    ran: bool,
    error: Box<Error>,
}

impl Failure {
    fn into_error(self) -> Error {
        *self.error
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            snapshot: None,
            ran: false,
            error: Box::new(error),
        }
    }
}

/// The template that the VM of the pod in `spec` can be restored from, or become. None if there is not to be
/// any such thing.
pub(crate) fn template_of(config: &Config, spec: &Spec) -> Result<Option<Template>, Error> {
    if config.templates.is_none() {
        return Ok(None);
    }
    // A VM without a network has an interface for one that may come late.
    let interfaces = spec::network_namespace(spec).map_or(Ok(1), network::count)?;
    Ok(Template::for_pod(config, size_of(config, spec), interfaces))
}

fn size_of(config: &Config, spec: &Spec) -> Size {
    let announced = announced(spec);
    size::size(config, announced, [announced].into_iter())
}

/// Moves this process out of the pod's cgroup, so that the cgroup can be taken away. A failure is
/// logged.
fn leave(cgroup: &Cgroup) {
    if let Err(error) = cgroup.leave() {
        log::warn!("{}", api::chain(&error).join(": "));
    }
}

/// What the pod will need: the kubelet says it with the sandbox; one container alone has it itself.
fn announced(spec: &Spec) -> Limits {
    if spec::is_sandbox(spec) {
        return Limits::of_pod(spec);
    }
    let resources = spec
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    resources.map_or_else(Limits::default, Limits::of)
}

fn sandbox(id: &str, spec: &Spec) -> CreateSandboxRequest {
    let shm = Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]
            .map(String::from)
            .to_vec(),
        mount_point: format!("{SANDBOX}/shm"),
        ..Storage::default()
    };
    let shared = Storage {
        driver: "virtio-fs".into(),
        source: SHARE_TAG.into(),
        fstype: "virtiofs".into(),
        mount_point: format!("{SHARED}/"),
        ..Storage::default()
    };
    CreateSandboxRequest {
        hostname: spec.hostname.clone(),
        sandbox_id: id.into(),
        storages: vec![shared, shm],
        sandbox_pidns: false,
        ..CreateSandboxRequest::default()
    }
}
