//! What a pod may use of the host, as its cgroup holds it to.
//!
//! A pod's limits are the kubelet's work: it gives them, with the runtime class's overhead, to the
//! slice above the pod's cgroup, and here the pod only gets its weight beside others. What the kubelet
//! says with the sandbox is no limit: of its containers those without one are left out there. A
//! container alone, such as ctr's, has its own limits, and what its VM takes besides.
//!
//! The number of processes is left out: the limit is on those in the guest, where it is kept.

use protocol::agent::oci::{LinuxResources, Spec};

use crate::config::Config;
use crate::host::systemd::{Property, Value};
use crate::pod::spec;

const MIB: u64 = 1 << 20;
/// What the kernel takes for a second of a processor, in microseconds.
const SECOND_USEC: u64 = 1_000_000;
/// A percent of a processor, in microseconds a second. systemd takes whole percents.
const PERCENT_USEC: u64 = 10_000;
const DEFAULT_PERIOD_USEC: u64 = 100_000;
/// Memory of a VM beside its guest's, in MiB: podvmm, the shim and what the host's kernel has for
/// them, which the runtime class counts as 12 MiB, and some room for the files they read.
const HOST_MIB: u64 = 32;
/// Where KVM keeps shadow pages its table has 10 bytes for each page that the VM might come to have.
const PAGES_PER_SHADOW: u64 = 400;
const SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// Limits of a cgroup; none is the host's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The weight for processor time beside the cgroup's siblings, 1 to 10,000.
    weight: Option<u64>,
    cpu: Option<Quota>,
    memory_bytes: Option<u64>,
}

/// How much of a processor's time may be used in each period, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quota {
    quota_usec: u64,
    period_usec: u64,
}

impl Limits {
    /// The limits of the pod whose first container `spec` describes.
    pub(crate) fn of(config: &Config, spec: &Spec) -> Self {
        if spec::is_sandbox(spec) {
            let shares = spec.annotations.get(SHARES);
            return Self {
                weight: shares.and_then(|shares| weight(shares.parse().ok()?)),
                ..Self::default()
            };
        }
        let linux = spec.linux.as_ref();
        let resources = linux.and_then(|linux| linux.resources.as_ref());
        resources.map_or_else(Self::default, |resources| Self::of_one(config, resources))
    }

    fn of_one(config: &Config, resources: &LinuxResources) -> Self {
        let memory = resources.memory.map_or(0, |memory| memory.limit);
        let memory = u64::try_from(memory).ok().filter(|bytes| *bytes > 0);
        let beside = u64::from(config.guest_overhead_mib)
            .saturating_add(HOST_MIB)
            .saturating_add(config.most().memory_mib / PAGES_PER_SHADOW)
            .saturating_mul(MIB);
        let cpu = resources.cpu.as_ref();
        Self {
            weight: cpu.and_then(|cpu| weight(cpu.shares)),
            cpu: cpu.and_then(|cpu| Quota::of(cpu.quota, cpu.period)),
            memory_bytes: memory.map(|bytes| bytes.saturating_add(beside)),
        }
    }

    /// The limits with what an update of a container alone says; what it does not say stays. Memory
    /// is never taken away: the guest gives it back later, and until then the kernel would kill the
    /// VM.
    pub(crate) fn updated(self, config: &Config, resources: &LinuxResources) -> Self {
        let new = Self::of_one(config, resources);
        let frees_cpu = resources.cpu.as_ref().is_some_and(|cpu| cpu.quota < 0);
        let frees_memory = resources.memory.is_some_and(|memory| memory.limit < 0);
        Self {
            weight: new.weight.or(self.weight),
            cpu: if frees_cpu {
                None
            } else {
                new.cpu.or(self.cpu)
            },
            memory_bytes: match (self.memory_bytes, new.memory_bytes) {
                (Some(_), _) if frees_memory => None,
                (Some(before), Some(after)) => Some(before.max(after)),
                (before, _) => before,
            },
        }
    }

    /// The limits as properties of a unit (systemd.resource-control(5)), all of them, so that one
    /// that is gone is taken back.
    pub(crate) fn properties(&self) -> Vec<Property> {
        let period = self.cpu.map_or(u64::MAX, |cpu| cpu.period_usec);
        let quota = self.cpu.map_or(u64::MAX, Quota::per_second_usec);
        [
            ("CPUWeight", self.weight.unwrap_or(u64::MAX)),
            ("CPUQuotaPeriodUSec", period),
            ("CPUQuotaPerSecUSec", quota),
            ("MemoryMax", self.memory_bytes.unwrap_or(u64::MAX)),
        ]
        .map(|(name, value)| Property::new(name, Value::Number(value)))
        .into()
    }

