//! What a client can ask of podvmm, and what it is answered.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::State;
use crate::json::{Addition, Definition};

/// One request, understood.
#[derive(Debug)]
pub enum Request {
    Ping,
    /// Ends podvmm.
    Exit,
    Create(Box<Definition>),
    /// A device more, as the client wrote it.
    Add(Addition, Value),
    /// A device less, by its id.
    Remove(String),
    Boot,
    Info,
    Counters,
    Pause,
    Resume,
    Resize(Resize),
    /// Asks the guest to end.
    PowerButton,
    /// Ends the guest and keeps the definition.
    Shutdown,
    Reboot,
    /// Forgets the VM, and ends it if it runs.
    Delete,
    /// What Prometheus reads.
    Metrics,
}

/// Absolute sizes; what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Resize {
    pub desired_vcpus: Option<u8>,
    /// All memory of the VM, in bytes.
    pub desired_ram: Option<u64>,
    /// What the balloon takes from it, in bytes.
    pub desired_balloon: Option<u64>,
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
