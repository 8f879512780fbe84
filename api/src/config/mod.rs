//! What a VM is made of: a struct for each kind of part, in a file of its own.
//!
//! A struct is its JSON, by serde: its names are the wire's, and its `Default` is what a client need not
//! write. The command line fills the same structs ([`Part::from_options`]), and `vm.info` and a
//! snapshot's config.json are a [`VmConfig`] written out. The names are Cloud Hypervisor's.
//!
//! Fields that podvmm does not know are ignored, as by Cloud Hypervisor, but kept, since clients read
//! back what they wrote. A field that is known and cannot be honoured is refused by name
//! ([`unsupported`]), unless it asks for what is so anyway. Null is as good as a field that is missing.

mod balloon;
mod cpus;
mod disk;
mod fs;
mod host_path;
mod memory;
mod names;
mod net;
mod output;
mod rate;
mod resize;
mod transport;
mod unsupported;
mod vsock;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::json::{self, Misread};
use crate::options::{Options, OptionsError};
use crate::units::{ByteSize, CpuCount, RamSize, UnitError};

pub use self::balloon::BalloonConfig;
pub use self::cpus::CpusConfig;
pub use self::disk::{DiskConfig, ImageType};
pub use self::fs::{FsCache, FsConfig, FsSource};
pub use self::host_path::{Access, HostPath};
pub use self::memory::MemoryConfig;
pub use self::net::{MacAddr, NetConfig, TapSource};
pub use self::output::Output;
pub use self::rate::{RateLimit, RateLimits};
pub use self::resize::Resize;
pub use self::transport::TransportConfig;
pub use self::vsock::VsockConfig;

use self::names::{DISK, FS, NET, Names, VSOCK};
use self::rate::RATES;
use self::unsupported::ONE_PACKAGE;

/// Fields of a client's JSON that podvmm has no use for, as the client wrote them.
pub type Others = Map<String, Value>;

/// A whole VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// What to boot.
    pub payload: PayloadConfig,
    /// The VM's vCPUs.
    pub cpus: CpusConfig,
    /// The VM's RAM.
    pub memory: MemoryConfig,
    /// Disks in the order the guest finds them: the first is `/dev/vda`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network devices in the order the guest finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Shares in the order the guest finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    /// vsock, if there is to be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The memory balloon, if there is to be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// The entropy device, which every VM has.
    pub rng: RngConfig,
    /// The first serial port, `ttyS0`.
    pub serial: Output,
    /// The virtio console, `hvc0`.
    pub console: Output,
    /// How the guest reaches its virtio devices.
    pub transport: TransportConfig,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

impl Default for VmConfig {
    /// A VM that has nothing to boot yet.
    fn default() -> Self {
        Self {
            payload: PayloadConfig::default(),
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            disks: Vec::new(),
            net: Vec::new(),
            fs: Vec::new(),
            vsock: None,
            balloon: None,
            rng: RngConfig::default(),
            serial: Output::Null,
            console: Output::Off,
            transport: TransportConfig::default(),
            others: Others::new(),
        }
    }
}

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PayloadConfig {
    /// An ELF image (`vmlinux`) or a bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system, a cpio archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Command line; podvmm appends what its devices and this host's KVM need.
    pub cmdline: String,
    /// What podvmm's agent is to obey in a pod, as docs/guest-contract.md has it: it finds the text in a file
    /// that follows the initramfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_policy: Option<String>,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

impl PayloadConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::Missing("kernel"));
        }
        // It would be handed to no agent.
        if self.agent_policy.is_some() && self.initramfs.is_none() {
            return Err(ConfigError::Missing("initramfs"));
        }
        Ok(())
    }
}

/// Where the guest's random numbers come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RngConfig {
    /// The source that the client named.
    pub src: RngSource,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

/// A source of random numbers. Each of them stands for the host's random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each is what it is called in JSON")]
pub enum RngSource {
    #[default]
    #[serde(rename = "/dev/urandom")]
    Urandom,
    #[serde(rename = "/dev/random")]
    Random,
    #[serde(rename = "/dev/hwrng")]
    Hwrng,
}

