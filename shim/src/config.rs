//! The configuration file: TOML, `/etc/podvmm/config.toml` unless containerd's runtime options name
//! another. What may be asked for by a pod's annotations is listed there too.

mod file;
mod policy;
mod size;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::{RateLimit, RateLimits, TransportConfig};
use protocol::policy::Policy;
use serde::Deserialize;

use self::file::FileError;
pub(crate) use self::size::Size;

/// Where the file is unless the user or containerd names another.
pub(crate) const DEFAULT_PATH: &str = "/etc/podvmm/config.toml";

/// The least memory of a guest, in MiB. Below it a guest does not come up.
const LEAST_MEMORY_MIB: u64 = 64;

/// The most processes of a host (PID_MAX_LIMIT, linux/threads.h).
const MAX_PROCESSES: u32 = 4 << 20;

/// Beyond it numbers are negative to some programs.
const MAX_FIRST_USER: u32 = i32::MAX as u32 - MAX_PROCESSES;

/// How pods are made. Every key may be left out but those of the kernel and what it boots into.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The VMM, found in `PATH` if it has no slash.
    #[serde(default = "podvmm")]
    pub(crate) podvmm: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's first files, with the agent.
    pub(crate) initramfs: Option<PathBuf>,
    /// A read-only disk with a root file system and an agent in it, instead of `initramfs`.
    pub(crate) image: Option<PathBuf>,
    /// How the guest finds its devices: `mmio` or `pci`, which kernels of distributions need.
    #[serde(default)]
    pub(crate) transport: TransportConfig,
    /// Parameters that are added to the kernel's command line.
    #[serde(default)]
    pub(crate) kernel_params: String,
    /// How much is logged: `error`, `warn`, `info`, `debug` or `trace`.
    #[serde(default = "log_level")]
    pub(crate) log_level: log::LevelFilter,
    /// vCPUs of a pod without limits.
    #[serde(default = "default_vcpus")]
    pub(crate) default_vcpus: u8,
    /// Memory of a pod without limits, in MiB, without what the guest itself needs.
    #[serde(default = "default_memory_mib")]
    pub(crate) default_memory_mib: u32,
    /// The most vCPUs that limits can give a VM; without it the host's CPUs.
    pub(crate) max_vcpus: Option<u8>,
    /// The most memory that limits can give a VM, in MiB; without it the host's.
    pub(crate) max_memory_mib: Option<u32>,
    /// Memory that the guest's kernel and agent need besides the pod's limits, in MiB.
    #[serde(default = "guest_overhead_mib")]
    pub(crate) guest_overhead_mib: u32,
    /// Bytes that a pod may read and write of its files in a second, as long as it lives; without it as many as
    /// the node can.
    fs_bytes_per_s: Option<u64>,
    /// Requests about its files that a pod may make in a second.
    fs_requests_per_s: Option<u64>,
    /// Folder of the snapshots that later pods are restored from, instead of booting; empty for none.
    #[serde(default = "templates", deserialize_with = "folder")]
    pub(crate) templates: Option<PathBuf>,
    /// How many VMs restored from a template wait for pods of a size.
    #[serde(default)]
    pub(crate) pool: u8,
    /// Whether podvmm sees no more of the node than its VM needs: `on`, as far as the node can have it so;
    /// `required`, or else there is no pod; or `off`.
    #[serde(default)]
    pub(crate) jail: Jail,
    /// The first of the users that podvmm runs as, each pod's as another, if it is in a jail; 0 for root.
    #[serde(default = "first_user")]
    pub(crate) first_user: u32,
    /// Whether podvmm has the labels of AppArmor and SELinux that a pod's description names, if it is in a jail.
    #[serde(default = "labels")]
    pub(crate) labels: bool,
    /// The file with the policy that the agents of pods obey ([`policy`]); without it they obey all.
    agent_policy: Option<PathBuf>,
    /// What that file says.
    #[serde(skip)]
    pub(crate) policy: Option<Policy>,
    /// How long a guest may take to come up, in seconds.
    #[serde(default = "agent_timeout_s")]
    agent_timeout_s: u32,
    /// The annotations, of [`ANNOTATIONS`], that pods may use.
    #[serde(default)]
    annotations: Vec<String>,
}

/// Whether podvmm is in a jail (`podvmm --jail`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Jail {
    Off,
    #[default]
    On,
    Required,
}

/// What pods can be allowed to ask for.
const ANNOTATIONS: [&str; 2] = ["io.podvmm.default_vcpus", "io.podvmm.default_memory_mib"];

fn podvmm() -> PathBuf {
    "podvmm".into()
}

fn log_level() -> log::LevelFilter {
    log::LevelFilter::Info
}

fn default_vcpus() -> u8 {
    1
}

fn default_memory_mib() -> u32 {
    512
}

fn guest_overhead_mib() -> u32 {
    64
}

fn templates() -> Option<PathBuf> {
    Some("/var/lib/podvmm/templates".into())
}

