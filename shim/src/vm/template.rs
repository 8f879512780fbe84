//! Templates: snapshots of VMs taken as soon as their agents answered, from which later pods are restored instead
//! of booting.
//!
//! A template is a snapshot in a folder of its own, named after what it was made of: the guest's
//! files, podvmm, the configuration, and the host since it was booted. A pod's VM that has to boot
//! anyway is snapshotted on the way, before anything of the pod is in it. Whatever is wrong with a
//! template, the pod boots. What its failure means for later pods is decided in [`failures`].
//!
//! There is one for each size that is a power of two of memory, besides what the guest itself needs;
//! pods in between are made larger afterwards.

mod failures;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, Size};
use crate::host::place::{fnv1a, make_private};
use crate::vm::{self, Vm};
use failures::{Failures, MAX_FAILURES};

/// The least memory of a pod that has a template, in MiB.
const LEAST_MIB: u64 = 16;
const MOST_MIB: u64 = 4096;
/// What a folder was made of.
const INPUTS: &str = "inputs.json";
/// What the names of files of RAM begin with.
const MEMORY: &str = "memory";
/// The folder, in a template's, where its snapshot is made.
const MAKING: &str = "making";
/// What a snapshot is not without.
const STATE: &str = "state.json";
/// The time between looks for a template that another shim is making.
const PAUSE: Duration = Duration::from_millis(200);

/// How the VM of a pod that has a template starts.
#[derive(Debug)]
pub(crate) enum Way {
    /// The VM is restored from the snapshot.
    Clone(Stamp),
    /// The VM boots, to make the snapshot on the way.
    Model(Claim),
    /// The VM boots, because there is no snapshot and this shim does not make one.
    Boot,
}

/// A snapshot to restore pods from, whether it is there already or not.
#[derive(Debug)]
pub(crate) struct Template {
    folder: PathBuf,
    /// The size of the VM that the template is a snapshot of.
    pub(crate) size: Size,
    inputs: Inputs,
}

impl PartialEq for Template {
    fn eq(&self, other: &Self) -> bool {
        self.folder == other.folder && self.inputs == other.inputs
    }
}

/// All that a template depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Inputs {
    /// The identifier of the host's boot: its kernel, its KVM and its CPU are the same since.
    host: String,
    shim: String,
    files: Vec<Stamp>,
    /// What all VMs of the size have in common.
    vm: Value,
    /// How many network interfaces the VM has, whatever their addresses are to be.
    interfaces: usize,
}

