//! The process between the agent and a container's program: this program once more, in the
//! container's namespaces, which makes itself what the container is to be. One thread, so that it
//! may fork, and all memory its own.
//!
//! [`STEPS`] is the order in which it does so, for a container's first process and for those that are
//! started in it later.

mod program;
mod streams;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use protocol::agent::oci::{Linux, Process, Spec};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

use super::identity::Rights;
use super::launch::{CHANNEL, LAUNCH, Launch, NAMESPACES, Word, hear, say};
use super::rootfs::Links;
use super::{identity, rootfs};
use crate::sys;

type Error = Box<dyn std::error::Error>;

/// The order of the steps, from the first to the last. The agent has started the process in a session, and a
/// container's first in mount and pid namespaces of its own.
///
/// It is runc's (libcontainer/standard_init_linux.go and setns_init_linux.go), but for what is written to /proc:
/// here that is the guest's, before the container's is mounted; runc looks twice at what it writes to.
const STEPS: [Step; 32] = [
    // Before any process of a container sees this one, whose memory and descriptors are the agent's.
    step(Of::All, "close to tracing", close_to_tracing),
    // Before it uses anything: it may not use more than the container's limits.
    step(Of::All, "join the cgroup", await_cgroup),
    step(Of::All, "read what to become", read_launch),
    // In the guest's /proc, for the container's need not be one; and while it may lower its score.
    step(Of::All, "set the oom score", set_oom_score),
    // Before the mounts, for a /proc shows the pid namespace of the process that mounts it.
    step(Of::First, "enter the pod's pids", enter_pod),
    // The root, the pids and the cgroups of the first process, all at once.
    step(Of::Later, "enter the container", enter_container),
    // No later step needs it, and it leads into other namespaces.
    step(
        Of::All,
        "leave the namespaces' descriptor",
        leave_namespaces,
    ),
    // In the guest's /proc, as above; in the container's they are read-only.
    step(Of::First, "set sysctls", set_sysctls),
    // Before the mounts, for a cgroup file system shows what is below the namespace's root.
    step(Of::First, "enter a cgroup namespace", unshare_cgroup),
    // Before the first mount, or the agent and other containers would have it too.
    step(Of::First, "part the mounts", part_mounts),
    step(Of::First, "mount the root", fill_root),
    // From here on no path leads to a file of the guest's or of another container's.
    step(Of::First, "enter the root", enter_root),
    // In the root, where a link of the image's leads to nothing but the image; runc has the next two the other
    // way round, which is the same to the container.
    step(Of::First, "mask paths", mask_paths),
    step(Of::First, "make paths read-only", protect_paths),
    // It may have to be made, so before the root is read-only.
    step(Of::First, "make the working folder", make_folder),
    step(Of::First, "make the root read-only", protect_root),
    // Before the program, which would have the agent's keys.
    step(Of::All, "join the session keyring", join_keyring),
    // Now, for the host takes away a container that cannot be made, but not one that cannot be started.
    step(Of::First, "find the program", find_program),
    // The terminal is one of the container's own mounts.
    step(Of::All, "prepare the streams", prepare_streams),
    // All is done that can fail for the host's reasons; from here on the agent hears of a failure alone.
    step(Of::All, "await the order to start", await_start),
    step(Of::All, "read the program's surroundings", read_command),
    // Before a filter that may forbid it. The program has its three streams, and no other descriptor.
    step(Of::All, "close descriptors", close_descriptors),
    // Without no-new-privileges loading one takes a capability, so before they are dropped: such a profile has
    // to allow the steps that follow.
    step(
        Of::All,
        "load the seccomp filter with rights",
        load_filter_early,
    ),
    // As root, which may enter the image's folders.
    step(Of::All, "enter the working folder", enter_folder),
    // Raising one takes a capability.
    step(Of::All, "set limits", set_limits),
    // While there is the capability that this takes.
    step(Of::All, "bound the capabilities", bound_capabilities),
    // Before the capabilities are dropped that this takes; they are kept over the change of user.
    step(Of::All, "become the user", become_user),
    step(Of::All, "set the capabilities", set_capabilities),
    // A volume may have folders that only its user may enter.
    step(
        Of::All,
        "enter the user's working folder",
        enter_users_folder,
    ),
    // Before the filter that is loaded without a capability.
    step(Of::All, "forbid new privileges", forbid_new_privileges),
    // As late as can be: a profile has to allow what comes after it.
    step(Of::All, "load the seccomp filter", load_filter_late),
    step(Of::All, "become the program", become_program),
];

