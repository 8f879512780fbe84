//! What devices are called: in `vm.info`, `vm.counters` and snapshots, and by `vm.remove-device`.

use std::collections::BTreeSet;

use super::{ConfigError, PARTS};

pub(super) const DISK: &str = "disk";
pub(super) const NET: &str = "net";
pub(super) const FS: &str = "fs";
/// The name of the one vsock device.
pub(super) const VSOCK: &str = "vsock";

/// Devices that have no configuration with a name in it, and what `vm.counters` has beside devices. Of parts whose
/// names are words of the command line, the only one that is called so as a device is vsock.
const TAKEN: [&str; 4] = ["rng", "console", "mem", "exits"];
/// What threads of vCPUs are called, by which clients know them. A disk's threads are called as the disk.
const VCPU: &str = "vcpu";
const MOST_BYTES: usize = 64;

/// The names that are in use.
pub(super) struct Names(BTreeSet<String>);

impl Names {
    pub(super) fn of<'a>(ids: impl Iterator<Item = &'a str>) -> Self {
        Self(ids.map(String::from).collect())
    }

    /// Gives a device of `kind` a name, if it has none.
    pub(super) fn give(&mut self, id: &mut Option<String>, kind: &str) -> String {
        let free = || {
            let mut names = (0_u64..).map(|number| format!("{kind}{number}"));
            names.find(|name| !self.0.contains(name))
        };
        let name = id.take().or_else(free).expect("numbers do not end");
        self.0.insert(name.clone());
        id.insert(name).clone()
    }
}

/// Whether devices can be called so, side by side.
pub(super) fn check<'a>(ids: impl Iterator<Item = &'a str>) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for id in ids {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=MOST_BYTES).contains(&id.len()) || !id.bytes().all(is_plain) {
            return Err(ConfigError::Id(id.into()));
        }
        let is_part = PARTS.iter().any(|(part, _)| *part == id && id != VSOCK);
        if is_part || TAKEN.contains(&id) || id.starts_with(VCPU) {
            return Err(ConfigError::IdTaken(id.into()));
        }
        if !seen.insert(id) {
            return Err(ConfigError::IdTwice(id.into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Addition, DiskConfig, FsConfig, NetConfig, VmConfig, VsockConfig};
    use crate::error::tests::printed;

    fn disk(id: Option<&str>) -> DiskConfig {
        DiskConfig {
            path: "/d".into(),
            id: id.map(String::from),
            ..DiskConfig::default()
        }
    }

    #[test]
    fn a_device_without_a_name_gets_the_first_that_is_free() {
        let mut vm = VmConfig {
            disks: vec![disk(None), disk(Some("disk1")), disk(None)],
            net: vec![NetConfig::default()],
            fs: vec![FsConfig::default()],
            vsock: Some(VsockConfig::default()),
            ..VmConfig::default()
        };
        vm.name_devices();
        let ids = |vm: &VmConfig| vm.ids().collect::<Vec<_>>().join(" ");
        assert_eq!(ids(&vm), "disk0 disk1 disk2 net0 fs0 vsock");
        assert!(vm.remove("disk1") && !vm.remove("disk1"));
        assert_eq!(ids(&vm), "disk0 disk2 net0 fs0 vsock", "others keep theirs");
        assert_eq!(vm.add(Addition::Disk(disk(None))), "disk1");
        assert_eq!(vm.add(Addition::Disk(disk(Some("data")))), "data");
        assert_eq!(vm.add(Addition::Net(NetConfig::default())), "net1");
        assert_eq!(ids(&vm), "disk0 disk2 disk1 data net0 net1 fs0 vsock");
    }

    #[test]
    fn names_are_short_plain_and_no_others() {
        let refused = |id: &str| printed(&check([id].into_iter()).unwrap_err());
        let long = "x".repeat(65);
        for id in ["", "a b", "a\"", "a\n", "\u{e4}", "../x", &long] {
            assert!(refused(id).ends_with("are possible"), "{id}");
        }
        for id in ["rng", "exits", "vcpu0"] {
            assert!(refused(id).ends_with("another part of podvmm"), "{id}");
        }
        let twice = check(["a", "b", "a"].into_iter()).unwrap_err();
        assert_eq!(printed(&twice), "two devices have the id 'a'");
        check(["a", "_disk0", "vsock", "x.y-z"].into_iter()).unwrap();
    }
}
