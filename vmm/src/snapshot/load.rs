//! Opens a snapshot and gives a machine what it keeps.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{JsonError, MemoryConfig, Restore, VmConfig};
use arch::cpuid;
use arch::state::{BoardState, VcpuState};
use devices::legacy::SerialState;
use devices::pci::BridgeState;
use devices::virtio::TransportState;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use thiserror::Error;

use super::files::{open, read_rest};
use super::{COMPRESSED, CONFIG, FormatError, LayerState, MEMORY, Memory, STATE, State};
use super::{allowed, format, working_set};
use crate::host::KvmKind;
use crate::machine::Source;
use crate::memory::{Layer, check_extents, check_len, union};

const MOST_LAYERS: usize = 64;

/// Why a snapshot cannot be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}", .path.display())]
    Format { path: PathBuf, source: FormatError },
    #[error("{}", .path.display())]
    Config { path: PathBuf, source: JsonError },
    #[error(
        "{} names files and sockets that the VM is to use, so it must be written by its user or root \
         alone: {why}",
        .path.display()
    )]
    Untrusted { path: PathBuf, why: String },
    #[error("{}", .path.display())]
    Memory {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("memory_socket: RAM is elsewhere, so here it can be neither prefetched nor verified")]
    Elsewhere,
    #[error("its guest was started on a KVM that is {there}, this one is {here}")]
    Kvm { there: String, here: &'static str },
    #[error("its guest was started on a host that has {0}, which this one lacks")]
    Cpu(String),
    #[error("its guest has {found}, the configuration {expected}")]
    Differs { found: String, expected: String },
}

/// A snapshot that is whole. Its parts fit the configuration as far as it has been asked.
#[derive(Debug)]
pub struct Loaded {
    source: Source,
    state: State,
    pages: Pages,
}

/// Where RAM comes from.
#[derive(Debug)]
pub(crate) enum Pages {
    /// RAM comes from these files, of which what is needed may be read ahead.
    Files { layers: Vec<Layer>, prefetch: bool },
    /// The process at this socket has what is `covered`.
    Socket {
        path: PathBuf,
        covered: Vec<Range<u64>>,
    },
}

impl Loaded {
    /// Opens it, and says which VM it is to be.
    pub fn open(restore: Restore) -> Result<(Self, VmConfig), RestoreError> {
        let Restore {
            folder,
            patch,
            fds,
            prefetch,
            verify,
            memory_socket,
            ..
        } = restore;
        let state = read_state(&folder)?;
        let path = folder.join(CONFIG);
        let config = config(&path, &state)?;
        let config = VmConfig::restored(&config, &patch, fds);
        let config = config.map_err(|source| RestoreError::Config { path, source })?;
        let memory = &state.memory;
        let pages = match memory_socket {
            Some(_) if prefetch || verify => return Err(RestoreError::Elsewhere),
            Some(path) => {
                let files = files(&folder, memory)?.into_iter();
                Pages::Socket {
                    path,
                    covered: union(files.flat_map(|file| file.ranges).collect()),
                }
            }
            None => {
                let open = |layer| open_layer(&folder, layer, memory.len, verify);
                let layers = memory.layers.iter().map(open);
                Pages::Files {
                    layers: layers.collect::<Result<_, _>>()?,
                    prefetch,
                }
            }
        };
        let id = state.id.clone();
        let loaded = Self {
            source: Source { folder, id },
            state,
            pages,
        };
        Ok((loaded, config))
    }

    /// Which snapshot was loaded.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Where the snapshot's RAM comes from.
    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Which runs of RAM a VM of this snapshot is known to need.
    pub(crate) fn working_set(&self) -> Option<Vec<Range<u64>>> {
        working_set::read(&self.source, self.state.memory.len)
    }

    /// The CPUID of the guest, if its vCPUs can go on here, where `kvm` supports `supported`.
    pub(crate) fn cpuid(&self, kvm: &Kvm, supported: &CpuId) -> Result<CpuId, RestoreError> {
        let kind = KvmKind::of_this_host().name();
        if self.state.kvm != kind {
            return Err(RestoreError::Kvm {
                there: self.state.kvm.clone(),
                here: kind,
            });
        }
        let guest = self.state.features.cpuid();
        let guest =
            guest.ok_or_else(|| RestoreError::Cpu("more features than there are".into()))?;
        let missing = cpuid::missing(&guest, supported)
            .or_else(|| VcpuState::missing_mitigations(&self.state.vcpus, kvm));
        match missing {
            Some(missing) => Err(RestoreError::Cpu(missing)),
            None => Ok(guest),
        }
    }