/// One of the steps. Its name tells of a failure that says no more than the kernel's error.
struct Step {
    of: Of,
    name: &'static str,
    take: fn(&mut Stage) -> Result<(), Error>,
}

/// Whose step it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    /// Of a container's first process, which makes what the others enter.
    First,
    /// Of those that are started in the container later.
    Later,
}

const fn step(of: Of, name: &'static str, take: fn(&mut Stage) -> Result<(), Error>) -> Step {
    Step { of, name, take }
}

/// A process on its way, and what it has been told so far.
struct Stage {
    channel: OwnedFd,
    /// What is to be read, until it is.
    source: Option<File>,
    /// What the agent has there, if there are none to enter.
    namespaces: Option<OwnedFd>,
    launch: Launch,
    process: Process,
    root: Option<OwnedFd>,
    command: Option<Command>,
    rights: Option<Rights>,
    /// Whether the working folder is still to be entered, by the user.
    is_folder_closed: bool,
    /// The status with which this process ends where it becomes no program.
    code: u8,
}

/// Becomes what it is told to. Returns only if that fails, after having said so.
pub(crate) fn run() -> u8 {
    let mut stage = Stage::take();
    // A program that is there does not come back.
    let why = stage.pass().err().unwrap_or_default();
    // If the agent is gone, no process can receive this.
    let _ = say(stage.channel.as_fd(), &Word::Failed(why));
    stage.code
}

impl Stage {
    /// Takes what the agent hands over, by number.
    fn take() -> Self {
        // SAFETY: the agent starts this process with the channel there, and nothing else owns it.
        let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL) };
        // SAFETY: as above, with what is to be read.
        let source = unsafe { OwnedFd::from_raw_fd(LAUNCH) };
        // SAFETY: as above; the agent keeps that number open.
        let namespaces = unsafe { OwnedFd::from_raw_fd(NAMESPACES) };
        Self::new(channel, source.into(), namespaces)
    }

    fn new(channel: OwnedFd, source: File, namespaces: OwnedFd) -> Self {
        Self {
            channel,
            source: Some(source),
            namespaces: Some(namespaces),
            launch: Launch::default(),
            process: Process::default(),
            root: None,
            command: None,
            rights: None,
            is_folder_closed: false,
            code: 1,
        }
    }

    /// Takes the steps, or says why one of them fails.
    fn pass(&mut self) -> Result<(), String> {
        for step in &STEPS {
            let is_its = match step.of {
                Of::All => true,
                Of::First => self.is_first(),
                Of::Later => !self.is_first(),
            };
            if is_its {
                (step.take)(self).map_err(|error| step.describe(&*error))?;
            }
        }
        Ok(())
    }

    fn is_first(&self) -> bool {
        self.launch.spec.is_some()
    }

    fn spec(&self) -> &Spec {
        self.launch
            .spec
            .as_ref()
            .expect("it is the first process's step")
    }

    fn linux(&self) -> Linux {
        self.spec().linux.clone().unwrap_or_default()
    }

    /// Waits to be told to go on. Whatever is said tells it; if nothing is, there is no agent any more.
    fn await_order(&self) {
        if !matches!(hear(self.channel.as_fd()), Ok(Some(_))) {
            std::process::exit(1);
        }
    }

    /// Goes on as another process, which is in the pid namespace entered: this one stays where it is,
    /// tells of it and ends.
    fn go_on_as_sibling(&self) -> Result<(), Error> {
        let (mut told, telling) = io::pipe()?;
        // A namespace whose first process has ended has no more.
        let forked = sys::fork_sibling();
        match forked.map_err(|error| format!("start in the pid namespace: {error}"))? {
            0 => {
                // Whatever it says comes after.
                drop(telling);
                told.read_to_end(&mut Vec::new())?;
                rustix::process::setsid()?;
                Ok(())
            }
            pid => {
                say(self.channel.as_fd(), &Word::Pid(pid))?;
                std::process::exit(0);
            }
        }
    }

    fn change_folder(&self) -> Result<(), (Errno, Error)> {
        let cwd = match self.process.cwd.as_str() {
            "" => "/",
            cwd => cwd,
        };
        let changed = rustix::process::chdir(cwd);
        changed.map_err(|errno| (errno, format!("{cwd}: {errno}").into()))
    }

    fn load_filter(&mut self) -> Result<(), Error> {
        let Some(filter) = self.launch.seccomp.take() else {
            return Ok(());
        };
        let loaded = filter.load();
        loaded.map_err(|error| format!("load the seccomp filter: {error}").into())
    }
}

