//! What would outlive the shim, kept in a file for the process that cleans up after it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::place::Place;

/// What of a pod would outlive the shim. The file is written anew with each thing that is made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Record {
    /// The VMM, and when it was started, in ticks since the host's start.
    pub(crate) vmm: Option<(u32, u64)>,
    /// The network namespace whose interfaces are connected to the VM's.
    pub(crate) network: Option<PathBuf>,
    /// Cgroups that were made, the parent first.
    pub(crate) cgroups: Vec<PathBuf>,
    /// The scope of systemd's that was started.
    pub(crate) scope: Option<String>,
}

impl Record {
    /// Reads a pod's record; it is empty if there is none that makes sense.
    pub(crate) fn read(place: &Place) -> Self {
        let text = fs::read(place.record()).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(crate) fn write(&self, place: &Place) -> io::Result<()> {
        let new = place.record().with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, place.record())
    }

    /// The VMM, if it is that process still.
    pub(crate) fn living_vmm(&self) -> Option<u32> {
        let (pid, started) = self.vmm?;
        (start_of(pid) == Some(started)).then_some(pid)
    }
}

/// When a process was started, in ticks since the host's start (proc_pid_stat(5), field 22).
pub(crate) fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name may have spaces and brackets.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::at(folder.path());
        let me = std::process::id();
        let record = Record {
            vmm: Some((me, start_of(me).unwrap())),
            network: Some("/run/netns/x".into()),
            cgroups: vec!["/sys/fs/cgroup/a".into()],
            scope: Some("cri-containerd-a.scope".into()),
        };
        record.write(&place).unwrap();
        assert_eq!(Record::read(&place), record);
        assert_eq!(record.living_vmm(), Some(me));
        fs::write(place.record(), "{").unwrap();
        assert_eq!(Record::read(&place), Record::default());
    }

    #[test]
    fn another_process_of_the_number_is_not_the_vmm() {
        let record = Record {
            vmm: Some((std::process::id(), 1)),
            ..Record::default()
        };
        assert_eq!(record.living_vmm(), None);
    }
}
