//! Opens a snapshot and gives a machine what it keeps.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{Definition, JsonError, MemoryConfig, Restore};
use arch::cpuid;
use arch::state::{BoardState, CpuFeatures, VcpuState};
use devices::legacy::SerialState;
use devices::virtio::TransportState;
use kvm_bindings::CpuId;
use thiserror::Error;

use super::{CONFIG, FormatError, LayerState, MEMORY, Memory, STATE, Source, State};
use super::{allowed, format, working_set};
use crate::host::KvmKind;
use crate::memory::{Layer, LayerError, check_extents, union};

/// Far more than the largest VM's.
const MOST_STATE_BYTES: u64 = 256 << 20;
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
    /// These files, of which what is needed may be read ahead.
    Files { layers: Vec<Layer>, prefetch: bool },
    /// The process at this socket has what is `covered`.
    Socket {
        path: PathBuf,
        covered: Vec<Range<u64>>,
    },
}

impl Loaded {
    /// Opens it, and says which VM it is to be.
    pub fn open(restore: Restore) -> Result<(Self, Definition), RestoreError> {
        let Restore {
            folder,
            patch,
            fds,
            prefetch,
            verify,
            memory_socket,
            resume: _,
        } = restore;
        let state = read_state(&folder)?;
        let path = folder.join(CONFIG);
        let config = config(&path, &state)?;
        let definition = Definition::restored(&config, &patch, fds);
        let definition = definition.map_err(|source| RestoreError::Config { path, source })?;
        let memory = &state.memory;
        let pages = match memory_socket {
            Some(_) if prefetch || verify => return Err(RestoreError::Elsewhere),
            Some(path) => Pages::Socket {
                path,
                covered: covered(&folder, memory)?,
            },
            None => Pages::Files {
                layers: open_layers(&folder, memory, verify)?,
                prefetch,
            },
        };
        let id = state.id.clone();
        let loaded = Self {
            source: Source { folder, id },
            state,
            pages,
        };
        Ok((loaded, definition))
    }

    /// Which snapshot it is.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Where its RAM comes from.
    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Which pages of RAM it is known to need.
    pub(crate) fn working_set(&self) -> Option<Vec<Range<u64>>> {
        working_set::read(&self.source, self.state.memory.len)
    }

    /// The CPU features of the guest, if this host has them: `here` is what its KVM supports.
    pub(crate) fn features(&self, here: &CpuId) -> Result<(CpuFeatures, CpuId), RestoreError> {
        let kind = KvmKind::of_this_host().name();
        if self.state.kvm != kind {
            return Err(RestoreError::Kvm {
                there: self.state.kvm.clone(),
                here: kind,
            });
        }
        let features = &self.state.features;
        let cpuid = features.cpuid();
        let cpuid =
            cpuid.ok_or_else(|| RestoreError::Cpu("more features than there are".into()))?;
        match cpuid::missing(&cpuid, here) {
            Some(missing) => Err(RestoreError::Cpu(missing)),
            None => Ok((features.clone(), cpuid)),
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

    /// Takes the devices' states, which are to be those of `ids`, in that order.
    pub(crate) fn take_devices<'a>(
        &mut self,
        ids: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<TransportState>, RestoreError> {
        let list = |ids: Vec<&str>| match ids[..] {
            [] => "no devices".into(),
            _ => format!("the devices {}", ids.join(", ")),
        };
        let expected: Vec<_> = ids.collect();
        let found: Vec<_> = self
            .state
            .devices
            .iter()
            .map(|(id, _)| id.as_str())
            .collect();
        if found != expected {
            return Err(differs(list(found), list(expected)));
        }
        let devices = std::mem::take(&mut self.state.devices);
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

/// The files that are RAM in a snapshot, and how much RAM that is.
pub(crate) fn layers(folder: &Path) -> Result<(u64, Vec<Layer>), RestoreError> {
    let memory = read_state(folder)?.memory;
    let layers = open_layers(folder, &memory, false)?;
    Ok((memory.len, layers))
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

fn read(path: &Path) -> Result<Vec<u8>, RestoreError> {
    read_file(path).map_err(|source| RestoreError::Read {
        path: path.into(),
        source,
    })
}

pub(super) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(MOST_STATE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A regular file: another one might keep whoever reads it waiting.
fn open(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    File::open(path)
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
        // Whoever reads it next says what is wrong.
        _ => Ok(bytes),
    }
}

/// What of RAM there is something in.
fn covered(folder: &Path, memory: &Memory) -> Result<Vec<Range<u64>>, RestoreError> {
    let mut covered = Vec::new();
    for layer in &memory.layers {
        let ranges = check_extents(&layer.extents, memory.len);
        covered.extend(ranges.map_err(|error| RestoreError::Memory {
            path: folder.join(STATE),
            source: error.into(),
        })?);
    }
    Ok(union(covered))
}

fn open_layers(folder: &Path, memory: &Memory, verify: bool) -> Result<Vec<Layer>, RestoreError> {
    let layers = memory.layers.iter();
    let open = |layer| open_layer(folder, layer, memory.len, verify);
    layers.map(open).collect()
}

fn open_layer(
    folder: &Path,
    layer: &LayerState,
    ram_len: u64,
    verify: bool,
) -> Result<Layer, RestoreError> {
    let path = folder.join(&layer.file);
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| RestoreError::Memory {
        path: path.clone(),
        source,
    };
    let is_a_name = layer.file.starts_with(MEMORY) && !layer.file.contains('/');
    if !is_a_name {
        return Err(failed("it is not the name of a file of RAM".into()));
    }
    let file = open(&path).map_err(|error| failed(error.into()))?;
    let opened = Layer {
        name: layer.file.clone(),
        file: Arc::new(file),
        extents: layer.extents.clone().into(),
    };
    let checked = opened.check(ram_len).and_then(|()| match verify {
        true => opened.verify(),
        false => Ok(()),
    });
    checked.map_err(|error: LayerError| failed(error.into()))?;
    Ok(opened)
}
