//! The parts of a VM as they are written in JSON. Every field may be missing or null, but where a
//! VM makes no sense without.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use crate::config::{
    BalloonConfig, ConfigError, CpusConfig, DiskConfig, FolderConfig, FsCache, FsConfig, FsSource,
    KernelConfig, MemoryConfig, NetConfig, Output, RateLimit, RateLimits, TapSource, VmConfig,
    VsockConfig,
};
use crate::error::JsonError;
use crate::units::ByteSize;

use super::unsupported::ONE_PACKAGE;

#[derive(Debug, Deserialize)]
pub(super) struct VmJson {
    payload: PayloadJson,
    cpus: Option<CpusJson>,
    memory: Option<MemoryJson>,
    disks: Option<Vec<DiskJson>>,
    #[expect(dead_code, reason = "parsing it checks it")]
    rng: Option<RngJson>,
    balloon: Option<BalloonJson>,
    net: Option<Vec<NetJson>>,
    fs: Option<Vec<FsJson>>,
    vsock: Option<VsockJson>,
    serial: Option<ConsoleJson>,
    console: Option<ConsoleJson>,
}

#[derive(Debug, Deserialize)]
struct PayloadJson {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: Option<String>,
}

#[derive(Debug, Deserialize)]
struct CpusJson {
    boot_vcpus: u8,
    max_vcpus: Option<u8>,
    topology: Option<TopologyJson>,
}

