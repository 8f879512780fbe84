//! Writes a paused machine down.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::VmConfig;
use arch::state::{BoardState, MsrIndices, StateError, VcpuState};
use kvm_ioctls::Kvm;
use rustix::fs::{AtFlags, CWD, FlockOperation, flock, linkat};
use rustix::rand::GetRandomFlags;
use serde_json::Value;
use thiserror::Error;

use super::{COMPRESSED, CONFIG, ID, LayerState, MEMORY, Memory, STATE, State, WORKING_SET};
use super::{allowed, format};
use crate::host::KvmKind;
use crate::machine::{Machine, Source};
use crate::memory::Layer;

/// More files that lie over one another are not worth their mappings.
const MOST_LAYERS: usize = 8;

/// Why there is no snapshot.
#[derive(Debug, Error)]
pub(crate) enum SaveError {
    #[error("the streams of the agent's command cannot be taken along")]
    Command,
    #[error("share '{0}' is served by another process, which knows what its guest has open")]
    Share(String),
    #[error("another podvmm writes a snapshot to {}", .0.display())]
    Busy(PathBuf),
    #[error("{act} {}", .path.display())]
    File {
        act: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("read the state of the VM")]
    Board(#[source] StateError),
    #[error("read the state of vCPU {index}")]
    Vcpu { index: u8, source: StateError },
    #[error("vCPU {0} is gone")]
    NoVcpu(u8),
    #[error("open /dev/kvm")]
    Kvm(#[source] kvm_ioctls::Error),
    #[error("write the state down")]
    Encode(#[source] serde_json::Error),
}

/// Makes a [`SaveError::File`] of what failed. For `map_err`.
fn failed(act: &'static str, path: &Path) -> impl Fn(io::Error) -> SaveError {
    move |source| SaveError::File {
        act,
        path: path.into(),
        source,
    }
}

/// Writes `machine`, which is paused, to `folder`. Whatever goes wrong: an older snapshot there
/// stays, and nothing else does. After an incremental one RAM is mapped from what was written, and so
/// it is if it came from another process before.
pub(crate) fn save(
    machine: &mut Machine,
    config: &VmConfig,
    folder: &Path,
    incremental: bool,
) -> Result<(), SaveError> {
    if let Some(share) = config.fs.iter().find(|share| share.socket.is_some()) {
        return Err(SaveError::Share(share.tag.clone()));
    }
    if machine.button.is_some() {
        return Err(SaveError::Command);
    }
    let mut draft = Draft::new(folder)?;
    let devices = machine.device_states();
    let allowed = allowed(&config.memory, &devices).expect("the device is of this VM");
    let layers = draft.memory(machine, &allowed, incremental)?;
    let mut config = config.json();
    config[ID] = draft.id.as_str().into();
    let state = State {
        id: draft.id.clone(),
        kvm: KvmKind::of_this_host().name().into(),
        features: machine.features.clone(),
        board: BoardState::save(&machine.vm).map_err(SaveError::Board)?,
        vcpus: vcpus(machine)?,
        serial: machine.serial_state(),
        devices,
        bridge: machine.bridge_state(),
        memory: Memory {
            len: machine.ram.len(),
            layers: layers.iter().map(layer_state).collect(),
        },
        config,
    };
    draft.commit(&state, &layers)?;
    // To map RAM from its files is what the next incremental snapshot needs, but it takes the guest's huge
    // pages, and each page that it touches faults once more.
    if !incremental && machine.remote.is_none() {
        return Ok(());
    }
    match machine.ram.lay(&layers, &allowed, true) {
        Ok(()) => {
            machine.source = Some(Source {
                folder: folder.into(),
                id: state.id,
            });
            // All of it is here now.
            machine.remote = None;
        }
        // It holds the same either way.
        Err(error) => log::warn!("map RAM from its snapshot: {error}"),
    }
    Ok(())
}

fn layer_state(layer: &Layer) -> LayerState {
    LayerState {
        file: layer.name.clone(),
        extents: layer.extents.to_vec(),
    }
}

fn vcpus(machine: &Machine) -> Result<Vec<VcpuState>, SaveError> {
    let kvm = Kvm::new().map_err(SaveError::Kvm)?;
    let indices = Arc::new(MsrIndices::of(&kvm).map_err(SaveError::Board)?);
    let states = machine.vcpus.save(&indices).map(|(index, state)| {
        let state = state.ok_or(SaveError::NoVcpu(index))?;
        state.map_err(|source| SaveError::Vcpu { index, source })
    });
    states.collect()
}

/// Locks a folder: no other podvmm writes to it while the lock is held. None if another one does.
pub(crate) fn lock(folder: &Path) -> io::Result<Option<File>> {
    let file = File::open(folder)?;
    let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    Ok(locked.is_ok().then_some(file))
}

/// A snapshot in the making. Dropping it removes what was written of it.
struct Draft<'a> {
    folder: &'a Path,
    /// Keeps the folder locked.
    lock: File,
    id: String,
    made_folder: bool,
    /// The files that were put into the folder.
    made: Vec<PathBuf>,
    committed: bool,
}

/// A name that no other snapshot has.
fn random_id() -> String {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())
        .expect("so few bytes are had at once");
    format!("{:032x}", u128::from_le_bytes(bytes))
}

impl<'a> Draft<'a> {
    fn new(folder: &'a Path) -> Result<Self, SaveError> {
        // No other user may read what RAM holds.
        let made_folder = match fs::DirBuilder::new().mode(0o700).create(folder) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(failed("make the folder", folder)(error)),
        };
        let lock = lock(folder)
            .map_err(failed("open", folder))?
            .ok_or_else(|| SaveError::Busy(folder.into()))?;
        Ok(Self {
            folder,
            lock,
            id: random_id(),
            made_folder,
            made: Vec::new(),
            committed: false,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The name that `name` has until it is complete.
    fn draft_of(&self, name: &str) -> PathBuf {
        self.path(&format!(".{name}-{}", self.id))
    }

    fn create(&mut self, path: &Path) -> Result<File, SaveError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(failed("create", path))?;
        self.made.push(path.into());
        Ok(file)
    }

    /// Writes RAM and returns all the files that make it up, which are then in the folder.
    fn memory(
        &mut self,
        machine: &Machine,
        allowed: &[std::ops::Range<u64>],
        incremental: bool,
    ) -> Result<Vec<Layer>, SaveError> {
        let name = format!("{MEMORY}{}", self.id);
        let path = self.path(&name);
        let file = self.create(&path)?;
        let below = if incremental {
            self.adopt(machine.ram.layers())
        } else {
            Vec::new()
        };
        if let Some(remote) = &machine.remote {
            machine.ram.fetch(|| remote.patience());
        }
        let extents = if below.is_empty() {
            machine.ram.write(&file, allowed)
        } else {
            machine.ram.write_changes(&file, allowed)
        };
        let extents = extents.map_err(failed("write RAM to", &path))?;
        file.sync_all().map_err(failed("write RAM to", &path))?;
        let mut layers = below;
        layers.push(Layer {
            name,
            file: Arc::new(file),
            extents: extents.into(),
        });
        Ok(layers)
    }

    /// Has `layers` in the folder, too, or none of them where that cannot be.
    fn adopt(&mut self, layers: &[Layer]) -> Vec<Layer> {
        if layers.is_empty() || layers.len() >= MOST_LAYERS {
            log::info!("RAM is written as a whole");
            return Vec::new();
        }
        for layer in layers {
            if let Err(error) = self.link(layer) {
                log::info!(
                    "RAM is written as a whole: take over {}: {error}",
                    layer.name
                );
                return Vec::new();
            }
        }
        layers.to_vec()
    }

    fn link(&mut self, layer: &Layer) -> io::Result<()> {
        let path = self.path(&layer.name);
        let own = layer.file.metadata()?;
        match fs::symlink_metadata(&path) {
            Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Err(_) => {}
        }
        let file = format!("/proc/self/fd/{}", layer.file.as_raw_fd());
        linkat(CWD, file, CWD, &path, AtFlags::SYMLINK_FOLLOW)?;
        self.made.push(path);
        Ok(())
    }

    /// Makes it the folder's snapshot.
    fn commit(mut self, state: &State, layers: &[Layer]) -> Result<(), SaveError> {
        let encoded = format::encode(state).map_err(SaveError::Encode)?;
        for (name, text) in [(CONFIG, state.config.to_string()), (STATE, encoded)] {
            let path = self.draft_of(name);
            let write = |mut file: File| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            };
            write(self.create(&path)?).map_err(failed("write", &path))?;
        }
        // All that the state speaks of, before the state.
        self.sync()?;
        // A config.json that is new already, beside an older state, is not believed.
        for name in [CONFIG, STATE] {
            let (from, to) = (self.draft_of(name), self.path(name));
            fs::rename(from, &to).map_err(failed("write", &to))?;
        }
        self.committed = true;
        self.sync()?;
        let kept = |name: &str| {
            let name = name.strip_suffix(COMPRESSED).unwrap_or(name);
            layers.iter().any(|layer| layer.name == name)
        };
        self.remove(|name| is_ours(name) && !kept(name));
        Ok(())
    }

