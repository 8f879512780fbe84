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
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus,
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
    let proc = HostPath::read("/proc".as_ref());
    let status = ruleset(paths.iter().chain([&proc]), allowed)?
        .restrict_self()
        .map_err(io::Error::other)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(io::Error::other("the kernel does not enforce it")),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }?;
    let sockets = paths.iter().filter(|path| path.access == Access::Sockets);
    let is_folder = |path: &&HostPath| path.access != Access::Sockets && path.path.is_dir();
    // By a descriptor's name in /proc a share's file is opened again.
    let folders = paths.iter().filter(is_folder).chain([&proc]);
    paths::hold(paths::Rules {
        folders: descriptor(ruleset(folders, allowed)?)?,
        sockets: descriptor(ruleset(sockets, |_| AccessFs::RemoveFile.into())?)?,
        nothing: descriptor(ruleset([], allowed)?)?,
    });
    Ok(())
}

/// What is to be done with a path of the VM's.
fn allowed(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match access {
        Access::Read => read,
        // A whiteout of an overlay's is a character device of no number; without CAP_MKNOD no other is made.
        Access::Write => AccessFs::from_all(NEWEST) & !(AccessFs::Execute | AccessFs::MakeBlock),
        Access::Sockets => read | AccessFs::MakeSock | AccessFs::RemoveFile,
    }
}

/// Rules by which nothing is done but what is `allowed` with `paths`.
fn ruleset<'a>(
    paths: impl IntoIterator<Item = &'a HostPath>,
    allowed: fn(Access) -> BitFlags<AccessFs>,
) -> io::Result<RulesetCreated> {
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(NEWEST));
    let mut ruleset = ruleset
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?
        .no_new_privs(true);
    for HostPath { path, access } in paths {
        // Landlock has no rules for pipes and sockets without a name, and does not keep one from them.
        if stream(path).is_some() && !has_a_name(path) {
            continue;
        }
        let open = PathFd::new(path).map_err(io::Error::other)?;
        let rule = PathBeneath::new(open, allowed(*access));
        ruleset = ruleset.add_rule(rule).map_err(io::Error::other)?;
    }
    Ok(ruleset)
}

fn descriptor(ruleset: RulesetCreated) -> io::Result<OwnedFd> {
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
