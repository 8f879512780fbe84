//! What a client can ask of podvmm, and what it is answered.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{Addition, VmConfig};
use crate::error::State;
use crate::units::{ByteSize, CpuCount};

/// One request, understood.
#[derive(Debug)]
pub enum Request {
    Ping,
    /// Ends podvmm.
    Exit,
    Create(Box<VmConfig>),
    /// A device more.
    Add(Addition),
    /// A device less, by its id.
    Remove(String),
    Boot,
    Info,
    Counters,
    Pause,
    Resume,
    Resize(Resize),
    Snapshot(Snapshot),
    /// Notes beside a VM's snapshot which of its RAM the VM has touched.
    RecordWorkingSet,
    Restore(Box<Restore>),
    /// Asks the guest to end.
    PowerButton,
    /// Ends the guest and keeps what it is defined as.
    Shutdown,
    Reboot,
    /// Forgets the VM, and ends it if it runs.
    Delete,
    /// What Prometheus reads.
    Metrics,
}

/// Absolute sizes; what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resize {
    /// vCPUs the guest may use.
    pub desired_vcpus: Option<CpuCount>,
    /// All memory of the VM.
    pub desired_ram: Option<ByteSize>,
    /// What the balloon takes from it.
    pub desired_balloon: Option<ByteSize>,
}

/// Writes a paused VM down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where to: made if it is not there.
    pub folder: PathBuf,
    /// Of memory, writes only what has changed since the last such snapshot, where that can be.
    pub incremental: bool,
}

/// Makes a VM of a snapshot, paused.
#[derive(Debug)]
pub struct Restore {
    pub folder: PathBuf,
    /// What is to be different from config.json (RFC 7396, JSON Merge Patch).
    pub patch: Value,
    /// Stand for the taps of networks without one, in their order.
    pub fds: Vec<OwnedFd>,
    /// Read memory ahead of the guest: what a recorded working set names, before the VM is there, or
    /// else all, meanwhile.
    pub prefetch: bool,
    /// Read memory and compare its checksums first.
    pub verify: bool,
    /// Where another process listens that has its memory, and gives it page by page.
    pub memory_socket: Option<PathBuf>,
    /// Let it run.
    pub resume: bool,
}

impl Restore {
    /// All of it as the snapshot has it.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            patch: Value::Object(Map::new()),
            fds: Vec::new(),
            prefetch: false,
            verify: false,
            memory_socket: None,
            resume: false,
        }
    }
}

/// What there is to say besides that it is done.
#[derive(Debug)]
pub enum Answer {
    Done,
    Ping(Ping),
    /// The answer to [`Request::Exit`], after which there are no more.
    Exiting,
    Info(Box<VmInfo>),
    Counters(Value),
    Metrics(String),
}

/// Which podvmm this is.
#[derive(Clone, Debug, Serialize)]
pub struct Ping {
    pub version: &'static str,
    pub build_version: &'static str,
    pub pid: u32,
    pub features: Vec<String>,
}

/// A VM as it is.
#[derive(Clone, Debug, Serialize)]
pub struct VmInfo {
    /// As it was defined, with the sizes it was asked to have since.
    pub config: Value,
    #[serde(serialize_with = "as_text")]
    pub state: State,
    /// Memory the guest has now, in bytes.
    pub memory_actual_size: u64,
    /// vCPUs the guest may use now.
    pub vcpus_actual: u8,
}

fn as_text<S: serde::Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(state)
}
