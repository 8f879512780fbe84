//! What a VM is made of.

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::options::{Options, OptionsError};
use crate::units::{CpuCount, RamSize};

/// A whole VM.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// What to boot.
    pub kernel: KernelConfig,
    /// vCPUs.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// Disks in the order the guest finds them: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// The first serial port, `ttyS0`.
    pub serial: Output,
    /// The virtio console, `hvc0`.
    pub console: Output,
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// An ELF image (`vmlinux`) or a bzImage.
    pub path: PathBuf,
    /// Initial RAM file system, a cpio archive.
    pub initramfs: Option<PathBuf>,
    /// Command line; podvmm appends what its devices and this host's KVM need.
    pub cmdline: String,
}

/// vCPUs: `boot=N[,max=M]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpusConfig {
    boot: CpuCount,
    max: CpuCount,
}

impl CpusConfig {
    /// vCPUs that run from the start.
    pub fn boot(&self) -> CpuCount {
        self.boot
    }

    /// vCPUs the VM can grow to, at least `boot`.
    pub fn max(&self) -> CpuCount {
        self.max
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot: CpuCount::ONE,
            max: CpuCount::ONE,
        }
    }
}

/// RAM: `size=S[,hugepages=on][,thp=off][,shared=on]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// How much.
    pub size: RamSize,
    /// Back it by 2 MiB pages from the host's pool (hugetlbfs).
    pub hugepages: bool,
    /// Let the host use transparent huge pages.
    pub thp: bool,
    /// Back it by a memfd that other processes can map.
    pub shared: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: RamSize::default(),
            hugepages: false,
            thp: true,
            shared: false,
        }
    }
}

/// A raw disk image or block device:
/// `path=F[,readonly=on][,direct=on][,queues=N][,queue_size=N][,id=S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// File or block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Request queues, 1 to 16.
    pub queues: u16,
    /// Descriptors in each queue, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub id: Option<String>,
}

impl DiskConfig {
    /// A disk on `path` with defaults for everything else.
    pub fn new(path: PathBuf, readonly: bool) -> Self {
        Self {
            path,
            readonly,
            direct: false,
            queues: 1,
            queue_size: 128,
            id: None,
        }
    }
}

/// Where a serial port's or console's bytes go, and come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// There is no such device.
    Off,
    /// It is there; what it prints is kept only for the message of a crash.
    Null,
    /// podvmm's own terminal or standard streams.
    Tty,
    /// Appended to a file.
    File(PathBuf),
}

/// Why an option was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It does not parse.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Fewer vCPUs at most than at boot.
    #[error("max={max} is less than boot={boot}")]
    MaxBelowBoot {
        /// vCPUs at boot.
        boot: CpuCount,
        /// vCPUs at most.
        max: CpuCount,
    },
    /// Out of range.
    #[error("queues={0}: 1 to 16 are possible")]
    Queues(u16),
    /// Out of range.
    #[error("queue_size={0} is not a power of two from 4 to 1024")]
    QueueSize(u16),
    /// virtio-blk has room for 20 bytes.
    #[error("id='{0}' is longer than 20 bytes")]
    IdTooLong(String),
    /// No such output.
    #[error("'{0}' is none of off, null, tty, file=PATH")]
    Output(String),
}

impl FromStr for CpusConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["boot", "max"])?;
        let boot = options.required("boot")?;
        let max = options.value("max")?.unwrap_or(boot);
        if max < boot {
            return Err(ConfigError::MaxBelowBoot { boot, max });
        }
        Ok(Self { boot, max })
    }
}

impl FromStr for MemoryConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["size", "hugepages", "thp", "shared"])?;
        let default = Self::default();
        Ok(Self {
            size: options.value("size")?.unwrap_or(default.size),
            hugepages: options.switch("hugepages", default.hugepages)?,
            thp: options.switch("thp", default.thp)?,
            shared: options.switch("shared", default.shared)?,
        })
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let known = &["path", "readonly", "direct", "queues", "queue_size", "id"];
        let options = Options::parse(text, known)?;
        let default = Self::new(
            options.required("path")?,
            options.switch("readonly", false)?,
        );
        let disk = Self {
            direct: options.switch("direct", default.direct)?,
            queues: options.value("queues")?.unwrap_or(default.queues),
            queue_size: options.value("queue_size")?.unwrap_or(default.queue_size),
            id: options.value("id")?,
            ..default
        };
        if !(1..=16).contains(&disk.queues) {
            return Err(ConfigError::Queues(disk.queues));
        }
        if !disk.queue_size.is_power_of_two() || !(4..=1024).contains(&disk.queue_size) {
            return Err(ConfigError::QueueSize(disk.queue_size));
        }
        match disk.id {
            Some(id) if id.len() > 20 => Err(ConfigError::IdTooLong(id)),
            _ => Ok(disk),
        }
    }
}

impl FromStr for Output {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match (text, text.strip_prefix("file=")) {
            ("off", _) => Ok(Self::Off),
            ("null", _) => Ok(Self::Null),
            ("tty", _) => Ok(Self::Tty),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConfigError::Output(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal<T: FromStr<Err = ConfigError> + std::fmt::Debug>(text: &str) -> String {
        text.parse::<T>().unwrap_err().to_string()
    }

    #[test]
    fn cpus_can_grow_from_boot_to_max() {
        let cpus: CpusConfig = "boot=2,max=4".parse().unwrap();
        assert_eq!((cpus.boot().get(), cpus.max().get()), (2, 4));
        assert_eq!("boot=3".parse::<CpusConfig>().unwrap().max().get(), 3);
    }

    #[test]
    fn nonsense_about_cpus_is_named() {
        assert_eq!(
            refusal::<CpusConfig>("boot=4,max=2"),
            "max=2 is less than boot=4"
        );
        assert_eq!(refusal::<CpusConfig>("max=2"), "'boot' is missing");
        assert_eq!(
            refusal::<CpusConfig>("boot=0"),
            "boot: '0' vCPUs: 1 to 254 is possible"
        );
    }

    #[test]
    fn memory_keeps_its_defaults() {
        let memory: MemoryConfig = "size=1G,shared=on".parse().unwrap();
        let expected = MemoryConfig {
            size: "1G".parse().unwrap(),
            shared: true,
            ..MemoryConfig::default()
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn too_little_memory_is_named() {
        assert_eq!(
            refusal::<MemoryConfig>("size=4M"),
            "size: 4M of RAM: 32M to 1024G is possible"
        );
    }

    #[test]
    fn a_disk_needs_a_path_and_sane_queues() {
        assert_eq!(refusal::<DiskConfig>("readonly=on"), "'path' is missing");
        assert_eq!(
            refusal::<DiskConfig>("path=x,queues=17"),
            "queues=17: 1 to 16 are possible"
        );
        assert_eq!(
            refusal::<DiskConfig>("path=x,queue_size=100"),
            "queue_size=100 is not a power of two from 4 to 1024"
        );
        assert_eq!(
            "path=/x,readonly=on".parse::<DiskConfig>().unwrap(),
            DiskConfig::new("/x".into(), true)
        );
    }

    #[test]
    fn outputs_are_off_null_tty_or_a_file() {
        let outputs = ["off", "null", "tty", "file=/x"].map(|text| text.parse::<Output>().unwrap());
        assert_eq!(
            outputs,
            [
                Output::Off,
                Output::Null,
                Output::Tty,
                Output::File("/x".into())
            ]
        );
        assert_eq!(
            refusal::<Output>("file="),
            "'file=' is none of off, null, tty, file=PATH"
        );
    }
}
