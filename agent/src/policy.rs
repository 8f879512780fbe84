//! What the agent obeys: the policy that came with the guest at its boot, asked about each call and about what a
//! container is to have. Who may speak to the agent may ask for no other one.

use std::io;

use protocol::agent::messages::Storage;
use protocol::agent::oci::{Linux, Spec};
use protocol::contract::POLICY_PATH;
use protocol::policy::{Forbidden, ParseError, Policy};
use protocol::ttrpc::{Call, Code, Status};

use crate::container::{cgroup, mount_kind};
use crate::{describe, storage, sys};

/// The method by which a host may ask Kata's agent for another policy.
const SET_POLICY: &str = "SetPolicy";

/// Why there is none to obey. A guest with such a policy has no pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read {POLICY_PATH}")]
    Read(#[source] io::Error),
    #[error("{POLICY_PATH} is not text")]
    Text,
    #[error("{POLICY_PATH}")]
    Parse(#[source] ParseError),
}

/// The policy of this guest. None is all that is asked.
#[derive(Debug, Default)]
pub(crate) struct Rules(Option<Policy>);

impl Rules {
    /// Reads what came with the guest, before another root file system is entered.
    pub(crate) fn read() -> Result<Self, Error> {
        match sys::read_file(POLICY_PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self(None)),
            Err(error) => Err(Error::Read(error)),
            Ok(bytes) => {
                let text = String::from_utf8(bytes).map_err(|_| Error::Text)?;
                text.parse().map(Self::of).map_err(Error::Parse)
            }
        }
    }

    fn of(policy: Policy) -> Self {
        Self(Some(policy))
    }

    /// By which extra feature the host knows it.
    pub(crate) fn feature(&self) -> Option<String> {
        self.0.as_ref().map(Policy::feature)
    }

    /// Whether places to mount from and on are to be found without following a link: a host that may mount
    /// only what is below a folder could have put one there.
    pub(crate) fn follows_no_links(&self) -> bool {
        let mounts = self.0.as_ref().map(|policy| &policy.mounts);
        mounts.is_some_and(Option::is_some)
    }

    /// Whether the call is to be answered.
    pub(crate) fn allow(&self, call: &Call<'_>) -> Result<(), Status> {
        match (&self.0, call.method) {
            (Some(_), SET_POLICY) => {
                let why = "the policy of this node is fixed, and no other can be set";
                Err(Status::new(Code::PermissionDenied, why))
            }
            // As the Kata agent says that is built without policies.
            (None, SET_POLICY) => {
                let why = format!("/{}/{SET_POLICY} is not supported", call.service);
                Err(Status::new(Code::NotFound, why))
            }
            (Some(policy), method) => policy.allow_call(method).map_err(denied),
            (None, _) => Ok(()),
        }
    }

    /// Whether the container may have its devices and mounts. Of devices the numbers are the guest's by now.
    pub(crate) fn allow_container(&self, spec: &Spec) -> Result<(), Status> {
        let Some(policy) = &self.0 else {
            return Ok(());
        };
        let Linux {
            resources, devices, ..
        } = spec.linux.clone().unwrap_or_default();
        let used = cgroup::used(resources.as_ref(), &devices);
        let used = used.map_err(|error| Status::new(Code::InvalidArgument, describe(&error)))?;
        for (kind, numbers) in used {
            policy.allow_device(kind, numbers).map_err(denied)?;
        }
        let root = spec.root.iter().map(|root| ("bind", root.path.as_str()));
        let mounts = spec.mounts.iter();
        let mounts = mounts.map(|mount| (mount_kind(mount), mount.source.as_str()));
        for (kind, source) in root.chain(mounts) {
            policy.allow_mount(kind, source).map_err(denied)?;
        }
        Ok(())
    }

    /// Whether these may be mounted for containers.
    pub(crate) fn allow_storages(&self, storages: &[Storage]) -> Result<(), Status> {
        let Some(policy) = &self.0 else {
            return Ok(());
        };
        storages.iter().try_for_each(|storage| {
            let kind = storage::kind(storage);
            policy.allow_mount(kind, &storage.source).map_err(denied)
        })
    }
}

