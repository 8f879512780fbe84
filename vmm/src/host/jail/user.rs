//! Which user the process is, and which it is for the host's files.
//!
//! A user of its own, that no other process has, is not trusted by what looks at a process's user: daemons asked
//! over a socket, the kernel's settings, signals. Files are another matter. What is shared with a guest belongs
//! to any user, so podvmm keeps capabilities over them, and then its user says no more about what it may open;
//! but a server of files elsewhere (NFS) goes by the user alone, and files that it makes should be root's as
//! before. So a process with such capabilities asks for files as root (setfsuid(2)), and is root in nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use api::{Access, HostPath};
use devices::host::user_of_files;
use rustix::fs::{AtFlags, CWD, accessat};
use rustix::process::{Gid, Uid, parent_process_death_signal, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, set_capabilities,
    set_capabilities_secure_bits, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::stream;

/// The user that podvmm is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    user: u32,
    group: u32,
}

impl User {
    /// The value of the option `--jail-user`: a user, and the group if its number is another.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (user, group) = value.split_once(':').unwrap_or((value, value));
        let (user, group) = (user.parse().ok()?, group.parse().ok()?);
        // The last number stands for none (setresuid(2)).
        let is_one = |id: u32| id != 0 && id != u32::MAX;
        (is_one(user) && is_one(group)).then_some(Self { user, group })
    }

    /// Becomes this user, with the capabilities that the process has, for good.
    pub(super) fn become_it(self) -> io::Result<()> {
        let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED;
        set_capabilities_secure_bits(bits)?;
        let group = group_of_kvm();
        keeping_death_signal(|| {
            set_thread_groups(group.as_slice())?;
            let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.group));
            set_thread_res_gid(group, group, group)?;
            Ok(set_thread_res_uid(user, user, user)?)
        })
    }
}

/// The group for which a host has /dev/kvm, unless it is root's.
fn group_of_kvm() -> Option<Gid> {
    const READ_AND_WRITE: u32 = 0o060;
    let kvm = fs::metadata("/dev/kvm").ok()?;
    let has_one = kvm.mode() & READ_AND_WRITE == READ_AND_WRITE && kvm.gid() != 0;
    has_one.then(|| Gid::from_raw(kvm.gid()))
}

/// Asks for files as root from here on, in this thread and those that it starts. What it may do to them is up to
/// its capabilities.
pub(super) fn ask_for_files_as_root() -> io::Result<()> {
    keeping_death_signal(|| {
        // SAFETY: it changes a number of this thread's.
        unsafe { libc::setfsuid(0) };
        // SAFETY: as above.
        unsafe { libc::setfsgid(0) };
        // They say nothing of a failure.
        match user_of_files() {
            (0, 0) => Ok(()),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    })
}

/// Does what has the kernel forget which signal the process gets when its parent ends
/// (prctl(2), PR_SET_PDEATHSIG).
fn keeping_death_signal(act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let signal = parent_process_death_signal()?;
    act()?;
    match signal {
        Some(_) => Ok(set_parent_process_death_signal(signal)?),
        None => Ok(()),
    }
}

/// Whether the process would need a capability for any of the files and for places of sockets, because they are
/// another user's.
pub(super) fn lacks_rights(paths: &[HostPath]) -> io::Result<bool> {
    let now = capabilities(None)?;
    // No more than what the next steps take.
    let some = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::SETPCAP;
    let without = CapabilitySets {
        effective: now.effective & some,
        ..now
    };
    set_capabilities(None, without)?;
    let lacks = paths.iter().any(|HostPath { path, access }| {
        let wanted = match access {
            Access::Read => rustix::fs::Access::READ_OK,
            Access::Write => rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK,
            Access::Sockets => rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
        };
        stream(path).is_none() && is_denied(path, wanted)
    });
    set_capabilities(None, now)?;
    Ok(lacks)
}

fn is_denied(path: &Path, wanted: rustix::fs::Access) -> bool {
    let access = accessat(CWD, path, wanted, AtFlags::EACCESS);
    access == Err(rustix::io::Errno::ACCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_none_that_others_are() {
        let (user, group) = (7, 8);
        assert_eq!(User::parse("7:8"), Some(User { user, group }));
        assert_eq!(User::parse("7"), User::parse("7:7"));
        for refused in [
            "",
            "0",
            "7:0",
            "0:7",
            "4294967295",
            "-1",
            "kvm",
            "7:",
            "7:8:9",
        ] {
            assert_eq!(User::parse(refused), None, "{refused}");
        }
    }
}