/// A part of a VM that is written in JSON by clients, and on a command line by users.
pub trait Part: DeserializeOwned {
    /// The part's key in the JSON of a VM.
    const SECTION: &'static str;
    /// How the part is written on a command line, in pieces after which a line may end:
    /// `path=FILE`, and `[,readonly=on]` for what may be left out. What is given here are the keys
    /// there are.
    const USAGE: &'static [&'static str];

    /// The part itself, if all of it is in range, with the defaults that depend on other fields.
    fn checked(self) -> Result<Self, ConfigError>;

    /// The paths of the host's that podvmm opens for it.
    fn host_paths(&self) -> Vec<HostPath> {
        Vec::new()
    }

    /// Reads `key=value,key=value`.
    fn from_options(text: &str) -> Result<Self, ConfigError> {
        Options::parse(text, Self::USAGE)?.read::<Self>()?.checked()
    }

    /// Reads JSON, held to the same as in a whole VM.
    fn from_json(body: &[u8]) -> Result<Self, JsonError> {
        checked(part(body)?)
    }
}

/// Reads a part alone, which may be out of range.
fn part<T: Part>(body: &[u8]) -> Result<T, JsonError> {
    let mut json = json::value(body)?;
    json::remove_nulls(&mut json);
    // Of some there is one in a VM, of others an array.
    unsupported::refuse(&json!({ T::SECTION: json }))?;
    unsupported::refuse(&json!({ T::SECTION: [json] }))?;
    Ok(json::from_value(json)?)
}

/// Options of podvmm's command line that each describe a part of a VM, and how they are written.
pub const PARTS: &[(&str, &[&str])] = &[
    ("cpus", CpusConfig::USAGE),
    ("memory", MemoryConfig::USAGE),
    ("balloon", BalloonConfig::USAGE),
    ("disk", DiskConfig::USAGE),
    ("net", NetConfig::USAGE),
    ("fs", FsConfig::USAGE),
    ("vsock", VsockConfig::USAGE),
];

/// A device to be added to a VM.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each is what it holds")]
pub enum Addition {
    Disk(DiskConfig),
    Fs(FsConfig),
    Net(NetConfig),
    Vsock(VsockConfig),
}

fn at(path: &'static str) -> impl Fn(ConfigError) -> JsonError {
    move |source| JsonError::Config { path, source }
}

impl VmConfig {
    /// Reads the body of vm.create.
    pub fn parse(body: &[u8]) -> Result<Self, JsonError> {
        Self::read(json::value(body)?, Vec::new())
    }

    /// Reads the config.json of a snapshot, with what `patch` changes in it (RFC 7396, JSON Merge
    /// Patch). `fds` stand for the taps of networks without one, in their order.
    pub fn restored(body: &[u8], patch: &Value, fds: Vec<OwnedFd>) -> Result<Self, JsonError> {
        let mut json = json::value(body)?;
        json::merge(&mut json, patch);
        Self::read(json, fds)
    }

    fn read(mut json: Value, fds: Vec<OwnedFd>) -> Result<Self, JsonError> {
        json::remove_nulls(&mut json);
        unsupported::refuse(&json)?;
        let mut vm: Self = json::from_value(json)?;
        let mut fds = fds.into_iter();
        for net in &mut vm.net {
            net.take_fds(&mut fds);
        }
        // Kata asks for what is left of the host's memory, of any size.
        vm.memory = vm.memory.with_possible_hotplug();
        vm.checked()
    }

    /// The VM itself, if each of its parts is in range.
    fn checked(self) -> Result<Self, JsonError> {
        self.payload.check().map_err(at("payload"))?;
        Ok(Self {
            cpus: checked(self.cpus)?,
            memory: checked(self.memory)?,
            disks: all_checked(self.disks)?,
            net: all_checked(self.net)?,
            fs: all_checked(self.fs)?,
            vsock: self.vsock.map(checked).transpose()?,
            balloon: self.balloon.map(checked).transpose()?,
            ..self
        })
    }