fn denied(forbidden: Forbidden) -> Status {
    Status::new(Code::PermissionDenied, forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::agent::oci::{LinuxDevice, LinuxDeviceCgroup, LinuxResources, Mount, Root};

    fn rules(parts: &str) -> Rules {
        Rules::of(format!("podvmm policy 1\n{parts}").parse().unwrap())
    }

    fn spec() -> Spec {
        let closed = LinuxDeviceCgroup {
            major: -1,
            minor: -1,
            ..LinuxDeviceCgroup::default()
        };
        Spec {
            root: Some(Root {
                path: "/run/shared/c/rootfs".into(),
                readonly: false,
            }),
            mounts: vec![Mount {
                r#type: "proc".into(),
                source: "proc".into(),
                ..Mount::default()
            }],
            linux: Some(Linux {
                resources: Some(LinuxResources {
                    devices: vec![closed],
                    ..LinuxResources::default()
                }),
                ..Linux::default()
            }),
            ..Spec::default()
        }
    }

    fn refused(result: Result<(), Status>) -> String {
        let status = result.unwrap_err();
        assert_eq!(status.code, Code::PermissionDenied);
        status.message
    }

    #[test]
    fn without_a_policy_all_is_allowed() {
        let open = Rules::default();
        open.allow_container(&Spec::default()).unwrap();
        open.allow_storages(&[Storage::default()]).unwrap();
        assert_eq!((open.feature(), open.follows_no_links()), (None, false));
        let calls_alone = rules("calls:\n CreateContainer\n");
        calls_alone.allow_container(&Spec::default()).unwrap();
        assert!(!calls_alone.follows_no_links());
    }

    #[test]
    fn a_containers_devices_are_those_allowed() {
        let closed = rules("devices:\n");
        closed.allow_container(&spec()).unwrap();
        // Without rules a container may use all devices.
        let said = refused(closed.allow_container(&Spec::default()));
        assert!(said.contains("forbids device c *:*"), "{said}");
        let mut with_fuse = spec();
        with_fuse.linux.as_mut().unwrap().devices = vec![LinuxDevice {
            path: "/dev/fuse".into(),
            r#type: "c".into(),
            major: 10,
            minor: 229,
            ..LinuxDevice::default()
        }];
        let said = refused(closed.allow_container(&with_fuse));
        let expected =
            "the node's policy forbids device c 10:229: its rules for devices do not allow it";
        assert_eq!(said, expected);
        rules("devices:\n c 10:229\n")
            .allow_container(&with_fuse)
            .unwrap();
    }

    #[test]
    fn a_containers_mounts_are_those_allowed() {
        let shared = rules("mounts:\n bind /run/shared/\n proc\n");
        assert!(shared.follows_no_links());
        shared.allow_container(&spec()).unwrap();
        let mut away = spec();
        away.root.as_mut().unwrap().path = "/".into();
        let said = refused(shared.allow_container(&away));
        assert!(said.contains("forbids mount bind of \"/\""), "{said}");
        // It is a bind whatever type it says it is of.
        let mut disguised = spec();
        disguised.mounts[0].source = "/sys".into();
        disguised.mounts[0].options = vec!["nosuid".into(), "rbind".into()];
        let said = refused(shared.allow_container(&disguised));
        assert!(said.contains("forbids mount bind of \"/sys\""), "{said}");
        let storage = |driver: &str, fstype: &str| Storage {
            driver: driver.into(),
            fstype: fstype.into(),
            source: "/run/shared/data".into(),
            ..Storage::default()
        };
        shared
            .allow_storages(&[storage("virtio-fs", "bind")])
            .unwrap();
        let said = refused(shared.allow_storages(&[storage("virtio-fs", "ext4")]));
        assert!(said.contains("forbids mount ext4 of"), "{said}");
        let said = refused(shared.allow_storages(&[storage("local", "ext4")]));
        assert!(said.contains("forbids mount local of"), "{said}");
    }
}