/// A file as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    path: PathBuf,
    inode: u64,
    len: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            path: path.into(),
            inode: metadata.ino(),
            len: metadata.len(),
            changed_s: metadata.ctime(),
            changed_ns: metadata.ctime_nsec(),
        })
    }

    /// The stamp of the program that runs.
    pub(crate) fn of_program() -> io::Result<Self> {
        Self::of(&std::env::current_exe()?)
    }

    pub(crate) fn holds(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

impl Template {
    /// The one for VMs of `size` with so many network interfaces. None if there is not to be one.
    pub(crate) fn of(config: &Config, size: Size, interfaces: usize) -> Option<Self> {
        let templates = config.templates.as_ref()?;
        let overhead = u64::from(config.guest_overhead_mib);
        let limits = size.memory_mib.checked_sub(overhead)?;
        if limits < LEAST_MIB {
            return None;
        }
        let memory_mib = overhead + (1 << limits.min(MOST_MIB).ilog2());
        let size = Size {
            vcpus: 1,
            memory_mib: memory_mib.next_multiple_of(2),
        };
        let inputs = Inputs::of(config, size, interfaces)
            .inspect_err(|error| log::warn!("there can be no template: {error}"))
            .ok()?;
        let name = format!("{}M-{:08x}", size.memory_mib, fnv1a(&inputs.text()));
        Some(Self {
            folder: templates.join(name),
            size,
            inputs,
        })
    }

    /// The template for a pod: as [`Self::of`], but `None` also while its snapshot is set aside and
    /// it is too early for another.
    pub(crate) fn for_pod(config: &Config, size: Size, interfaces: usize) -> Option<Self> {
        let template = Self::of(config, size, interfaces)?;
        let failures = template.failures();
        let pause = failures.pause();
        if template.is_ready() || pause.is_zero() {
            return Some(template);
        }
        log::warn!(
            "template {} is set aside and not made anew for another {} s: {}",
            template.folder.display(),
            pause.as_secs() + 1,
            failures.reason().unwrap_or_default()
        );
        None
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// How many network interfaces the guest has.
    pub(crate) fn interfaces(&self) -> usize {
        self.inputs.interfaces
    }

    /// The snapshot that pods can be restored from, unless there is none or it is set aside.
    pub(crate) fn snapshot(&self) -> Option<Stamp> {
        if inputs_in(&self.folder).as_ref() != Some(&self.inputs) {
            return None;
        }
        let snapshot = Stamp::of(&self.folder.join(STATE)).ok()?;
        let is_aside = self.failures().sets_aside(&snapshot);
        (!is_aside).then_some(snapshot)
    }

    /// Whether pods can be restored from it.
    pub(crate) fn is_ready(&self) -> bool {
        self.snapshot().is_some()
    }

    fn failures(&self) -> Failures {
        Failures::read(&self.folder)
    }

    /// Waits until another shim has made it, as long as `still` says and no longer than `patience`.
    /// Returns whether it is there then.
    pub(crate) fn await_made(&self, patience: Duration, still: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + patience;
        while !self.is_ready() {
            if Instant::now() > deadline || !still() {
                return false;
            }
            thread::sleep(PAUSE);
        }
        true
    }

    /// How a pod starts, now that no snapshot may be there: what is being made is waited for, no longer than
    /// `patience`. Many that boot at once take each other's processors, and each takes memory of its own.
    pub(crate) fn way(&self, patience: Duration) -> Way {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(snapshot) = self.snapshot() {
                return Way::Clone(snapshot);
            }
            match self.claim() {
                Some(claim) => return Way::Model(claim),
                None if self.is_being_made() && Instant::now() < deadline => thread::sleep(PAUSE),
                // It may have been made at this moment.
                None => return self.snapshot().map_or(Way::Boot, Way::Clone),
            }
        }
    }

    /// Whether another shim has the right to make it.
    fn is_being_made(&self) -> bool {
        let Ok(file) = File::open(self.folder.join(INPUTS)) else {
            return false;
        };
        // Shared, so that those who look do not keep each other from it.
        let locked = flock(&file, FlockOperation::NonBlockingLockShared);
        locked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The right to make it. None if another shim has that right, if it is there already, if it
    /// cannot be made, or if it is too early after other snapshots of it were set aside.
    pub(crate) fn claim(&self) -> Option<Claim> {
        let claim = || {
            make_private(&self.folder)?;
            let lock = self.lock()?;
            if inputs_in(&self.folder).as_ref() != Some(&self.inputs) {
                // The failures in the folder are those of what was made of other inputs.
                Failures::forget(&self.folder)?;
            }
            let failures = self.failures();
            if self.is_ready() || !failures.pause().is_zero() {
                // If another shim has made it meanwhile, making it again would take it away from
                // the pods that start from it.
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if let Some(why) = failures.reason() {
                let folder = self.folder.display();
                log::info!("template {folder} is made anew, for its clones failed: {why}");
            }
            // What was made of other things is none from here on.
            self.remove_snapshot()?;
            fs::write(self.folder.join(INPUTS), self.inputs.text())?;
            // Of one that was not finished.
            let making = self.folder.join(MAKING);
            match fs::remove_dir_all(&making) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => make_private(&making)?,
            }
            Ok(lock)
        };
        let claimed: io::Result<File> = claim();
        match claimed {
            Ok(file) => Some(Claim {
                folder: self.folder.clone(),
                _lock: file,
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                log::warn!("make template {}: {error}", self.folder.display());
                None
            }
        }
    }

    /// Takes the lock by which only one shim at a time makes a template.
    fn lock(&self) -> io::Result<File> {
        let mut options = File::options();
        let options = options.create(true).write(true).truncate(false);
        let file = options.open(self.folder.join(INPUTS))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    }

    fn remove_snapshot(&self) -> io::Result<()> {
        match fs::remove_file(self.folder.join(STATE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A clone of `snapshot` did not become a pod's guest.
    pub(crate) fn failed(&self, snapshot: &Stamp, why: &str) {
        let folder = self.folder.display();
        if let Err(error) = Failures::add(&self.folder, snapshot, why) {
            // As on a full disk. What cannot be counted must not cost each pod an attempt.
            log::warn!("template {folder} is removed, for its failure cannot be counted: {error}");
            if let Err(error) = self.remove_snapshot() {
                log::warn!("remove template {folder}: {error}");
            }
            return;
        }
        let failures = self.failures();
        match failures.count(snapshot) {
            count if count < MAX_FAILURES => {
                log::warn!(
                    "failure {count} in a row of template {folder}, of at most {MAX_FAILURES}"
                );
            }
            count => {
                let pause = failures.pause().as_secs();
                log::warn!(
                    "template {folder} is set aside after {count} failures in a row; the next \
                     VM to boot in {pause} s or later makes it anew"
                );
            }
        }
    }

    /// A clone of it became a pod's guest.
    pub(crate) fn worked(&self) {
        let folder = self.folder.display();
        match Failures::forget(&self.folder) {
            Ok(true) => log::info!("template {folder} works: its failures are forgotten"),
            Ok(false) => {}
            Err(error) => log::warn!("forget the failures of template {folder}: {error}"),
        }
    }

    /// Removes a snapshot that is set aside, so that another can be made at once.
    pub(crate) fn start_over(&self) {
        let failures = self.failures();
        let Some(why) = failures.reason().filter(|_| !self.is_ready()) else {
            return;
        };
        let folder = self.folder.display();
        let remove = || {
            let _lock = self.lock()?;
            // Looked at again, now that no other process can be making one.
            if !self.is_ready() {
                log::warn!("template {folder} was set aside and is made anew: {why}");
                self.remove_snapshot()?;
                Failures::forget(&self.folder)?;
            }
            Ok(())
        };
        let removed: io::Result<()> = remove();
        if let Err(error) = removed {
            log::warn!("remove template {folder}: {error}");
        }
    }
}

/// The right to make a template, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    folder: PathBuf,
    _lock: File,
}

impl Claim {
    /// Where podvmm writes the snapshot. It keeps the right to write there for as long as it lives, so what is
    /// there does not stay.
    pub(crate) fn making(&self) -> PathBuf {
        self.folder.join(MAKING)
    }

    /// Makes the template of a VM whose agent has answered and to which no client is connected. The
    /// VM is left to itself for the time `settling` first, and goes on afterwards. Work that its
    /// guest has not done when the snapshot is taken, each clone has to do: Linux ends connections,
    /// and reports free memory two seconds later.
    pub(crate) fn make(&self, vm: &Vm, settling: Duration) -> Result<(), vm::Error> {
        thread::sleep(settling);
        let made = self.making();
        vm.snapshot(&made)?;
        adopt(&made, &self.folder).map_err(vm::Error::Template)?;
        if let Some(templates) = self.folder.parent() {
            remove_stale(templates);
        }
        Ok(())
    }
}

impl Inputs {
    fn of(config: &Config, size: Size, interfaces: usize) -> io::Result<Self> {
        let podvmm = which(&config.podvmm);
        let files = [
            Some(&config.kernel),
            config.initramfs.as_ref(),
            config.image.as_ref(),
        ];
        let files = files.into_iter().flatten().chain([&podvmm]);
        Ok(Self {
            host: fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
            shim: env!("CARGO_PKG_VERSION").into(),
            files: files
                .map(|file| Stamp::of(file))
                .collect::<Result<_, _>>()?,
            vm: vm::definition(config, size)
                .map_err(io::Error::other)?
                .json(),
            interfaces,
        })
    }

    fn text(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("paths and numbers are JSON")
    }

    /// Whether a shim could still ask for what was made of these inputs.
    fn hold(&self, host: &str) -> bool {
        self.host == host && self.files.iter().all(Stamp::holds)
    }
}

fn inputs_in(folder: &Path) -> Option<Inputs> {
    let text = fs::read(folder.join(INPUTS)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Moves the snapshot in `made` to `folder`, in place of the one there. Its state comes last, for without it
/// there is none.
fn adopt(made: &Path, folder: &Path) -> io::Result<()> {
    let names = |folder: &Path| -> io::Result<Vec<_>> {
        let entries = fs::read_dir(folder)?;
        entries.map(|entry| Ok(entry?.file_name())).collect()
    };
    let new = names(made)?;
    for old in names(folder)? {
        // Clones have it open.
        if old.as_encoded_bytes().starts_with(MEMORY.as_bytes()) && !new.contains(&old) {
            fs::remove_file(folder.join(old))?;
        }
    }
    let (state, others): (Vec<_>, Vec<_>) = new.into_iter().partition(|name| name == STATE);
    for name in others.into_iter().chain(state) {
        fs::rename(made.join(&name), folder.join(&name))?;
    }
    fs::remove_dir(made)
}

/// Where a program is found, as a shell would.
fn which(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file());
    found.unwrap_or_else(|| program.into())
}

/// Removes templates that nothing will be made of any more. Pods that were go on: their memory is a
/// file of no name.
fn remove_stale(templates: &Path) {
    let Ok(host) = fs::read_to_string("/proc/sys/kernel/random/boot_id") else {
        return;
    };
    for entry in fs::read_dir(templates).into_iter().flatten().flatten() {
        let folder = entry.path();
        if let Some(inputs) = inputs_in(&folder)
            && !inputs.hold(&host)
        {
            log::info!("remove stale template {}", folder.display());
            if let Err(error) = fs::remove_dir_all(&folder) {
                log::warn!("remove {}: {error}", folder.display());
            }
        }
    }
}

#[cfg(test)]
mod tests;