    /// Whether each of its parts is in range, they go together, and all can be written. A program that
    /// fills the structs itself has not been through [`VmConfig::parse`].
    pub fn check(&self) -> Result<(), ConfigError> {
        self.payload.check()?;
        in_range(&self.cpus)?;
        in_range(&self.memory)?;
        self.disks.iter().try_for_each(in_range)?;
        self.net.iter().try_for_each(in_range)?;
        self.fs.iter().try_for_each(in_range)?;
        self.vsock.iter().try_for_each(in_range)?;
        self.balloon.iter().try_for_each(in_range)?;
        for (index, share) in self.fs.iter().enumerate() {
            let tag = || share.tag.clone();
            if self.fs[..index].iter().any(|other| other.tag == share.tag) {
                return Err(ConfigError::TagTwice(tag()));
            }
            let elsewhere = matches!(share.source()?, FsSource::Socket(_));
            if elsewhere && !self.memory.shared && !self.memory.hugepages {
                return Err(ConfigError::PrivateRam(tag()));
            }
        }
        names::check(self.ids())?;
        let written = serde_json::to_value(self);
        written.map(drop).map_err(ConfigError::Unwritable)
    }

    /// What `vm.info` and a snapshot's config.json say of it.
    pub fn json(&self) -> Value {
        serde_json::to_value(self).expect("`check` has seen that it can be written")
    }

    /// The paths of the host's that podvmm opens for the VM.
    pub fn host_paths(&self) -> Vec<HostPath> {
        let files = [Some(&self.payload.kernel), self.payload.initramfs.as_ref()];
        let mut paths: Vec<_> = files
            .into_iter()
            .flatten()
            .map(|it| HostPath::read(it))
            .collect();
        paths.extend(self.serial.host_path());
        paths.extend(self.console.host_path());
        paths.extend(self.disks.iter().flat_map(Part::host_paths));
        paths.extend(self.net.iter().flat_map(Part::host_paths));
        paths.extend(self.fs.iter().flat_map(Part::host_paths));
        paths.extend(self.vsock.iter().flat_map(Part::host_paths));
        paths
    }

    /// Adds or replaces the part that `option`, one of [`PARTS`], describes by `text`.
    pub fn give(&mut self, option: &str, text: &str) -> Result<(), ConfigError> {
        match option {
            "cpus" => self.cpus = Part::from_options(text)?,
            "memory" => self.memory = Part::from_options(text)?,
            "balloon" => self.balloon = Some(Part::from_options(text)?),
            "disk" => self.disks.push(Part::from_options(text)?),
            "net" => self.net.push(Part::from_options(text)?),
            "fs" => self.fs.push(Part::from_options(text)?),
            "vsock" => self.vsock = Some(Part::from_options(text)?),
            other => return Err(ConfigError::NoSuchPart(other.into())),
        }
        Ok(())
    }

    /// Adds a device. Returns the name that it has from now on.
    pub fn add(&mut self, addition: Addition) -> String {
        let mut names = self.names();
        match addition {
            Addition::Disk(mut disk) => {
                let id = names.give(&mut disk.id, DISK);
                self.disks.push(disk);
                id
            }
            Addition::Net(mut net) => {
                let id = names.give(&mut net.id, NET);
                self.net.push(net);
                id
            }
            Addition::Fs(mut share) => {
                let id = names.give(&mut share.id, FS);
                self.fs.push(share);
                id
            }
            Addition::Vsock(mut vsock) => {
                let id = vsock.id.get_or_insert_with(|| VSOCK.into()).clone();
                self.vsock = Some(vsock);
                id
            }
        }
    }

    /// Takes away the device of that name. False if there is none.
    pub fn remove(&mut self, id: &str) -> bool {
        let before = self.ids().count();
        let is_another = |other: &Option<String>| other.as_deref() != Some(id);
        self.disks.retain(|disk| is_another(&disk.id));
        self.net.retain(|net| is_another(&net.id));
        self.fs.retain(|share| is_another(&share.id));
        self.vsock = self.vsock.take().filter(|vsock| is_another(&vsock.id));
        self.ids().count() < before
    }