impl Step {
    fn describe(&self, error: &(dyn std::error::Error + 'static)) -> String {
        match error.is::<Errno>() || error.is::<io::Error>() {
            true => format!("{}: {error}", self.name),
            false => error.to_string(),
        }
    }
}

fn close_to_tracing(stage: &mut Stage) -> Result<(), Error> {
    rustix::io::fcntl_setfd(&stage.channel, rustix::io::FdFlags::CLOEXEC)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// The agent says when it is there.
fn await_cgroup(stage: &mut Stage) -> Result<(), Error> {
    stage.await_order();
    Ok(())
}

fn read_launch(stage: &mut Stage) -> Result<(), Error> {
    let source = stage.source.take().ok_or("it has been read")?;
    stage.launch = Launch::from_file(source)?;
    let spec = stage.launch.spec.as_ref();
    let first = spec.and_then(|spec| spec.process.clone());
    let process = first.or_else(|| stage.launch.process.take());
    stage.process = process.ok_or("there is no process to become")?;
    Ok(())
}

fn set_oom_score(stage: &mut Stage) -> Result<(), Error> {
    let set = identity::set_oom_score(&stage.process);
    set.map_err(|error| format!("oom_score_adj: {error}").into())
}

/// If the container shares the pids of one that is there already.
fn enter_pod(stage: &mut Stage) -> Result<(), Error> {
    let Some(pids) = stage
        .namespaces
        .as_ref()
        .filter(|_| stage.launch.shares_pids)
    else {
        return Ok(());
    };
    let kind = Some(LinkNameSpaceType::ProcessID);
    rustix::thread::move_into_link_name_space(pids.as_fd(), kind)
        .map_err(|errno| format!("enter the pod's pid namespace: {errno}"))?;
    stage.go_on_as_sibling()
}

fn enter_container(stage: &mut Stage) -> Result<(), Error> {
    let first = stage.namespaces.as_ref().ok_or("there are no namespaces")?;
    let kinds = ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::MOUNT;
    rustix::thread::move_into_thread_name_spaces(first.as_fd(), kinds)
        .map_err(|errno| format!("enter the container: {errno}"))?;
    stage.go_on_as_sibling()
}

fn leave_namespaces(stage: &mut Stage) -> Result<(), Error> {
    stage.namespaces = None;
    Ok(())
}

fn set_sysctls(stage: &mut Stage) -> Result<(), Error> {
    for (name, value) in &stage.linux().sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).map_err(|error| format!("sysctl {name}: {error}"))?;
    }
    Ok(())
}

