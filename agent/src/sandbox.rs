//! The pod in this guest: its containers and what they share.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use protocol::agent::messages::{
    CreateContainerRequest, CreateSandboxRequest, RemoveContainerRequest, SignalProcessRequest,
    UpdateEphemeralMountsRequest,
};
use protocol::ttrpc::{Call, Code, Status};
use rustix::fs::inotify;

use crate::container::{Container, Plan, Process};
use crate::devices::{Disk, Disks};
use crate::policy::Rules;
use crate::reaper::Reaper;
use crate::storage::Storages;
use crate::{describe, devices, dns, sys};

/// How long a process that was killed may take to be gone when the sandbox ends.
const LAST_BREATH: Duration = Duration::from_millis(500);

/// The pod in this guest.
pub(crate) struct Sandbox {
    /// What the host may ask for.
    pub(crate) rules: Rules,
    containers: Mutex<HashMap<String, Held>>,
    /// Identifiers of containers that are being made.
    making: Mutex<HashSet<String>>,
    storages: Storages,
    disks: Disks,
    pub(crate) reaper: Reaper,
    /// The pid namespace of the first container, for those that share it.
    pid_namespace: Mutex<Option<Arc<OwnedFd>>>,
    /// Says that a container's count of kills for want of memory may have changed.
    kills: OwnedFd,
    oom: Sender<String>,
    ooms: Mutex<Receiver<String>>,
    destroyed: AtomicBool,
    ended: Sender<()>,
}

/// A container and the storage it needs.
struct Held {
    container: Arc<Container>,
    storages: Vec<String>,
    /// The VM's disks that it has as devices.
    _disks: Vec<Disk>,
}

impl Sandbox {
    /// One without containers, and who hears when it is destroyed.
    pub(crate) fn start(rules: Rules) -> io::Result<(Arc<Self>, Receiver<()>)> {
        let disks = Disks::default();
        let (oom, ooms) = channel();
        let (ended, end) = channel();
        let sandbox = Arc::new(Self {
            containers: Mutex::default(),
            making: Mutex::default(),
            storages: Storages::new(rules.follows_no_links(), disks.clone()),
            disks,
            rules,
            reaper: Reaper::start()?,
            pid_namespace: Mutex::default(),
            kills: inotify::init(inotify::CreateFlags::CLOEXEC)?,
            oom,
            ooms: Mutex::new(ooms),
            destroyed: AtomicBool::new(false),
            ended,
        });
        let watched = Arc::clone(&sandbox);
        thread::Builder::new()
            .name("oom".into())
            .spawn(move || watched.watch_kills())?;
        Ok((sandbox, end))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.containers.lock().expect("a panic ends the process")
    }

    pub(crate) fn count(&self) -> usize {
        self.containers().len()
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        let containers = self.containers();
        let held = containers.get(id);
        held.map(|held| Arc::clone(&held.container))
            .ok_or_else(|| Status::new(Code::NotFound, format!("there is no container {id}")))
    }

    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Status> {
        self.container(id)?.process(exec_id).ok_or_else(|| {
            let why = format!("there is no process {exec_id} in {id}");
            Status::new(Code::NotFound, why)
        })
    }

    pub(crate) fn prepare(&self, request: &CreateSandboxRequest) -> Result<(), Status> {
        self.rules.allow_storages(&request.storages)?;
        if let Some(module) = request.kernel_modules.first() {
            let why = format!(
                "kernel module {}: the guest's kernel takes none",
                module.name
            );
            return Err(Status::new(Code::InvalidArgument, why));
        }
        if !request.hostname.is_empty() {
            sys::set_hostname(&request.hostname).map_err(internal)?;
        }
        dns::set(&request.dns)
            .map_err(|error| Status::new(Code::Internal, format!("set name servers: {error}")))?;
        for storage in &request.storages {
            self.storages.add(storage)?;
        }
        Ok(())
    }

    /// Kills all, and leaves it to [`Self::end`] to end the guest.
    pub(crate) fn destroy(&self) {
        self.destroyed.store(true, Ordering::Relaxed);
        let containers = self.containers();
        for held in containers.values() {
            let _ = held.container.cgroup().kill();
        }
        for held in containers.values() {
            held.container.first().end.wait_for(LAST_BREATH);
        }
        sys::sync();
    }

    /// Ends the guest, if the sandbox is destroyed.
    pub(crate) fn end(&self) {
        if self.destroyed.load(Ordering::Relaxed) {
            // If no thread receives this, the guest is ending already.
            let _ = self.ended.send(());
        }
    }

    pub(crate) fn create(&self, request: CreateContainerRequest) -> Result<(), Status> {
        let id = request.container_id.clone();
        let already = || Status::new(Code::AlreadyExists, format!("{id} is there already"));
        if !self.making().insert(id.clone()) {
            return Err(already());
        }
        let made = match self.containers().contains_key(&id) {
            true => Err(already()),
            false => Ok(()),
        };
        let made = made.and_then(|()| self.make(request));
        self.making().remove(&id);
        made
    }