    /// Gives each device that has no name the first that is free of `disk0`, `disk1`, ..., `net0`, `fs0`,
    /// `vsock`. It keeps it whatever comes and goes beside it, and over a snapshot.
    pub fn name_devices(&mut self) {
        let mut names = self.names();
        for disk in &mut self.disks {
            names.give(&mut disk.id, DISK);
        }
        for net in &mut self.net {
            names.give(&mut net.id, NET);
        }
        for share in &mut self.fs {
            names.give(&mut share.id, FS);
        }
        if let Some(vsock) = &mut self.vsock {
            vsock.id.get_or_insert_with(|| VSOCK.into());
        }
    }

    fn names(&self) -> Names {
        Names::of(self.ids())
    }

    /// The names of the devices that have one.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().map(|disk| &disk.id);
        let networks = self.net.iter().map(|net| &net.id);
        let shares = self.fs.iter().map(|share| &share.id);
        let vsock = self.vsock.iter().map(|vsock| &vsock.id);
        let all = disks.chain(networks).chain(shares).chain(vsock);
        all.filter_map(Option::as_deref)
    }
}

fn in_range<T: Part + Clone>(part: &T) -> Result<(), ConfigError> {
    part.clone().checked().map(drop)
}

fn checked<T: Part>(part: T) -> Result<T, JsonError> {
    part.checked().map_err(at(T::SECTION))
}

fn all_checked<T: Part>(parts: Vec<T>) -> Result<Vec<T>, JsonError> {
    parts.into_iter().map(checked).collect()
}