/// If the container is to have one.
fn unshare_cgroup(stage: &mut Stage) -> Result<(), Error> {
    let namespaces = stage.linux().namespaces;
    if namespaces
        .iter()
        .any(|namespace| namespace.r#type == "cgroup")
    {
        // SAFETY: no other thread shares this one's descriptors: this process has one thread.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }?;
    }
    Ok(())
}

fn part_mounts(stage: &mut Stage) -> Result<(), Error> {
    rootfs::part_from_others(&stage.linux())
}

fn fill_root(stage: &mut Stage) -> Result<(), Error> {
    let links = match stage.launch.follows_no_links {
        true => Links::Refused,
        false => Links::Followed,
    };
    stage.root = Some(rootfs::fill(stage.spec(), links)?);
    Ok(())
}

fn enter_root(stage: &mut Stage) -> Result<(), Error> {
    rootfs::enter(&stage.root.take().ok_or("there is no root")?)
}

fn mask_paths(stage: &mut Stage) -> Result<(), Error> {
    rootfs::mask_paths(&stage.linux())
}

fn protect_paths(stage: &mut Stage) -> Result<(), Error> {
    rootfs::protect_paths(&stage.linux())
}

fn make_folder(stage: &mut Stage) -> Result<(), Error> {
    let cwd = &stage.process.cwd;
    rootfs::make_folder(cwd).map_err(|error| format!("{cwd}: {error}").into())
}

fn protect_root(stage: &mut Stage) -> Result<(), Error> {
    rootfs::protect_root(stage.spec())
}

/// The container's processes share one, and see no keys of the agent's or of another container's.
fn join_keyring(stage: &mut Stage) -> Result<(), Error> {
    let name = CString::new(stage.launch.keyring.as_str())?;
    match sys::join_session_keyring(&name, stage.is_first()) {
        // A kernel without keys.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        joined => joined.map_err(|error| format!("join the session keyring: {error}").into()),
    }
}

fn find_program(stage: &mut Stage) -> Result<(), Error> {
    program::find(&stage.process)
}

fn prepare_streams(stage: &mut Stage) -> Result<(), Error> {
    if stage.process.terminal {
        let terminal = streams::terminal(&stage.process, stage.is_first())?;
        say(stage.channel.as_fd(), &Word::Terminal(terminal))?;
    }
    streams::give(stage.process.user.as_ref().map_or(0, |user| user.uid))
}

fn await_start(stage: &mut Stage) -> Result<(), Error> {
    say(stage.channel.as_fd(), &Word::Ready)?;
    stage.await_order();
    Ok(())
}

fn read_command(stage: &mut Stage) -> Result<(), Error> {
    stage.command = Some(program::command(&stage.process)?);
    Ok(())
}

/// They close when the program is there; until then the channel tells of a failure.
fn close_descriptors(_: &mut Stage) -> Result<(), Error> {
    Ok(sys::close_on_exec_from(CHANNEL)?)
}

fn load_filter_early(stage: &mut Stage) -> Result<(), Error> {
    match stage.process.no_new_privileges {
        true => Ok(()),
        false => stage.load_filter(),
    }
}

fn enter_folder(stage: &mut Stage) -> Result<(), Error> {
    match stage.change_folder() {
        Err((Errno::ACCESS | Errno::PERM, _)) => stage.is_folder_closed = true,
        changed => changed.map_err(|(_, error)| error)?,
    }
    Ok(())
}

fn set_limits(stage: &mut Stage) -> Result<(), Error> {
    let mut limits = stage.process.rlimits.iter();
    limits.try_for_each(identity::set_limit)
}

fn bound_capabilities(stage: &mut Stage) -> Result<(), Error> {
    let capabilities = stage.process.capabilities.clone().unwrap_or_default();
    let rights = stage.rights.insert(Rights::parse(&capabilities)?);
    rights.bound();
    Ok(())
}

fn become_user(stage: &mut Stage) -> Result<(), Error> {
    identity::become_user(&stage.process.user.clone().unwrap_or_default())
}

fn set_capabilities(stage: &mut Stage) -> Result<(), Error> {
    let rights = stage.rights.as_ref();
    rights.ok_or("the capabilities are unknown")?.set()
}

fn enter_users_folder(stage: &mut Stage) -> Result<(), Error> {
    match stage.is_folder_closed {
        true => stage.change_folder().map_err(|(_, error)| error),
        false => Ok(()),
    }
}

fn forbid_new_privileges(stage: &mut Stage) -> Result<(), Error> {
    if stage.process.no_new_privileges {
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

/// Unless it has been loaded.
fn load_filter_late(stage: &mut Stage) -> Result<(), Error> {
    stage.load_filter()
}

/// Returns only if it fails.
fn become_program(stage: &mut Stage) -> Result<(), Error> {
    let command = stage.command.as_mut().ok_or("there is nothing to run")?;
    let error = command.exec();
    let name = command.get_program().to_string_lossy();
    stage.code = match error.kind() {
        io::ErrorKind::NotFound => 127,
        _ => 126,
    };
    Err(format!("{name}: {error}").into())
}