    /// The vCPUs, which are to be `count`.
    pub(crate) fn vcpus(&self, count: u8) -> Result<&[VcpuState], RestoreError> {
        let vcpus = &self.state.vcpus;
        if vcpus.len() == usize::from(count) {
            return Ok(vcpus);
        }
        let found = format!("{} vCPUs", vcpus.len());
        Err(differs(found, count.to_string()))
    }

    pub(crate) fn board(&self) -> &BoardState {
        &self.state.board
    }

    /// The serial port, if there is to be one.
    pub(crate) fn serial(&self) -> Result<&SerialState, RestoreError> {
        let none = || differs("no serial port".into(), "one".into());
        self.state.serial.as_ref().ok_or_else(none)
    }

    /// The host bridge, if there is to be one. What the devices are on is theirs to say.
    pub(crate) fn bridge(&self) -> Result<BridgeState, RestoreError> {
        let none = || differs("no PCI bus".into(), "one".into());
        self.state.bridge.ok_or_else(none)
    }

    /// Which device of the PCI bus `id` was, if it was on one.
    pub(crate) fn place(&self, id: &str) -> Option<u8> {
        let mut devices = self.state.devices.iter();
        devices.find(|(other, _)| other == id)?.1.place()
    }

    /// Takes the devices' states, which are to be those of `ids`, and in that order unless each has a place on a PCI
    /// bus: to a guest, others are told apart by their order.
    pub(crate) fn take_devices<'a>(
        &mut self,
        ids: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<TransportState>, RestoreError> {
        let list = |ids: Vec<&str>| match ids[..] {
            [] => "no devices".into(),
            _ => format!("the devices {}", ids.join(", ")),
        };
        let expected: Vec<_> = ids.collect();
        let mut devices = std::mem::take(&mut self.state.devices);
        if devices.iter().all(|(_, state)| state.place().is_some()) {
            let rank = |id: &str| expected.iter().position(|other| *other == id);
            devices.sort_by_key(|(id, _)| rank(id));
        }
        let found: Vec<_> = devices.iter().map(|(id, _)| id.as_str()).collect();
        if found != expected {
            return Err(differs(list(found), list(expected)));
        }
        Ok(devices.into_iter().map(|(_, state)| state).collect())
    }

    /// Which RAM a VM with `memory` has. To be asked before the devices are taken.
    pub(crate) fn memory(&self, memory: &MemoryConfig) -> Result<Vec<Range<u64>>, RestoreError> {
        let len = memory.size.bytes() + memory.hotplug_size.0;
        let allowed = allowed(memory, &self.state.devices);
        match allowed.filter(|_| self.state.memory.len == len) {
            Some(allowed) => Ok(allowed),
            None => {
                let found = format!("{} bytes of memory at most", self.state.memory.len);
                Err(differs(found, len.to_string()))
            }
        }
    }
}

fn differs(found: String, expected: String) -> RestoreError {
    RestoreError::Differs { found, expected }
}

fn read_state(folder: &Path) -> Result<State, RestoreError> {
    let path = folder.join(STATE);
    let state: State =
        format::decode(&read(&path)?).map_err(|source| RestoreError::Format { path, source })?;
    if state.memory.layers.len() > MOST_LAYERS {
        let found = format!("RAM in {} files", state.memory.layers.len());
        return Err(differs(found, format!("{MOST_LAYERS} at most")));
    }
    Ok(state)
}

/// Reads a file that names other files, as a command line does.
fn read(path: &Path) -> Result<Vec<u8>, RestoreError> {
    let failed = |source| RestoreError::Read {
        path: path.into(),
        source,
    };
    let file = open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let own = rustix::process::geteuid().as_raw();
    if let Some(why) = distrust(metadata.uid(), metadata.mode(), own) {
        let path = path.into();
        return Err(RestoreError::Untrusted { path, why });
    }
    read_rest(file).map_err(failed)
}

/// Why a file of user `owner` and with this mode may be of another than user `own` or root, if so.
fn distrust(owner: u32, mode: u32, own: u32) -> Option<String> {
    const OTHERS_WRITE: u32 = 0o022;
    if owner != own && owner != 0 {
        Some(format!(
            "it belongs to user {owner}, and this is user {own}"
        ))
    } else if mode & OTHERS_WRITE != 0 {
        Some(format!(
            "others may write to it (mode {:04o})",
            mode & 0o7777
        ))
    } else {
        None
    }
}