/// Why JSON was refused.
#[derive(Debug, Error)]
pub enum JsonError {
    /// The text is no JSON, or JSON of the wrong kind.
    #[error(transparent)]
    Misread(#[from] Misread),
    /// The JSON asks for what podvmm does not have.
    #[error("{path}: {why}")]
    Unsupported {
        /// The field that asks for it.
        path: String,
        /// Why podvmm does not have it.
        why: &'static str,
    },
    /// A part of the VM is out of range.
    #[error("{path}")]
    Config {
        /// The part of the VM.
        path: &'static str,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
}

/// Why an option was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The option's text does not parse.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A number or size out of range.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// An option that is none of [`PARTS`].
    #[error("there is no option --{0} for a part of a VM")]
    NoSuchPart(String),
    /// A key without which nothing could be made is missing.
    #[error("'{0}' is missing")]
    Missing(&'static str),
    /// Fewer vCPUs at most than at boot.
    #[error("max={max} is less than boot={boot}")]
    MaxBelowBoot {
        /// vCPUs at boot.
        boot: CpuCount,
        /// vCPUs at most.
        max: CpuCount,
    },
    /// A CPU topology of another shape than guests have.
    #[error("topology.cores_per_die: {ONE_PACKAGE}")]
    CoresPerDie,
    /// A `hotplug_size` that is not whole blocks of 128 MiB, by which Linux adds memory.
    #[error("hotplug_size={0} is not a multiple of 128M")]
    HotplugUnaligned(ByteSize),
    /// RAM that with `hotplug_size` would go past what physical addresses reach.
    #[error("{0} of RAM with hotplug_size: {max} at most is possible", max = RamSize::MAX)]
    HotplugTooLarge(ByteSize),
    /// More plugged at start than can be plugged.
    #[error("hotplugged_size={plugged} is more than hotplug_size={most}")]
    HotpluggedTooLarge {
        /// Size that was to be plugged at the start.
        plugged: ByteSize,
        /// Size that can be plugged at most.
        most: ByteSize,
    },
    /// A number of queues that is not 1 to 16.
    #[error("queues={0}: 1 to 16 are possible")]
    Queues(u16),
    /// A queue size that is out of range or not a power of two.
    #[error("queue_size={size} is not a power of two from {least} to 1024")]
    QueueSize {
        /// The size that was asked for, in descriptors.
        size: u16,
        /// The fewest descriptors that a queue of such a device can have.
        least: u16,
    },
    /// A serial number longer than the 20 bytes that virtio-blk has room for (virtio 1.3 §5.2.6).
    #[error("the serial number '{0}' is longer than 20 bytes")]
    SerialTooLong(String),
    /// A guest's address that is reserved for others (virtio 1.3 §5.10.4).
    #[error("cid={0}: 3 to 4294967294 is possible")]
    Cid(u32),
    /// A socket's path that is longer than unix sockets allow.
    #[error("the socket's path is {len} bytes long, {max} is possible")]
    SocketPath {
        /// Length of the path, in bytes.
        len: usize,
        /// Longest path that leaves room for a port behind it, in bytes.
        max: usize,
    },
    /// A network device without a host side, or with two.
    #[error("give either tap=NAME or fd=N")]
    TapOrFd,
    /// A value of `fd` that is not the number of a descriptor.
    #[error("fd='{0}' is not a number")]
    Fd(String),
    /// A descriptor that is one of podvmm's own standard streams.
    #[error("fd={0} is a standard stream, not a tap")]
    StandardFd(i32),
    /// A number of queues that is not even: they come in pairs.
    #[error("num_queues={0}: queues come in pairs")]
    OddQueues(u16),
    /// Not as many descriptors as pairs of queues: each pair has one.
    #[error("{pairs} pairs of queues with {fds} descriptors: one goes with each")]
    Pairs {
        /// Pairs of queues that are wanted.
        pairs: u16,
        /// Descriptors that were given.
        fds: usize,
    },
    /// An MTU below the 68 bytes that IPv4 needs (RFC 791).
    #[error("mtu={0}: 68 to 65535 is possible")]
    Mtu(u16),
    /// A rate whose size or refill time is 0: nothing would ever go.
    #[error("a rate needs a size and a refill time, each at least 1")]
    ZeroRate,
    /// A tag that is not 1 to 36 bytes without NUL, which is what virtio-fs has room for.
    #[error("tag='{0}': 1 to 36 bytes without NUL are possible")]
    Tag(String),
    /// Two shares with one tag: the guest could not tell them apart.
    #[error("two shares have the tag '{0}'")]
    TagTwice(String),
    /// A device's name that is not of 1 to 64 letters, digits, `.`, `_` and `-`.
    #[error("id='{0}': 1 to 64 letters, digits, '.', '_' and '-' are possible")]
    Id(String),
    /// A device's name that a device which each VM can have, or a thread, has.
    #[error("id='{0}' is the name of another part of podvmm")]
    IdTaken(String),
    /// Two devices with one name: vm.remove-device could not tell them apart.
    #[error("two devices have the id '{0}'")]
    IdTwice(String),
    /// A share that no process serves, or two do.
    #[error("give either shared_dir=FOLDER or socket=PATH")]
    FolderOrSocket,
    /// An option of podvmm's own server.
    #[error("{0}: the process that serves the socket has options of its own")]
    NotOurShare(&'static str),
    /// RAM that the process that serves a share could not map.
    #[error("the share '{0}' is served by another process, which needs memory with shared=on")]
    PrivateRam(String),
    /// A text that is not a MAC address, or the address of a group.
    #[error("'{0}' is not the address of one device, such as 02:00:00:00:00:01")]
    Mac(String),
    /// A path that JSON cannot say, so no client and no snapshot could.
    #[error("write it as JSON")]
    Unwritable(#[source] serde_json::Error),
    /// A text that names no transport.
    #[error("'{0}' is none of mmio, pci")]
    Transport(String),
    /// A text that names no kind of output.
    #[error("'{0}' is none of off, null, tty, file=PATH, socket=PATH")]
    Output(String),
}

/// Whether a device can have `count` queues, or pairs of them, of `size` descriptors.
fn check_queues(count: u16, size: u16, least: u16) -> Result<(), ConfigError> {
    if !(1..=16).contains(&count) {
        return Err(ConfigError::Queues(count));
    }
    if !size.is_power_of_two() || !(least..=1024).contains(&size) {
        return Err(ConfigError::QueueSize { size, least });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
