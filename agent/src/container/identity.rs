//! What a process may do: its user, capabilities and limits.

use std::collections::HashMap;
use std::io;

use protocol::agent::oci::{LinuxCapabilities, PosixRlimit, Process, User};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{self as threads, CapabilitySet, CapabilitySets};

type Error = Box<dyn std::error::Error>;

/// Sets how soon the kernel is to kill this process for want of memory. It is done in the guest's
/// mounts: the container's `/proc` need not be one (the class of CVE-2025-52881).
pub(crate) fn set_oom_score(process: &Process) -> io::Result<()> {
    match process.oom_score_adj {
        0 => Ok(()),
        score => std::fs::write("/proc/self/oom_score_adj", score.to_string()),
    }
}

/// Becomes this user, with its groups. Capabilities are kept.
pub(crate) fn become_user(user: &User) -> Result<(), Error> {
    let groups: Vec<_> = user
        .additional_gids
        .iter()
        .map(|gid| rustix::fs::Gid::from_raw(*gid))
        .collect();
    threads::set_thread_groups(&groups)?;
    let gid = rustix::fs::Gid::from_raw(user.gid);
    threads::set_thread_res_gid(gid, gid, gid)?;
    // Or giving up root would be giving up all.
    threads::set_keep_capabilities(true)?;
    let uid = rustix::fs::Uid::from_raw(user.uid);
    threads::set_thread_res_uid(uid, uid, uid)?;
    threads::set_keep_capabilities(false)?;
    Ok(())
}

/// The capabilities of a process.
#[derive(Debug)]
pub(crate) struct Rights {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    inheritable: CapabilitySet,
    permitted: CapabilitySet,
    ambient: CapabilitySet,
}

impl Rights {
    pub(crate) fn parse(named: &LinuxCapabilities) -> Result<Self, Error> {
        let known: HashMap<_, _> = CapabilitySet::all().iter_names().collect();
        let set = |names: &[String]| -> Result<CapabilitySet, Error> {
            let mut set = CapabilitySet::empty();
            for name in names {
                let upper = name.to_uppercase();
                let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
                set |= *known
                    .get(short)
                    .ok_or_else(|| format!("there is no capability {name}"))?;
            }
            Ok(set)
        };
        Ok(Self {
            bounding: set(&named.bounding)?,
            effective: set(&named.effective)?,
            inheritable: set(&named.inheritable)?,
            permitted: set(&named.permitted)?,
            ambient: set(&named.ambient)?,
        })
    }

    /// Has no program of this process gain more than the bounding set.
    pub(crate) fn bound(&self) {
        for capability in self.bounding.complement().iter() {
            // Those the kernel does not know cannot be had either.
            let _ = threads::remove_capability_from_bounding_set(capability);
        }
    }

    /// Has these, and no others any more.
    pub(crate) fn set(&self) -> Result<(), Error> {
        threads::set_capabilities(
            None,
            CapabilitySets {
                effective: self.effective,
                permitted: self.permitted,
                inheritable: self.inheritable,
            },
        )?;
        threads::clear_ambient_capability_set()?;
        for capability in self.raised().iter() {
            threads::configure_capability_in_ambient_set(capability, true)?;
        }
        Ok(())
    }

    /// The ambient capabilities, as far as the kernel allows them (capabilities(7)). The others are
    /// left out, as runc does it: what `runc spec` writes has some.
    fn raised(&self) -> CapabilitySet {
        self.ambient & self.permitted & self.inheritable
    }
}

/// Sets a limit by its name.
pub(crate) fn set_limit(limit: &PosixRlimit) -> Result<(), Error> {
    let resource = match limit.r#type.as_str() {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        other => return Err(format!("there is no limit {other}").into()),
    };
    let bytes = |value: u64| (value != u64::MAX).then_some(value);
    let rlimit = Rlimit {
        current: bytes(limit.soft),
        maximum: bytes(limit.hard),
    };
    rustix::process::setrlimit(resource, rlimit)
        .map_err(|errno| io::Error::other(format!("{}: {errno}", limit.r#type)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_known_by_name() {
        let named = LinuxCapabilities {
            bounding: vec!["CAP_CHOWN".into(), "cap_sys_admin".into()],
            ..LinuxCapabilities::default()
        };
        let sets = Rights::parse(&named).unwrap();
        assert_eq!(
            sets.bounding,
            CapabilitySet::CHOWN | CapabilitySet::SYS_ADMIN
        );
        let named = LinuxCapabilities {
            ambient: vec!["CAP_FLY".into()],
            ..LinuxCapabilities::default()
        };
        let refused = Rights::parse(&named).err().unwrap();
        assert_eq!(refused.to_string(), "there is no capability CAP_FLY");
    }

    #[test]
    fn ambient_capabilities_are_permitted_and_inheritable_ones() {
        let named = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let sets = Rights::parse(&LinuxCapabilities {
            permitted: named(&["CAP_CHOWN", "CAP_KILL"]),
            inheritable: named(&["CAP_KILL", "CAP_FOWNER"]),
            ambient: named(&["CAP_CHOWN", "CAP_KILL", "CAP_FOWNER"]),
            ..LinuxCapabilities::default()
        });
        assert_eq!(sets.unwrap().raised(), CapabilitySet::KILL);
    }
}