    /// The limits as files of a cgroup of version 2, and what is to be in them.
    pub(crate) fn files(&self) -> [(&'static str, String); 3] {
        let or_max = |value: Option<u64>| value.map_or_else(|| "max".into(), |it| it.to_string());
        let period = self.cpu.map_or(DEFAULT_PERIOD_USEC, |cpu| cpu.period_usec);
        let quota = or_max(self.cpu.map(|cpu| cpu.quota_usec));
        [
            ("cpu.weight", self.weight.unwrap_or(100).to_string()),
            ("cpu.max", format!("{quota} {period}")),
            ("memory.max", or_max(self.memory_bytes)),
        ]
    }
}

impl Quota {
    fn of(quota_usec: i64, period_usec: u64) -> Option<Self> {
        let quota_usec = u64::try_from(quota_usec).ok().filter(|quota| *quota > 0)?;
        let period_usec = match period_usec {
            0 => DEFAULT_PERIOD_USEC,
            period => period,
        };
        Some(Self {
            quota_usec,
            period_usec,
        })
    }

    fn per_second_usec(self) -> u64 {
        let exact = self.quota_usec.saturating_mul(SECOND_USEC) / self.period_usec;
        exact
            .checked_next_multiple_of(PERCENT_USEC)
            .unwrap_or(exact)
    }
}

/// The weight of version 2 for shares of version 1, as runc has it: 1 for 2, 100 for 1024 and 10,000
/// for 262,144, which are the least, the default and the most of both; none for none.
fn weight(shares: u64) -> Option<u64> {
    const MOST_SHARES: u64 = 262_144;
    match shares {
        0 => None,
        1 | 2 => Some(1),
        MOST_SHARES.. => Some(10_000),
        shares => {
            let shares = u32::try_from(shares).ok()?;
            let log = f64::from(shares).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            let exact = 10_f64.powf(exponent);
            // A power that a whole number would be may come out a trifle above it.
            let weights = (1..=10_000_u32).map(f64::from);
            let smaller = weights.take_while(|weight| *weight < exact - 1e-6).count();
            Some(u64::try_from(smaller).ok()? + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::agent::oci::{Linux, LinuxCpu, LinuxMemory};

    use super::*;

    /// 64 MiB for the guest's kernel, at most 8 GiB.
    fn config() -> Config {
        toml::from_str("kernel = 'k'\nmax_memory_mib = 8192").unwrap()
    }

    fn resources(memory: i64, quota: i64, shares: u64) -> LinuxResources {
        LinuxResources {
            memory: Some(LinuxMemory {
                limit: memory,
                ..LinuxMemory::default()
            }),
            cpu: Some(LinuxCpu {
                quota,
                period: 0,
                shares,
                ..LinuxCpu::default()
            }),
            ..LinuxResources::default()
        }
    }

    fn alone(resources: LinuxResources) -> Spec {
        Spec {
            linux: Some(Linux {
                resources: Some(resources),
                ..Linux::default()
            }),
            ..Spec::default()
        }
    }

    #[test]
    fn a_container_alone_has_its_limits_and_its_vms_share() {
        let limits = Limits::of(&config(), &alone(resources(100 << 20, 33_333, 1024)));
        let mib = |mib: u64| (mib << 20).to_string();
        assert_eq!(
            limits.files(),
            [
                ("cpu.weight", "100".to_owned()),
                ("cpu.max", "33333 100000".to_owned()),
                ("memory.max", mib(100 + 64 + 32 + 20)),
            ]
        );
        let value = |name: &str| {
            let properties = limits.properties();
            let found = properties.iter().find(|property| property.name == name);
            found.unwrap().value.clone()
        };
        assert_eq!(value("CPUQuotaPerSecUSec"), Value::Number(340_000));
        assert_eq!(value("CPUQuotaPeriodUSec"), Value::Number(100_000));
        let none = Limits::of(&config(), &alone(LinuxResources::default()));
        assert_eq!(none, Limits::default());
        assert_eq!(none.files()[1].1, "max 100000");
    }

    #[test]
    fn a_pods_limits_are_its_slices() {
        let mut pod = alone(resources(100 << 20, 33_333, 2));
        for (key, value) in [
            ("io.kubernetes.cri.container-type", "sandbox"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "50000"),
            ("io.kubernetes.cri.sandbox-cpu-shares", "512"),
        ] {
            pod.annotations.insert(key.into(), value.into());
        }
        let limits = Limits::of(&config(), &pod);
        let expected = Limits {
            weight: Some(59),
            ..Limits::default()
        };
        assert_eq!(limits, expected);
    }

    #[test]
    fn an_update_never_takes_memory_that_the_guest_may_have() {
        let before = Limits::of(&config(), &alone(resources(100 << 20, 50_000, 0)));
        let after = before.updated(&config(), &resources(50 << 20, 20_000, 0));
        assert_eq!(after.memory_bytes, before.memory_bytes);
        assert_eq!(after.files()[1].1, "20000 100000");
        assert_eq!(
            before.updated(&config(), &LinuxResources::default()),
            before
        );
        let free = before.updated(&config(), &resources(-1, -1, 0));
        assert_eq!((free.memory_bytes, free.cpu), (None, None));
    }

    #[test]
    fn weights_are_runcs() {
        // Of its test, with those of a kubelet's requests of 250m, 500m and 4 CPUs.
        for (shares, expected) in [
            (0, None),
            (2, Some(1)),
            (256, Some(35)),
            (512, Some(59)),
            (1024, Some(100)),
            (4096, Some(303)),
            (262_144, Some(10_000)),
            (u64::MAX, Some(10_000)),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }
}