    /// Has the folder's names on disk.
    fn sync(&self) -> Result<(), SaveError> {
        self.lock.sync_all().map_err(failed("write", self.folder))
    }

    /// Removes files from the folder. One that cannot be removed does no harm.
    fn remove(&self, unwanted: impl Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(self.folder) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(&unwanted)
                && let Err(error) = fs::remove_file(entry.path())
            {
                log::warn!("remove {}: {error}", entry.path().display());
            }
        }
    }
}

/// Whether a file is RAM, what was touched of it, or a draft that was never completed.
fn is_ours(name: &str) -> bool {
    let drafts = [CONFIG, STATE, MEMORY, WORKING_SET].map(|of| format!(".{of}"));
    let is_draft = |draft: &String| name.starts_with(draft.as_str());
    [MEMORY, WORKING_SET]
        .iter()
        .any(|kind| name.starts_with(*kind))
        || drafts.iter().any(is_draft)
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.committed {
            for path in &self.made {
                // Renamed already, or not to be removed: then the next snapshot tries.
                let _ = fs::remove_file(path);
            }
            if self.made_folder {
                // The folder stays if another process has put something there.
                let _ = fs::remove_dir(self.folder);
            }
        }
    }
}

impl State {
    /// Whether `config`, which is config.json, is of this snapshot. Without an id it counts as
    /// such.
    pub(super) fn is_config_of(&self, config: &Value) -> bool {
        config.get(ID).is_none_or(|id| *id == self.id.as_str())
    }
}
