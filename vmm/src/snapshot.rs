//! A VM in a folder, from which any number of others can go on where it was.
//!
//! ```text
//! config.json      the VM's configuration, for its user to edit
//! state.json       CPUs, board and devices, under a header with a checksum, and which files are RAM
//! memory-<id>      RAM, sparse; an incremental snapshot adds one that lies over the others
//! memory-<id>.lz4  the same, compressed, for `podvmm pages`
//! working-set-<id> which pages of it a VM has touched: only a hint
//! ```
//!
//! A snapshot exists from the moment its `state.json` has that name: all it speaks of is written
//! before, under names that no older snapshot uses, and what only an older one used is removed after.
//!
//! What is read of the guest is distrusted: the header says whether it is whole, KVM and the devices check
//! what they are given, and RAM is mapped only where the configuration has RAM. `config.json` names the
//! files, folders and sockets of the host that the VM uses, as a command line does, and `state.json` holds
//! a copy of it. The user who writes them decides what podvmm opens, so they are read only if no
//! other user than podvmm's own and root can have written them.

mod files;
mod format;
mod load;
mod save;
mod working_set;

use std::ops::Range;

use arch::state::{BoardState, CpuFeatures, VcpuState};
use devices::legacy::SerialState;
use devices::pci::BridgeState;
use devices::virtio::{DeviceState, TransportState};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::format::Document;
use crate::memory::Extent;

pub use self::format::FormatError;
pub use self::load::{Loaded, RestoreError};
pub(crate) use self::load::{MemoryFile, Pages, memory_files, unusable};
pub(crate) use self::save::SaveError;
pub(crate) use self::save::{lock, save};
pub(crate) use self::working_set::{RecordError, record};

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-";
/// What the name of a file of RAM ends in if it is compressed.
const COMPRESSED: &str = ".lz4";
const WORKING_SET: &str = "working-set-";
/// The member of config.json that says which snapshot it belongs to.
const ID: &str = "snapshot";

/// What a snapshot keeps besides RAM.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Id of this snapshot and no other.
    id: String,
    /// How the host ran the guest's kernel.
    kvm: String,
    features: CpuFeatures,
    board: BoardState,
    vcpus: Vec<VcpuState>,
    serial: Option<SerialState>,
    /// State of each device, by the id that the metrics have, too.
    devices: Vec<(String, TransportState)>,
    /// State of the host bridge, if there is a PCI bus.
    bridge: Option<BridgeState>,
    memory: Memory,
    /// What config.json was at first.
    config: Value,
}

impl Document for State {
    const MAGIC: &'static str = "podvmm snapshot";
    const VERSION: u32 = 5;
}

/// The files that are RAM, each over those before it.
#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    len: u64,
    layers: Vec<LayerState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LayerState {
    file: String,
    extents: Vec<Extent>,
}

/// How much of RAM may be saved and restored: all that is there from the start, and what of the rest
/// is plugged.
fn allowed(
    memory: &api::MemoryConfig,
    devices: &[(String, TransportState)],
) -> Option<Vec<Range<u64>>> {
    let size = memory.size.bytes();
    let plugged = devices
        .iter()
        .find_map(|(_, device)| match device.device() {
            DeviceState::Mem(state) => Some(state.plugged(memory.hotplug_size.0)),
            _ => None,
        });
    let plugged = plugged.unwrap_or_else(|| Some(Vec::new()))?.into_iter();
    let plugged = plugged.map(|run| size + run.start..size + run.end);
    Some(std::iter::once(0..size).chain(plugged).collect())
}
