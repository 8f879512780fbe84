//! Takes away what a pod has on the host. The pod's shim does this at the end of its pod, or
//! another shim that containerd starts when the first is gone. Each step is done even if others
//! failed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::host::network;
use crate::host::place::{self, Place};
use crate::host::process::Process;
use crate::host::record::Record;
use crate::pod::{cgroup, mounts};

/// How long a VMM that was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes away all of a pod. Its socket goes as well, so that no client connects any more.
pub(crate) fn pod(place: &Place) {
    let record = Record::read(place);
    vm(place, &record);
    // Before the record: if this shim ends here, another one knows what is left.
    cgroup::remove(&record.cgroups);
    for file in [place.record(), place.shim()] {
        // The shim that made them may have taken them away.
        let _ = fs::remove_file(file);
    }
    complain(place.path(), fs::remove_dir(place.path()));
    // Others have theirs beside it.
    let above = place.path().ancestors().skip(1);
    let above = above.take_while(|folder| folder.starts_with(place::ROOT));
    above.for_each(|folder| drop(fs::remove_dir(folder)));
    // systemd ends what is in it still.
    record.scope.as_deref().into_iter().for_each(cgroup::stop);
}

/// The pod's VM and what was made for it, so that another can take its place.
pub(crate) fn vm(place: &Place, record: &Record) {
    complain(&place.api(), kill(record));
    if let Some(path) = &record.network {
        disconnect(path);
    }
    complain(&place.shared(), mounts::clear(&place.shared()));
    for socket in [place.api(), place.vsock()] {
        // podvmm takes them away itself, unless it was killed.
        let _ = fs::remove_file(socket);
    }
    complain(&place.vm(), fs::remove_dir(place.vm()));
}

/// The VMM, if it lives, and waits for its end.
fn kill(record: &Record) -> std::io::Result<()> {
    let Some(pid) = record.living_vmm() else {
        return Ok(());
    };
    let process = Process::open(pid)?;
    // It may have ended, and its number gone to another, before it was opened.
    if record.living_vmm() == Some(pid) {
        process.kill();
        process.await_end(PATIENCE)?;
    }
    Ok(())
}

/// One container of a pod whose shim is gone.
pub(crate) fn container(place: &Place, id: &str) {
    // Its places go with the pod's.
    let folder = place.shared().join(id);
    complain(&folder, mounts::unmount_below(&folder));
}

/// Disconnects the interfaces of a network namespace that the shim did not make.
fn disconnect(path: &Path) {
    // Often it is gone with its pod.
    if !path.exists() {
        return;
    }
    if let Err(error) = network::within(path, network::disconnect) {
        log::debug!("{}", api::chain(&error).join(": "));
    }
}

fn complain(what: &Path, result: std::io::Result<()>) {
    if let Err(error) = result
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("clean up {}: {error}", what.display());
    }
}
