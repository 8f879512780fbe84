//! A container: its cgroup, its processes and what they read and write.

pub(crate) mod cgroup;
mod identity;
pub(crate) mod launch;
mod process;
mod rootfs;
pub(crate) mod seccomp;
pub(crate) mod stage;

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use protocol::agent::oci;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::reaper::Reaper;
use crate::sys::{self, pid_t};
use cgroup::Cgroup;
use launch::{Launch, Word};
pub(crate) use process::Process;
use process::Streams;
pub(crate) use rootfs::mount_kind;
use seccomp::Filter;

/// Why a container or process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    #[error("start a process")]
    Start(#[from] io::Error),
    /// The container's process could not become what it is to be, for this reason.
    #[error("{0}")]
    Process(String),
    /// The container has ended, so nothing can be started in it any more.
    #[error("the container has ended")]
    Ended,
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{kind} hook {path}: no hooks are run in a guest")]
    Hook { kind: &'static str, path: String },
    #[error("a {0} namespace is not possible in a pod's VM")]
    Namespace(String),
}

/// A container, whose first process may still wait to be started.
#[derive(Debug)]
pub(crate) struct Container {
    cgroup: Cgroup,
    /// The name of its processes' session keyring.
    keyring: String,
    /// The container's processes by `exec_id`; the first by the container's own.
    processes: Mutex<HashMap<String, Arc<Process>>>,
    first: Arc<Process>,
    /// The seccomp filter that all the container's processes are held to.
    seccomp: Option<Filter>,
    pid_namespace: Arc<OwnedFd>,
    /// Kills for want of memory that were told of.
    pub(crate) oom_kills: Mutex<u64>,
}

/// What a container is made of.
pub(crate) struct Plan<'a> {
    pub(crate) spec: oci::Spec,
    /// The pid namespace that it shares; without one it has its own.
    pub(crate) shared: Option<&'a OwnedFd>,
    /// Whether what is mounted for it is found without following a link.
    pub(crate) follows_no_links: bool,
}