    fn make(&self, request: CreateContainerRequest) -> Result<(), Status> {
        let id = request.container_id;
        let mut spec = request.oci.ok_or_else(|| missing("OCI"))?;
        let linux = spec.linux.as_mut().ok_or_else(|| missing("linux"))?;
        let disks = devices::add(linux, &request.devices, &self.disks)?;
        self.rules.allow_container(&spec)?;
        self.rules.allow_storages(&request.storages)?;
        // The container whose processes it is to see, as an ephemeral one for debugging.
        let mut namespaces = spec.linux.iter().flat_map(|linux| &linux.namespaces);
        let target = namespaces.find(|it| it.r#type == "pid" && !it.path.is_empty());
        let target = target.map(|namespace| namespace.path.clone());
        let mut storages = Vec::new();
        let made = request.storages.iter().try_for_each(|storage| {
            self.storages.add(storage)?;
            storages.push(storage.mount_point.clone());
            Ok(())
        });
        let made = made.and_then(|()| {
            let shared = match target {
                Some(id) => Some(Arc::clone(self.container(&id)?.pid_namespace())),
                None if request.sandbox_pidns => self.pid_namespace().clone(),
                None => None,
            };
            let plan = Plan {
                spec,
                shared: shared.as_deref(),
                follows_no_links: self.rules.follows_no_links(),
            };
            Container::create(&id, plan, &self.reaper).map_err(internal)
        });
        let container = made.inspect_err(|_| {
            storages
                .iter()
                .for_each(|place| self.storages.remove(place));
        })?;
        self.pid_namespace()
            .get_or_insert_with(|| Arc::clone(container.pid_namespace()));
        let container = Arc::new(container);
        let events = container.cgroup().events();
        let watched = inotify::add_watch(&self.kills, events, inotify::WatchFlags::MODIFY);
        watched.map_err(internal)?;
        self.containers().insert(
            id,
            Held {
                container,
                storages,
                _disks: disks,
            },
        );
        Ok(())
    }

    fn making(&self) -> MutexGuard<'_, HashSet<String>> {
        self.making.lock().expect("a panic ends the process")
    }

    fn pid_namespace(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.pid_namespace.lock().expect("a panic ends the process")
    }

    pub(crate) fn remove(&self, request: &RemoveContainerRequest) -> Result<(), Status> {
        let container = self.container(&request.container_id)?;
        container.cgroup().kill().map_err(internal)?;
        let end = &container.first().end;
        match request.timeout {
            0 => drop(end.wait()),
            seconds => {
                let ended = end.wait_for(Duration::from_secs(seconds.into()));
                let why = || format!("{} has not ended", request.container_id);
                ended.ok_or_else(|| Status::new(Code::DeadlineExceeded, why()))?;
            }
        }
        // The host may take its files away after this. What it wrote is there: virtio-fs writes through,
        // and what a process has mapped when it is unmapped. sync(2) would write the host's disks.
        let held = self.containers().remove(&request.container_id);
        if let Some(held) = held {
            held.storages
                .iter()
                .for_each(|place| self.storages.remove(place));
        }
        Ok(())
    }

    pub(crate) fn signal(&self, request: &SignalProcessRequest) -> Result<(), Status> {
        let container = self.container(&request.container_id)?;
        let signal = i32::try_from(request.signal);
        let signal = signal.map_err(|error| Status::new(Code::InvalidArgument, error))?;
        if request.exec_id.is_empty() && signal == libc::SIGKILL {
            return container.cgroup().kill().map_err(internal);
        }
        let process = self.process(&request.container_id, &request.exec_id)?;
        let is_first = std::ptr::eq(&*process, container.first());
        // One that has no program yet would not hear of it, nor would one that is the first of its
        // namespace and leaves it to the kernel.
        let is_deaf =
            process.waits() || signal == libc::SIGTERM && is_first && !process.minds(signal);
        let signal = if is_deaf { libc::SIGKILL } else { signal };
        process.signal(signal).map_err(internal)
    }

    pub(crate) fn update_mounts(
        &self,
        request: &UpdateEphemeralMountsRequest,
    ) -> Result<(), Status> {
        self.rules.allow_storages(&request.storages)?;
        let mut storages = request.storages.iter();
        storages.try_for_each(|storage| self.storages.update(storage))
    }

    /// Waits for a container in which a process was killed for want of memory.
    pub(crate) fn next_oom(&self, call: &Call<'_>) -> Result<String, Status> {
        let ooms = self.ooms.lock().expect("a panic ends the process");
        let id = ooms.recv().map_err(internal)?;
        if call.is_orphan() {
            // The next one who waits is to hear of it.
            self.oom.send(id.clone()).map_err(internal)?;
        }
        Ok(id)
    }

    /// Tells of each container in which a process was killed for want of memory.
    fn watch_kills(&self) {
        // Which file it was is of no matter: all are looked at.
        let mut events = [0; 4096];
        while rustix::io::retry_on_intr(|| rustix::io::read(&self.kills, &mut events)).is_ok() {
            self.tell_of_kills();
        }
    }

    fn tell_of_kills(&self) {
        for (id, held) in self.containers().iter() {
            let mut told = held
                .container
                .oom_kills
                .lock()
                .expect("a panic ends the process");
            let kills = held.container.cgroup().oom_kills();
            if kills > *told {
                *told = kills;
                // The other end is this sandbox's own.
                let _ = self.oom.send(id.clone());
            }
        }
    }
}

pub(crate) fn missing(what: &str) -> Status {
    Status::new(Code::InvalidArgument, format!("{what} is missing"))
}

pub(crate) fn internal(error: impl Error + 'static) -> Status {
    Status::new(Code::Internal, describe(&error))
}