/// A path, or nothing for none.
fn folder<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    Ok(Some(path).filter(|path| !path.as_os_str().is_empty()))
}

/// As many numbers as there can be processes are no user's from here on (systemd's UIDS-GIDS.md).
fn first_user() -> u32 {
    0x7000_0000
}

fn labels() -> bool {
    true
}

fn agent_timeout_s() -> u32 {
    120
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("agent_policy")]
    Policy(#[source] FileError),
    #[error("annotation {name}: {what}")]
    Annotation { name: String, what: String },
}

impl Config {
    /// Reads and checks the configuration at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let mut config: Self = file::read(path)?;
        if let Some(what) = config.fault() {
            return Err(file::unfit(path)(what).into());
        }
        let policy = config.agent_policy.as_deref().map(policy::read);
        config.policy = policy.transpose().map_err(Error::Policy)?;
        Ok(config)
    }

    fn fault(&self) -> Option<String> {
        let size = self.most();
        if self.initramfs.is_some() == self.image.is_some() {
            return Some("give initramfs or image, one of them".into());
        }
        let files = [
            Some(&self.kernel),
            self.initramfs.as_ref(),
            self.image.as_ref(),
        ];
        for file in files.into_iter().flatten() {
            if let Err(error) = fs::metadata(file) {
                return Some(format!("{}: {error}", file.display()));
            }
        }
        if self.default_vcpus == 0 || self.default_vcpus > size.vcpus {
            return Some(format!("default_vcpus is 1 to {}", size.vcpus));
        }
        let memory = u64::from(self.default_memory_mib) + u64::from(self.guest_overhead_mib);
        if !(LEAST_MEMORY_MIB..=size.memory_mib).contains(&memory) {
            return Some(format!(
                "default_memory_mib and guest_overhead_mib are {LEAST_MEMORY_MIB} to {} together",
                size.memory_mib
            ));
        }
        if let Some(templates) = self.templates.as_ref().filter(|path| path.is_relative()) {
            return Some(format!(
                "templates: {}: no absolute path",
                templates.display()
            ));
        }
        if self.pool > 0 && self.templates.is_none() {
            return Some("pool needs templates".into());
        }
        let rates = [
            ("fs_bytes_per_s", self.fs_bytes_per_s),
            ("fs_requests_per_s", self.fs_requests_per_s),
        ];
        if let Some((key, _)) = rates.iter().find(|(_, rate)| *rate == Some(0)) {
            return Some(format!("{key} is 1 or more"));
        }
        if self.first_user > MAX_FIRST_USER {
            return Some(format!("first_user is at most {MAX_FIRST_USER}"));
        }
        if let Some(policy) = self.agent_policy.as_ref().filter(|it| it.is_relative()) {
            return Some(format!(
                "agent_policy: {}: no absolute path",
                policy.display()
            ));
        }
        if self.agent_policy.is_some() && self.initramfs.is_none() {
            return Some(
                "agent_policy needs initramfs; an image has a policy of its own or none".into(),
            );
        }
        if self.agent_timeout_s == 0 {
            return Some("agent_timeout_s is 1 or more".into());
        }
        let unknown = |name: &&String| !ANNOTATIONS.contains(&name.as_str());
        let unknown = self.annotations.iter().find(unknown);
        unknown.map(|name| format!("annotations: there is no {name}"))
    }

    /// The size of the largest VM that a pod can have.
    pub(crate) fn most(&self) -> Size {
        let host = Size::of_host();
        Size {
            vcpus: self.max_vcpus.unwrap_or(host.vcpus),
            memory_mib: self.max_memory_mib.map_or(host.memory_mib, u64::from),
        }
    }

    /// What a pod's share is held to. A second's worth is saved up.
    pub(crate) fn fs_rates(&self) -> RateLimits {
        let limit = |size: u64| RateLimit {
            size,
            one_time_burst: 0,
            refill_time: 1000,
        };
        RateLimits {
            bandwidth: self.fs_bytes_per_s.map(limit),
            ops: self.fs_requests_per_s.map(limit),
        }
    }

    /// The user of this shim's podvmm: none while the shim lives that another shim of the host's has.
    pub(crate) fn user(&self) -> Option<u32> {
        (self.first_user != 0).then(|| self.first_user + std::process::id())
    }

    pub(crate) fn agent_timeout(&self) -> Duration {
        Duration::from_secs(self.agent_timeout_s.into())
    }

    /// The configuration as a pod with these annotations has it.
    pub(crate) fn for_pod(mut self, annotations: &BTreeMap<String, String>) -> Result<Self, Error> {
        let asked = annotations
            .iter()
            .filter(|(name, _)| name.starts_with("io.podvmm."));
        for (name, value) in asked {
            let wrong = |what: &str| Error::Annotation {
                name: name.clone(),
                what: what.into(),
            };
            if !self.annotations.contains(name) {
                return Err(wrong("the node's configuration does not allow it"));
            }
            let most = self.most();
            match name.as_str() {
                "io.podvmm.default_vcpus" => {
                    let count = value.parse().ok();
                    let count = count.filter(|count| (1..=most.vcpus).contains(count));
                    self.default_vcpus =
                        count.ok_or_else(|| wrong(&format!("give 1 to {}", most.vcpus)))?;
                }
                _ => {
                    let mib = value.parse().ok();
                    let fits = |mib: &u32| (1..=most.memory_mib).contains(&u64::from(*mib));
                    self.default_memory_mib = mib
                        .filter(fits)
                        .ok_or_else(|| wrong(&format!("give 1 to {}, in MiB", most.memory_mib)))?;
                }
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        let text = format!("kernel = '/dev/null'\ninitramfs = '/dev/null'\n{more}");
        fs::write(&path, text).unwrap();
        Config::read(&path).map_err(|error| api::chain(&error).join(": "))
    }

    fn annotated(config: &str, name: &str, value: &str) -> Result<Config, String> {
        let annotations = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let config = read(config).unwrap().for_pod(&annotations);
        config.map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let config = read("").unwrap();
        assert_eq!((config.default_vcpus, config.default_memory_mib), (1, 512));
        assert_eq!(config.podvmm, Path::new("podvmm"));
        assert!(config.templates.is_some());
        assert_eq!((config.pool, config.jail), (0, Jail::On));
        assert_eq!(read("jail = 'required'").unwrap().jail, Jail::Required);
        assert_eq!(config.transport, TransportConfig::Mmio);
        let pci = read("transport = 'pci'").unwrap().transport;
        assert_eq!(pci, TransportConfig::Pci);
        assert_eq!(read("templates = ''").unwrap().templates, None);
        assert_eq!(config.fs_rates(), RateLimits::default());
        let user = |more: &str| read(more).unwrap().user();
        assert_eq!(user(""), Some(0x7000_0000 + std::process::id()));
        assert_eq!(user("first_user = 0"), None);
        assert_eq!(config.policy, None);
        let policy = read("agent_policy = '/dev/null'").unwrap().policy;
        assert_eq!(policy, Some(Policy::default()));
    }

    #[test]
    fn rates_of_files_are_for_a_second() {
        let config = read("fs_bytes_per_s = 1000000\nfs_requests_per_s = 500").unwrap();
        let RateLimits { bandwidth, ops } = config.fs_rates();
        let rates = [bandwidth, ops].map(|rate| rate.map(|rate| (rate.size, rate.refill_time)));
        assert_eq!(rates, [Some((1_000_000, 1000)), Some((500, 1000))]);
    }

    #[test]
    fn nonsense_is_named() {
        let refused = |more: &str| read(more).unwrap_err();
        assert!(refused("kernel_parms = 'x'").contains("unknown field `kernel_parms`"));
        assert!(refused("default_vcpus = 0").contains("default_vcpus is 1 to"));
        for memory in ["default_memory_mib = 4294967295", "max_memory_mib = 100"] {
            assert!(refused(memory).contains("are 64 to"), "{memory}");
        }
        assert!(refused("image = '/dev/null'").contains("give initramfs or image"));
        assert!(
            refused("annotations = ['io.podvmm.kernel']").contains("there is no io.podvmm.kernel")
        );
        assert!(refused("templates = 'here'").contains("templates: here: no absolute path"));
        assert!(refused("templates = ''\npool = 1").contains("pool needs templates"));
        assert!(refused("fs_requests_per_s = 0").contains("fs_requests_per_s is 1 or more"));
        assert!(refused("first_user = 4294967295").contains("first_user is at most"));
        assert!(refused("jail = 'open'").contains("jail"));
        assert!(refused("agent_policy = 'here'").contains("agent_policy: here: no absolute path"));
        assert_eq!(
            refused("agent_policy = '/nowhere'"),
            "agent_policy: read /nowhere: No such file or directory (os error 2)"
        );
        assert!(refused("log_level = 'loud'").contains("log_level"));
        let missing = Config::read(Path::new("/nowhere")).unwrap_err();
        assert_eq!(missing.to_string(), "read /nowhere");
    }

    #[test]
    fn a_pod_asks_only_for_what_is_allowed() {
        let name = "io.podvmm.default_memory_mib";
        let allowed = format!("annotations = ['{name}']\nmax_memory_mib = 1024");
        assert_eq!(
            annotated(&allowed, name, "700").unwrap().default_memory_mib,
            700
        );
        let refused = annotated(&allowed, name, "1025").unwrap_err();
        assert_eq!(
            refused,
            format!("annotation {name}: give 1 to 1024, in MiB")
        );
        assert!(
            annotated("", name, "700")
                .unwrap_err()
                .contains("does not allow it")
        );
        annotated("", "io.kubernetes.other", "x").unwrap();
    }
}