/// The rest of it is the same for every VM ([`unsupported`](super::unsupported)).
#[derive(Debug, Deserialize)]
struct TopologyJson {
    cores_per_die: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct MemoryJson {
    /// Bytes.
    size: Option<u64>,
    /// Bytes.
    hotplug_size: Option<u64>,
    /// Bytes.
    hotplugged_size: Option<u64>,
    hugepages: Option<bool>,
    thp: Option<bool>,
    shared: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct BalloonJson {
    /// Bytes.
    size: Option<u64>,
    deflate_on_oom: Option<bool>,
    free_page_reporting: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct DiskJson {
    path: PathBuf,
    readonly: Option<bool>,
    direct: Option<bool>,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    serial: Option<String>,
    rate_limiter_config: Option<RatesJson>,
    #[expect(dead_code, reason = "parsing it checks it")]
    image_type: Option<ImageType>,
}

/// Kata's Rust client does not know what its images are, and they are raw.
#[derive(Debug, Deserialize)]
enum ImageType {
    Raw,
    Unknown,
}

#[derive(Debug, Deserialize)]
struct RngJson {
    #[expect(dead_code, reason = "parsing it checks it")]
    src: Option<RngSource>,
}

/// Any of them stands for the host's random numbers.
#[derive(Debug, Deserialize)]
enum RngSource {
    #[serde(rename = "/dev/urandom")]
    Urandom,
    #[serde(rename = "/dev/random")]
    Random,
    #[serde(rename = "/dev/hwrng")]
    Hwrng,
}

#[derive(Debug, Deserialize)]
pub(super) struct NetJson {
    tap: Option<String>,
    mac: Option<String>,
    mtu: Option<u16>,
    /// Two for each pair.
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    offload_tso: Option<bool>,
    offload_ufo: Option<bool>,
    offload_csum: Option<bool>,
    rate_limiter_config: Option<RatesJson>,
}

#[derive(Debug, Deserialize)]
struct RatesJson {
    bandwidth: Option<RateJson>,
    ops: Option<RateJson>,
}

#[derive(Debug, Deserialize)]
struct RateJson {
    size: u64,
    one_time_burst: Option<u64>,
    /// Milliseconds.
    refill_time: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct FsJson {
    tag: String,
    socket: Option<PathBuf>,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    /// From here on podvmm's own: Cloud Hypervisor does not serve shares itself.
    shared_dir: Option<PathBuf>,
    readonly: Option<bool>,
    cache: Option<CacheMode>,
    writeback: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CacheMode {
    None,
    Auto,
    Always,
}

#[derive(Debug, Deserialize)]
pub(super) struct VsockJson {
    cid: u32,
    socket: PathBuf,
}

#[derive(Debug, Deserialize)]
struct ConsoleJson {
    mode: Mode,
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
enum Mode {
    Off,
    Null,
    Tty,
    File,
    Socket,
}

impl VmJson {
    /// `fds` stand for the taps of networks without one.
    pub(super) fn config(self, fds: Vec<OwnedFd>) -> Result<VmConfig, JsonError> {
        let mut fds = fds.into_iter();
        let disks = self.disks.unwrap_or_default().into_iter();
        let nets = self.net.unwrap_or_default().into_iter();
        let shares = self.fs.unwrap_or_default().into_iter();
        Ok(VmConfig {
            kernel: KernelConfig {
                path: self.payload.kernel,
                initramfs: self.payload.initramfs,
                cmdline: self.payload.cmdline.unwrap_or_default(),
            },
            cpus: self
                .cpus
                .map_or(Ok(CpusConfig::default()), CpusJson::config)?,
            memory: self
                .memory
                .map_or(Ok(MemoryConfig::default()), MemoryJson::config)?,
            balloon: self.balloon.map(BalloonJson::config),
            disks: disks.map(DiskJson::config).collect::<Result<_, _>>()?,
            nets: nets
                .map(|net| {
                    let own = net.descriptors();
                    net.config(fds.by_ref().take(own).collect())
                })
                .collect::<Result<_, _>>()?,
            shares: shares.map(FsJson::config).collect::<Result<_, _>>()?,
            vsock: self.vsock.map(VsockJson::config).transpose()?,
            serial: self
                .serial
                .map_or(Ok(Output::Null), |serial| serial.output("serial"))?,
            console: self
                .console
                .map_or(Ok(Output::Off), |console| console.output("console"))?,
        })
    }
}

fn at(path: &'static str) -> impl Fn(ConfigError) -> JsonError {
    move |source| JsonError::Config { path, source }
}

impl CpusJson {
    fn config(self) -> Result<CpusConfig, JsonError> {
        let max = self.max_vcpus.unwrap_or(self.boot_vcpus);
        let cores = self.topology.and_then(|topology| topology.cores_per_die);
        if cores.is_some_and(|cores| cores != 0 && cores != u32::from(max)) {
            return Err(JsonError::Unsupported {
                path: "cpus.topology.cores_per_die".into(),
                why: ONE_PACKAGE,
            });
        }
        CpusConfig::new(self.boot_vcpus, max).map_err(at("cpus"))
    }
}

impl MemoryJson {
    fn config(self) -> Result<MemoryConfig, JsonError> {
        let default = MemoryConfig::default();
        let size = match self.size {
            None => default.size,
            Some(bytes) => ByteSize(bytes)
                .try_into()
                .map_err(|error| at("memory.size")(ConfigError::Unit(error)))?,
        };
        MemoryConfig {
            size,
            hotplug_size: ByteSize(self.hotplug_size.unwrap_or(0)),
            hotplugged_size: ByteSize(self.hotplugged_size.unwrap_or(0)),
            hugepages: self.hugepages.unwrap_or(default.hugepages),
            thp: self.thp.unwrap_or(default.thp),
            shared: self.shared.unwrap_or(default.shared),
        }
        .with_possible_hotplug()
        .checked()
        .map_err(at("memory"))
    }
}

impl BalloonJson {
    fn config(self) -> BalloonConfig {
        BalloonConfig {
            size: ByteSize(self.size.unwrap_or(0)),
            deflate_on_oom: self.deflate_on_oom.unwrap_or(false),
            free_page_reporting: self.free_page_reporting.unwrap_or(false),
        }
    }
}

impl DiskJson {
    pub(super) fn config(self) -> Result<DiskConfig, JsonError> {
        let default = DiskConfig::new(self.path, self.readonly.unwrap_or(false));
        DiskConfig {
            direct: self.direct.unwrap_or(default.direct),
            queues: self.num_queues.unwrap_or(default.queues),
            queue_size: self.queue_size.unwrap_or(default.queue_size),
            id: self.serial,
            rates: RatesJson::rates(self.rate_limiter_config),
            ..default
        }
        .checked()
        .map_err(at("disks"))
    }
}

impl NetJson {
    /// How many descriptors stand for its tap: one for each pair of queues.
    fn descriptors(&self) -> usize {
        match self.tap {
            Some(_) => 0,
            None => self.num_queues.map_or(1, |queues| queues / 2).into(),
        }
    }

    /// `fds` came with the request, and stand for the tap.
    pub(super) fn config(self, fds: Vec<OwnedFd>) -> Result<NetConfig, JsonError> {
        let tap = match (self.tap, fds.is_empty()) {
            (_, false) => TapSource::Passed(fds.into_iter().map(Arc::new).collect()),
            (Some(name), true) => TapSource::Name(name),
            (None, true) => return Err(at("net")(ConfigError::TapOrFd)),
        };
        let default = NetConfig::new(tap);
        let mac = self.mac.map(|mac| mac.parse()).transpose();
        let queues = self.num_queues.unwrap_or(2 * default.pairs);
        if !queues.is_multiple_of(2) {
            return Err(JsonError::Unsupported {
                path: "net.num_queues".into(),
                why: "queues come in pairs",
            });
        }
        NetConfig {
            mac: mac.map_err(at("net.mac"))?.unwrap_or(default.mac),
            mtu: self.mtu,
            pairs: queues / 2,
            queue_size: self.queue_size.unwrap_or(default.queue_size),
            offload_tso: self.offload_tso.unwrap_or(true),
            offload_ufo: self.offload_ufo.unwrap_or(true),
            offload_csum: self.offload_csum.unwrap_or(true),
            rates: RatesJson::rates(self.rate_limiter_config),
            ..default
        }
        .checked()
        .map_err(at("net"))
    }
}

impl RatesJson {
    fn rates(json: Option<Self>) -> RateLimits {
        let rate = |json: RateJson| RateLimit {
            size: json.size,
            one_time_burst: json.one_time_burst.unwrap_or(0),
            refill_time_ms: json.refill_time,
        };
        json.map_or_else(RateLimits::default, |json| RateLimits {
            bandwidth: json.bandwidth.map(rate),
            operations: json.ops.map(rate),
        })
    }
}

impl FsJson {
    pub(super) fn config(self) -> Result<FsConfig, JsonError> {
        let source = match (self.shared_dir, self.socket) {
            (Some(path), None) => FsSource::Folder(FolderConfig {
                path,
                readonly: self.readonly.unwrap_or(false),
                cache: match self.cache {
                    None => FsCache::default(),
                    Some(CacheMode::None) => FsCache::None,
                    Some(CacheMode::Auto) => FsCache::Auto,
                    Some(CacheMode::Always) => FsCache::Always,
                },
                writeback: self.writeback.unwrap_or(false),
            }),
            (None, Some(socket)) => FsSource::Socket(socket),
            _ => return Err(at("fs")(ConfigError::FolderOrSocket)),
        };
        let default = FsConfig::new(self.tag, source);
        FsConfig {
            queues: self.num_queues.unwrap_or(default.queues),
            queue_size: self.queue_size.unwrap_or(default.queue_size),
            ..default
        }
        .checked()
        .map_err(at("fs"))
    }
}

impl VsockJson {
    pub(super) fn config(self) -> Result<VsockConfig, JsonError> {
        let Self { cid, socket } = self;
        VsockConfig { cid, socket }.checked().map_err(at("vsock"))
    }
}

impl ConsoleJson {
    fn output(self, path: &'static str) -> Result<Output, JsonError> {
        let needs = |why| JsonError::Unsupported {
            path: path.into(),
            why,
        };
        match self.mode {
            Mode::Off => Ok(Output::Off),
            Mode::Null => Ok(Output::Null),
            Mode::Tty => Ok(Output::Tty),
            Mode::File => match self.file {
                Some(file) => Ok(Output::File(file)),
                None => Err(needs("mode File needs a file")),
            },
            Mode::Socket => match self.socket {
                Some(socket) => Ok(Output::Socket(socket)),
                None => Err(needs("mode Socket needs a socket")),
            },
        }
    }
}