impl Container {
    /// Makes a container whose first process waits.
    pub(crate) fn create(id: &str, plan: Plan<'_>, reaper: &Reaper) -> Result<Self, Error> {
        let Plan {
            mut spec,
            shared,
            follows_no_links,
        } = plan;
        refuse_hooks(spec.hooks.as_ref())?;
        let linux = spec.linux.as_mut().ok_or(Error::Missing("linux"))?;
        spec.process.as_ref().ok_or(Error::Missing("process"))?;
        let user =
            |namespace: &&oci::LinuxNamespace| matches!(namespace.r#type.as_str(), "user" | "time");
        if let Some(namespace) = linux.namespaces.iter().find(user) {
            return Err(Error::Namespace(namespace.r#type.clone()));
        }
        let profile = linux.seccomp.take();
        let seccomp = profile
            .map(|profile| seccomp::compile(&profile))
            .transpose()?;
        let cgroup = Cgroup::new(&linux.cgroups_path, id)?;
        if let Some(resources) = &linux.resources {
            cgroup.limit(resources)?;
            cgroup.restrict_devices(resources, &linux.devices)?;
        }
        let keyring = format!("_ses.{id}");
        let launch = Launch {
            spec: Some(spec),
            seccomp: seccomp.clone(),
            shares_pids: shared.is_some(),
            keyring: keyring.clone(),
            follows_no_links,
            ..Launch::default()
        };
        let namespaces = match shared {
            Some(_) => libc::CLONE_NEWNS,
            None => libc::CLONE_NEWNS | libc::CLONE_NEWPID,
        };
        let into = shared.map(AsFd::as_fd);
        let first = start(&launch, namespaces, into, |pid| cgroup.add(pid), reaper)?;
        let first = Arc::new(first);
        let pid_namespace = first.open("ns/pid").inspect_err(|_| drop(cgroup.kill()))?;
        if shared.is_some() {
            // In a namespace of its own the kernel sees to it.
            first.end.takes_along(cgroup.killer()?);
        }
        Ok(Self {
            cgroup,
            keyring,
            processes: Mutex::new(HashMap::from([(id.to_owned(), Arc::clone(&first))])),
            first,
            seccomp,
            pid_namespace: Arc::new(pid_namespace.into()),
            oom_kills: Mutex::default(),
        })
    }

    /// Starts one more process.
    pub(crate) fn exec(
        &self,
        exec_id: &str,
        process: oci::Process,
        reaper: &Reaper,
    ) -> Result<(), Error> {
        if self.first.end.is_known() {
            return Err(Error::Ended);
        }
        let launch = Launch {
            spec: None,
            process: Some(process),
            seccomp: self.seccomp.clone(),
            keyring: self.keyring.clone(),
            ..Launch::default()
        };
        let first = self.first.handle().as_fd();
        let confine = |pid| self.cgroup.join(pid, &self.first);
        let process = start(&launch, 0, Some(first), confine, reaper)?;
        process.go_on()?;
        self.processes()
            .insert(exec_id.to_owned(), Arc::new(process));
        Ok(())
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes.lock().expect("a panic ends the process")
    }

    /// The process of this number; without one the first.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return Some(Arc::clone(&self.first));
        }
        self.processes().get(exec_id).cloned()
    }

    /// The first process is kept, for it is the container.
    pub(crate) fn forget(&self, exec_id: &str) {
        let is_first = |process: &Arc<Process>| Arc::ptr_eq(process, &self.first);
        let mut processes = self.processes();
        if !processes.get(exec_id).is_some_and(is_first) {
            processes.remove(exec_id);
        }
    }

    pub(crate) fn first(&self) -> &Process {
        &self.first
    }

    pub(crate) fn pid_namespace(&self) -> &Arc<OwnedFd> {
        &self.pid_namespace
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }
}

/// Hooks are the host's programs, or are to be run by what makes a container and not in it.
fn refuse_hooks(hooks: Option<&oci::Hooks>) -> Result<(), Error> {
    let hooks = hooks.cloned().unwrap_or_default();
    let all = [
        ("prestart", hooks.prestart),
        ("createRuntime", hooks.create_runtime),
        ("createContainer", hooks.create_container),
        ("startContainer", hooks.start_container),
        ("poststart", hooks.poststart),
        ("poststop", hooks.poststop),
    ];
    let first = all
        .into_iter()
        .find_map(|(kind, hooks)| Some((kind, hooks.into_iter().next()?.path)));
    match first {
        Some((kind, path)) => Err(Error::Hook { kind, path }),
        None => Ok(()),
    }
}

/// Starts this program once more to become what `launch` says, up to where it waits: in new
/// `namespaces` and in those of `into`, and where `confine` puts it.
fn start(
    launch: &Launch,
    namespaces: i32,
    into: Option<BorrowedFd<'_>>,
    confine: impl FnOnce(pid_t) -> Result<(), cgroup::Error>,
    reaper: &Reaper,
) -> Result<Process, Error> {
    let flags = SocketFlags::CLOEXEC;
    let (channel, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(io::Error::from)?;
    let file = launch.to_file()?;
    let (their_stdin, stdin) = io::pipe()?;
    let (stdout, their_stdout) = io::pipe()?;
    let (stderr, their_stderr) = io::pipe()?;
    let argv = [
        c"podvmm-agent".to_owned(),
        CString::new(launch::STAGE).expect("has no NUL"),
    ];
    let mut descriptors = vec![
        their_stdin.as_fd(),
        their_stdout.as_fd(),
        their_stderr.as_fd(),
        theirs.as_fd(),
        file.as_fd(),
    ];
    descriptors.extend(into);
    let program = sys::Program {
        paths: &[c"/proc/self/exe".to_owned()],
        argv: &argv,
        env: &sys::c_library(),
        descriptors: &descriptors,
        namespaces,
        terminal: false,
    };
    let (mut pid, mut end, birth) = reaper.expect(|| {
        let sys::Spawned { pid, failure } = sys::spawn(&program)?;
        failure.map_or(Ok(pid), Err)
    })?;
    drop((theirs, their_stdin, their_stdout, their_stderr));
    let mut master = None;
    // It goes on only when it is where it may not use more than it should.
    confine(pid).inspect_err(|_| drop(sys::kill(pid, libc::SIGKILL)))?;
    launch::say(channel.as_fd(), &Word::Ready)?;
    loop {
        match launch::hear(channel.as_fd())? {
            Some(Word::Pid(other)) => (pid, end) = (other, birth.adopt(other)?),
            Some(Word::Terminal(terminal)) => master = Some(terminal),
            Some(Word::Ready) => break,
            Some(Word::Failed(why)) => return Err(Error::Process(why)),
            None => return Err(Error::Process("it ended before it was ready".into())),
        }
    }
    let handle = birth.handle(pid)?;
    let handle = handle.ok_or_else(|| Error::Process("it ended before it was started".into()))?;
    let streams = match master {
        None => Streams::pipes(stdin, stdout, stderr)?,
        Some(master) => Streams::terminal(master)?,
    };
    Ok(Process::new((pid, handle), end, channel, streams))
}
