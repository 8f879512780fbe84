//! What a client can ask of podvmm, and what it is answered.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::config::{Addition, Resize, VmConfig};
use crate::error::State;
use crate::units::ByteSize;

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
    ResizeDisk(DiskSize),
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

/// Makes a disk larger or smaller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSize {
    pub id: String,
    /// How long it is to be, in bytes.
    pub desired_size: ByteSize,
}

/// Writes a paused VM to a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The folder to write to: made if it is not there.
    #[serde(rename = "destination_url", with = "file_url")]
    pub folder: PathBuf,
    /// Whether only the memory is written that has changed since the last such snapshot, where that
    /// can be. podvmm's own field.
    #[serde(default, deserialize_with = "null_is_default")]
    pub incremental: bool,
}

/// Makes a VM of a snapshot, paused.
#[derive(Debug, Serialize, Deserialize)]
pub struct Restore {
    /// Where the snapshot is.
    #[serde(rename = "source_url", with = "file_url")]
    pub folder: PathBuf,
    /// Read memory ahead of the guest: what a recorded working set names, before the VM is there, or
    /// else all, meanwhile.
    #[serde(default, deserialize_with = "null_is_default")]
    pub prefetch: bool,
    /// Whether the VM is to run at once.
    #[serde(default, deserialize_with = "null_is_default")]
    pub resume: bool,
    /// What Cloud Hypervisor's clients may ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_restore_mode: Option<MemoryRestoreMode>,
    /// Cloud Hypervisor's, which podvmm refuses: RAM is read when it is touched.
    #[serde(default, skip_serializing, deserialize_with = "null_is_default")]
    pub(crate) prefault: bool,
    /// Read memory and compare its checksums first. From here on fields are podvmm's own.
    #[serde(default, deserialize_with = "null_is_default")]
    pub verify: bool,
    /// The socket where another process listens that has the VM's memory, and gives it page by
    /// page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_socket: Option<PathBuf>,
    /// What is to be different from config.json (RFC 7396, JSON Merge Patch).
    #[serde(
        rename = "config",
        default = "nothing",
        deserialize_with = "null_is_nothing"
    )]
    pub patch: Value,
    /// Stand for the taps of networks without one, in their order.
    #[serde(skip)]
    pub fds: Vec<OwnedFd>,
}

/// How RAM comes back. podvmm always maps the snapshot's files, privately, and reads a page when it is
/// touched. The guest sees what it would see in any of these modes, also if the files are removed
/// meanwhile.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum MemoryRestoreMode {
    Copy,
    OnDemand,
    CopyOnWrite,
}

/// A patch that changes nothing.
fn nothing() -> Value {
    Value::Object(Map::new())
}

fn null_is_nothing<'de, D: Deserializer<'de>>(json: D) -> Result<Value, D::Error> {
    Ok(Option::deserialize(json)?.unwrap_or_else(nothing))
}

fn null_is_default<'de, D, T>(json: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(json)?.unwrap_or_default())
}

/// A folder as a URL of a file system (RFC 8089, The "file" URI Scheme).
mod file_url {
    use std::path::{Path, PathBuf};

    use serde::de::{Deserialize, Deserializer, Error as _};
    use serde::ser::{Error as _, Serializer};

    pub(super) fn serialize<S: Serializer>(folder: &Path, json: S) -> Result<S::Ok, S::Error> {
        match folder.to_str() {
            Some(path) if folder.is_absolute() => json.serialize_str(&format!("file://{path}")),
            _ => Err(S::Error::custom(format!(
                "'{}' is not an absolute path in UTF-8",
                folder.display()
            ))),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(json: D) -> Result<PathBuf, D::Error> {
        let url = String::deserialize(json)?;
        match url.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Ok(path.into()),
            _ => Err(D::Error::custom("it is not file:///FOLDER")),
        }
    }
}

impl Restore {
    /// A request for the VM as the snapshot in `folder` has it.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            prefetch: false,
            resume: false,
            memory_restore_mode: None,
            prefault: false,
            verify: false,
            memory_socket: None,
            patch: nothing(),
            fds: Vec::new(),
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
    /// The answer to [`Request::Add`] while there is a guest.
    Plugged(Plugged),
    Counters(Value),
    Metrics(String),
}

/// Which podvmm this is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ping {
    pub version: String,
    pub build_version: String,
    pub pid: u32,
    pub features: Vec<String>,
}

/// A device that a guest has got while it runs, or is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugged {
    /// What vm.remove-device calls it.
    pub id: String,
    /// Where the guest finds it: domain, bus, device and function of PCI, as in `0000:00:05.0`.
    pub bdf: String,
}

/// A VM as it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VM as it was defined, with the sizes it was asked to have since.
    pub config: VmConfig,
    /// Where in its life the VM is.
    pub state: State,
    /// Memory the guest has now, in bytes.
    pub memory_actual_size: u64,
    /// vCPUs the guest may use now.
    pub vcpus_actual: u8,
    /// Devices that are to be removed and that the guest has not let go of yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<String>,
}