/// What config.json says, if it is of this snapshot.
fn config(path: &Path, state: &State) -> Result<Vec<u8>, RestoreError> {
    let bytes = read(path)?;
    match serde_json::from_slice(&bytes) {
        Ok(config) if !state.is_config_of(&config) => {
            log::warn!(
                "{} is of another snapshot, one that was never completed; it is not used",
                path.display()
            );
            Ok(state.config.to_string().into_bytes())
        }
        // If it is wrong, `VmConfig::restored`, which reads it next, says so.
        _ => Ok(bytes),
    }
}

/// A file that is RAM in a snapshot: it may be there or not.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    path: PathBuf,
    /// Which ranges of RAM the file is.
    pub(crate) ranges: Vec<Range<u64>>,
}

impl MemoryFile {
    pub(crate) fn open(&self) -> Result<File, RestoreError> {
        let end = self.ranges.last().map_or(0, |range| range.end);
        let file = open(&self.path).map_err(|error| unusable(&self.path, error))?;
        check_len(&file, end).map_err(|error| unusable(&self.path, error))?;
        Ok(file)
    }

    /// Opens the compressed copy of the file, with its path. `None` if it is not there.
    pub(crate) fn open_compressed(&self) -> Result<Option<(PathBuf, File)>, RestoreError> {
        let path = self.compressed();
        match open(&path) {
            Ok(file) => Ok(Some((path, file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unusable(&path, error)),
        }
    }

    /// Path of the compressed copy of the file.
    pub(crate) fn compressed(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(COMPRESSED);
        path.into()
    }
}

/// The files that are RAM in a snapshot, each over those before it, and how much RAM that is.
pub(crate) fn memory_files(folder: &Path) -> Result<(u64, Vec<MemoryFile>), RestoreError> {
    let memory = read_state(folder)?.memory;
    let files = files(folder, &memory)?;
    Ok((memory.len, files))
}

fn files(folder: &Path, memory: &Memory) -> Result<Vec<MemoryFile>, RestoreError> {
    let file = |layer: &LayerState| {
        let path = memory_path(folder, layer)?;
        let ranges = check_extents(&layer.extents, memory.len);
        let ranges = ranges.map_err(|error| unusable(&path, error))?;
        Ok(MemoryFile { path, ranges })
    };
    memory.layers.iter().map(file).collect()
}

fn memory_path(folder: &Path, layer: &LayerState) -> Result<PathBuf, RestoreError> {
    let path = folder.join(&layer.file);
    let is_a_name = layer.file.starts_with(MEMORY) && !layer.file.contains('/');
    match is_a_name {
        true => Ok(path),
        false => Err(unusable(&path, "it is not the name of a file of RAM")),
    }
}

/// The file at `path` is not the RAM that it should be.
pub(crate) fn unusable(
    path: &Path,
    why: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> RestoreError {
    RestoreError::Memory {
        path: path.into(),
        source: why.into(),
    }
}

fn open_layer(
    folder: &Path,
    layer: &LayerState,
    ram_len: u64,
    verify: bool,
) -> Result<Layer, RestoreError> {
    let path = memory_path(folder, layer)?;
    let file = open(&path).map_err(|error| unusable(&path, error))?;
    let opened = Layer {
        name: layer.file.clone(),
        file: Arc::new(file),
        extents: layer.extents.clone().into(),
    };
    let checked = opened.check(ram_len).and_then(|()| match verify {
        true => opened.verify(),
        false => Ok(()),
    });
    checked.map_err(|error| unusable(&path, error))?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_may_write_is_not_trusted() {
        for (owner, mode, own) in [(0, 0o100_600, 1000), (1000, 0o100_644, 1000), (0, 0o600, 0)] {
            assert_eq!(distrust(owner, mode, own), None, "{owner} {mode:o} {own}");
        }
        assert_eq!(
            distrust(1000, 0o100_600, 0).unwrap(),
            "it belongs to user 1000, and this is user 0"
        );
        for mode in [0o100_664, 0o100_602] {
            let why = format!("others may write to it (mode {:04o})", mode & 0o777);
            assert_eq!(distrust(0, mode, 0).unwrap(), why);
        }
    }
}
