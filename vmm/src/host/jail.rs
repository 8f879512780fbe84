//! What podvmm gives up before it meets a guest, so that a guest that takes it over finds little: a view of the
//! host's files that has no more than the VM needs, at the paths that they have on the host; namespaces of its
//! own; and the capabilities that are left to it.
//!
//! Most steps are such as a host may not be able to do. It is said then, and the next is done; unless the jail
//! is required.

mod label;
mod process;
mod rules;
mod tree;
mod user;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use api::{Access, HostPath};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use thiserror::Error;

pub(crate) use self::label::Label;
pub(crate) use self::user::User;

/// Whether there is a jail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// There is none.
    #[default]
    Off,
    /// As far as the host can make it.
    On,
    /// All of it, or no VM.
    Required,
}

impl Wanted {
    /// The value of the option `--jail`.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        match value {
            "off" => Some(Self::Off),
            "on" => Some(Self::On),
            "required" => Some(Self::Required),
            _ => None,
        }
    }
}

/// A step that the host did not let podvmm do.
#[derive(Debug, Error)]
#[error("--jail: {step}")]
pub(crate) struct JailError {
    step: Step,
    source: io::Error,
}

/// What the jail is made of, in the order in which it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Namespaces,
    Process,
    Files,
    Label,
    Rules,
    User,
    Capabilities,
    Memory,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Namespaces => "make namespaces of its own",
            Self::Process => "see no process of the host",
            Self::Files => "see no files of the host but the VM's",
            Self::Memory => "keep memory out of core dumps and from other processes",
            Self::Label => "have the label that it is given",
            Self::User => "be another user than root",
            Self::Rules => "have Landlock hold it to the VM's files",
            Self::Capabilities => "drop capabilities",
        })
    }
}

/// What podvmm is to give up, of the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Jail {
    pub(crate) wanted: Wanted,
    /// Whom it is to be in it. It stays who it is without.
    pub(crate) user: Option<User>,
    /// What security modules of the host's kernel are to know it by.
    pub(crate) labels: Vec<Label>,
}

impl Jail {
    /// What is given up only in a jail, where there is to be none.
    pub(crate) fn contradiction(&self) -> Option<&'static str> {
        match self {
            Self { wanted, .. } if *wanted != Wanted::Off => None,
            Self { user: Some(_), .. } => Some("--jail-user: it goes with --jail"),
            Self { labels, .. } if !labels.is_empty() => Some("--jail-label: it goes with --jail"),
            Self { .. } => None,
        }
    }
}

/// Enters the jail, in which there is nothing of the host but `paths`. To be called before there are other
/// threads. What it returns in may be another process, the first of a pid namespace, whose outcome this one has
/// then.
pub(crate) fn enter(jail: &Jail, paths: &[HostPath]) -> Result<(), JailError> {
    let Jail {
        wanted,
        user,
        ref labels,
    } = *jail;
    if wanted == Wanted::Off {
        return Ok(());
    }
    let attempt = |step, result: io::Result<()>| match result {
        Ok(()) => Ok(true),
        Err(source) if wanted == Wanted::Required => Err(JailError { step, source }),
        Err(source) => {
            log::warn!("the jail is not whole: {step}: {source}");
            Ok(false)
        }
    };
    let mut all = Vec::new();
    for path in paths.iter().filter_map(found) {
        // What two parts of a VM need, such as a folder of sockets, is shown once.
        if !all.contains(&path) {
            all.push(path);
        }
    }
    let paths = all;
    if attempt(Step::Namespaces, namespaces())? {
        attempt(Step::Process, process::first_of_its_namespace())?;
        // Half of a tree is none to go on in.
        tree::enter(&paths).map_err(|source| JailError {
            step: Step::Files,
            source,
        })?;
    }
    for label in labels {
        attempt(Step::Label, label.take_on(label::ATTRIBUTES.as_ref()))?;
    }
    attempt(Step::Rules, rules::apply(&paths))?;
    let mut is_other = false;
    if let Some(user) = user {
        is_other = attempt(Step::User, user.become_it())?;
    }
    let mut needed = needed(&paths);
    let all = CapabilitySet::DAC_OVERRIDE;
    // Where it cannot be told it does.
    if !needed.contains(all) && user::lacks_rights(&paths).unwrap_or(true) {
        needed |= all;
    }
    if is_other && needed.contains(all) {
        attempt(Step::User, user::ask_for_files_as_root())?;
    }
    attempt(Step::Capabilities, drop_capabilities(needed))?;
    // Another user's memory is kept no longer.
    attempt(Step::Memory, keep_memory())?;
    Ok(())
}

/// The path from the root, or else the folder that what is to be written is made in. None if there is neither:
/// what needs it will say so.
fn found(path: &HostPath) -> Option<HostPath> {
    let absolute = std::path::absolute(&path.path).ok()?;
    if absolute.exists() {
        return Some(HostPath {
            path: absolute,
            access: path.access,
        });
    }
    let folder = absolute.parent().filter(|folder| folder.is_dir())?;
    (path.access == Access::Write && folder != Path::new("/")).then(|| HostPath::write(folder))
}

/// Where the path leads in /proc, if it names a stream of the process's own, as /dev/stderr does.
fn stream(path: &Path) -> Option<PathBuf> {
    let target = std::fs::read_link(path).ok()?;
    target.starts_with("/proc/self").then_some(target)
}

fn namespaces() -> io::Result<()> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    #[expect(
        deprecated,
        reason = "its successor is unsafe because of flags not used here"
    )]
    Ok(rustix::thread::unshare(flags)?)
}

/// No core file has the guest's RAM, and no process but root's reads this one's memory (prctl(2),
/// PR_SET_DUMPABLE).
fn keep_memory() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// What of root's power the VM's files take.
fn needed(paths: &[HostPath]) -> CapabilitySet {
    // Of files, and of places for sockets, it is asked later whether this user has the rights.
    let is_folder = |path: &&HostPath| path.access != Access::Sockets && path.path.is_dir();
    let mut needed = CapabilitySet::empty();
    for folder in paths.iter().filter(is_folder) {
        // Files of a share belong to any user. This one says nothing about descriptors that are made of a
        // file's number (open_by_handle_at(2)): by those, one would leave the share.
        needed |= CapabilitySet::DAC_OVERRIDE;
        if folder.access == Access::Write {
            needed |= CapabilitySet::CHOWN
                | CapabilitySet::FOWNER
                | CapabilitySet::FSETID
                | CapabilitySet::SETFCAP;
        }
    }
    if paths.iter().any(|path| path.path.ends_with("dev/net/tun")) {
        needed |= CapabilitySet::NET_ADMIN;
    }
    needed
}

/// Keeps `needed`, as far as there is any of it, and cannot get others.
fn drop_capabilities(needed: CapabilitySet) -> io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    for capability in CapabilitySet::all().difference(needed).iter() {
        // The kernel may not know it.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let kept = now.permitted & needed;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(rustix::thread::set_no_new_privs(true)?)
}

#[cfg(test)]
mod tests;
