//! What a VM is made of, a file for each kind of part.

mod balloon;
mod cpus;
mod disk;
mod fs;
mod memory;
mod net;
mod output;
mod rate;
mod vsock;

use std::path::PathBuf;

use thiserror::Error;

use crate::options::OptionsError;
use crate::units::{ByteSize, CpuCount, RamSize, UnitError};

pub use self::balloon::BalloonConfig;
pub use self::cpus::CpusConfig;
pub use self::disk::DiskConfig;
pub use self::fs::{FolderConfig, FsCache, FsConfig, FsSource};
pub use self::memory::MemoryConfig;
pub use self::net::{MacAddr, NetConfig, TapSource};
pub use self::output::Output;
pub use self::rate::{RateLimit, RateLimits};
pub use self::vsock::VsockConfig;

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
    /// The memory balloon, if there is to be one.
    pub balloon: Option<BalloonConfig>,
    /// Network devices in the order the guest finds them.
    pub nets: Vec<NetConfig>,
    /// Shares in the order the guest finds them.
    pub shares: Vec<FsConfig>,
    /// vsock, if there is to be one.
    pub vsock: Option<VsockConfig>,
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

/// Why an option was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It does not parse.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A number or size out of range.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Fewer vCPUs at most than at boot.
    #[error("max={max} is less than boot={boot}")]
    MaxBelowBoot {
        /// vCPUs at boot.
        boot: CpuCount,
        /// vCPUs at most.
        max: CpuCount,
    },
    /// Linux adds memory by this much.
    #[error("hotplug_size={0} is not a multiple of 128M")]
    HotplugUnaligned(ByteSize),
    /// Past what physical addresses reach.
    #[error("{0} of RAM with hotplug_size: {max} at most is possible", max = RamSize::MAX)]
    HotplugTooLarge(ByteSize),
    /// More plugged at start than can be plugged.
    #[error("hotplugged_size={plugged} is more than hotplug_size={most}")]
    HotpluggedTooLarge {
        /// Plugged at start.
        plugged: ByteSize,
        /// At most.
        most: ByteSize,
    },
    /// Out of range.
    #[error("queues={0}: 1 to 16 are possible")]
    Queues(u16),
    /// Out of range.
    #[error("queue_size={size} is not a power of two from {least} to 1024")]
    QueueSize {
        /// What was asked for.
        size: u16,
        /// Fewest such a device can have.
        least: u16,
    },
    /// virtio-blk has room for 20 bytes.
    #[error("id='{0}' is longer than 20 bytes")]
    IdTooLong(String),
    /// Reserved for others (virtio 1.3 §5.10.4).
    #[error("cid={0}: 3 to 4294967294 is possible")]
    Cid(u32),
    /// Longer than unix sockets allow.
    #[error("the socket's path is {len} bytes long, {max} is possible")]
    SocketPath {
        /// Of the path.
        len: usize,
        /// With room for a port behind it.
        max: usize,
    },
    /// A network device without a host side, or with two.
    #[error("give either tap=NAME or fd=N")]
    TapOrFd,
    /// Not a descriptor.
    #[error("fd='{0}' is not a number")]
    Fd(String),
    /// podvmm's own.
    #[error("fd={0} is a standard stream, not a tap")]
    StandardFd(i32),
    /// A pair has one descriptor.
    #[error("{pairs} pairs of queues with {fds} descriptors: one goes with each")]
    Pairs {
        /// Wanted.
        pairs: u16,
        /// Given.
        fds: usize,
    },
    /// IPv4 needs 68 (RFC 791).
    #[error("mtu={0}: 68 to 65535 is possible")]
    Mtu(u16),
    /// Nothing would ever go.
    #[error("a rate's size and refill time are at least 1")]
    ZeroRate,
    /// What virtio-fs has room for.
    #[error("tag='{0}': 1 to 36 bytes without NUL are possible")]
    Tag(String),
    /// The guest could not tell them apart.
    #[error("two shares have the tag '{0}'")]
    TagTwice(String),
    /// A share that nobody serves, or two do.
    #[error("give either shared_dir=FOLDER or socket=PATH")]
    FolderOrSocket,
    /// An option of podvmm's own server.
    #[error("'{0}' is for whoever serves the socket to say")]
    NotOurShare(&'static str),
    /// Another process must be able to map RAM.
    #[error("the share '{0}' is served by another process, which needs memory with shared=on")]
    PrivateRam(String),
    /// Not a MAC address, or one of a group.
    #[error("'{0}' is not the address of one device, such as 02:00:00:00:00:01")]
    Mac(String),
    /// No such output.
    #[error("'{0}' is none of off, null, tty, file=PATH, socket=PATH")]
    Output(String),
}

impl VmConfig {
    /// Whether its parts go together.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (index, share) in self.shares.iter().enumerate() {
            let tag = || share.tag.clone();
            if self.shares[..index]
                .iter()
                .any(|other| other.tag == share.tag)
            {
                return Err(ConfigError::TagTwice(tag()));
            }
            let elsewhere = matches!(share.source, FsSource::Socket(_));
            if elsewhere && !self.memory.shared && !self.memory.hugepages {
                return Err(ConfigError::PrivateRam(tag()));
            }
        }
        Ok(())
    }
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
mod tests {
    use std::fmt::Debug;
    use std::str::FromStr;

    use super::ConfigError;

    /// What the user reads when `text` is refused as a `T`.
    pub(super) fn refusal<T: FromStr<Err = ConfigError> + Debug>(text: &str) -> String {
        crate::error::tests::printed(&text.parse::<T>().unwrap_err())
    }
}
