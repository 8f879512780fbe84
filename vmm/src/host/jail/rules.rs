//! Landlock (landlock(7)): the kernel holds the process to the VM's files, whatever it has mounted or opened
//! besides.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use api::{Access, HostPath};
use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};

use super::stream;
use crate::host::thread::paths;

/// The oldest Landlock under which a share works: by earlier ones no file could be moved to another folder.
const OLDEST: ABI = ABI::V2;
/// The newest that this knows.
const NEWEST: ABI = ABI::V5;

/// Applies the rules to this thread, and to those it starts; and has those that it starts later take on
/// narrower ones.
pub(super) fn apply(paths: &[HostPath]) -> io::Result<()> {
    // Fails on a kernel that has none, or an older one.
    let required = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    required
        .handle_access(AccessFs::from_all(OLDEST))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(NEWEST));
    let mut ruleset = ruleset
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?
        .no_new_privs(true);
    let never = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let all = AccessFs::from_all(NEWEST) & !never;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let proc = HostPath {
        path: "/proc".into(),
        access: Access::Read,
    };
    for HostPath { path, access } in paths.iter().chain([&proc]) {
        // Landlock has no rules for pipes and sockets without a name, and does not keep one from them.
        if stream(path).is_some() && !has_a_name(path) {
            continue;
        }
        let open = PathFd::new(path).map_err(io::Error::other)?;
        let allowed: BitFlags<AccessFs> = match access {
            Access::Read => read,
            Access::Write => all,
            Access::Sockets => read | AccessFs::MakeSock | AccessFs::RemoveFile,
        };
        let rule = PathBeneath::new(open, allowed);
        ruleset = ruleset.add_rule(rule).map_err(io::Error::other)?;
    }
    let status = ruleset.restrict_self().map_err(io::Error::other)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(io::Error::other("the kernel does not enforce it")),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }?;
    paths::hold(paths::Rules {
        sockets: of_threads(paths.iter().filter(|path| path.access == Access::Sockets))?,
        nothing: of_threads([])?,
    });
    Ok(())
}

/// Rules by which nothing is to be done but to remove what is in `places`.
fn of_threads<'a>(places: impl IntoIterator<Item = &'a HostPath>) -> io::Result<OwnedFd> {
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(NEWEST));
    let mut ruleset = ruleset
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    for HostPath { path, .. } in places {
        let open = PathFd::new(path).map_err(io::Error::other)?;
        let rule = PathBeneath::new(open, AccessFs::RemoveFile);
        ruleset = ruleset.add_rule(rule).map_err(io::Error::other)?;
    }
    let descriptor: Option<OwnedFd> = ruleset.into();
    descriptor.ok_or_else(|| io::Error::other("the kernel has none"))
}

/// Whether what a stream leads to is in a file system.
fn has_a_name(stream: &Path) -> bool {
    fs::metadata(stream).is_ok_and(|file| {
        let kind = file.file_type();
        !kind.is_fifo() && !kind.is_socket()
    })
}
