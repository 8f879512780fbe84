//! How large a pod's VM is to be: what its containers may use together, and the guest itself.

use protocol::agent::oci::{LinuxResources, Spec};

use crate::config::{Config, Size};

const MIB: u64 = 1 << 20;
/// Memory is plugged in blocks of this size, so VMs have whole ones.
const BLOCK_MIB: u64 = 2;

/// What a container may use; none is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_mib: Option<u64>,
    milli_cpus: Option<u64>,
}

impl Limits {
    pub(crate) fn of(resources: &LinuxResources) -> Self {
        Self {
            memory_mib: memory(resources.memory.map_or(0, |memory| memory.limit)),
            milli_cpus: resources
                .cpu
                .as_ref()
                .and_then(|cpu| cpus(cpu.quota, cpu.period)),
        }
    }

    /// The limits with what an update says; what it does not say stays.
    pub(crate) fn updated(self, resources: &LinuxResources) -> Self {
        let new = Self::of(resources);
        let says_memory = resources.memory.is_some_and(|memory| memory.limit != 0);
        let says_cpu = resources.cpu.as_ref().is_some_and(|cpu| cpu.quota != 0);
        Self {
            memory_mib: if says_memory {
                new.memory_mib
            } else {
                self.memory_mib
            },
            milli_cpus: if says_cpu {
                new.milli_cpus
            } else {
                self.milli_cpus
            },
        }
    }

    /// The limits without what an update of one container from `before` to `after` takes away. An
    /// update that gives more is in that container's own limits.
    pub(crate) fn less(self, before: Self, after: Self) -> Self {
        let less = |own: Option<u64>, before: Option<u64>, after: Option<u64>| match (before, after)
        {
            (Some(before), Some(after)) => {
                own.map(|own| own - own.min(before.saturating_sub(after)))
            }
            _ => own,
        };
        Self {
            memory_mib: less(self.memory_mib, before.memory_mib, after.memory_mib),
            milli_cpus: less(self.milli_cpus, before.milli_cpus, after.milli_cpus),
        }
    }

    /// The limits of all containers of a pod that is about to be made, as the kubelet says in
    /// annotations of its sandbox.
    pub(crate) fn of_pod(spec: &Spec) -> Self {
        let number = |key: &str| {
            let value = spec
                .annotations
                .get(&format!("io.kubernetes.cri.sandbox-{key}"));
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        let period = u64::try_from(number("cpu-period")).unwrap_or(0);
        Self {
            memory_mib: memory(number("memory")),
            milli_cpus: cpus(number("cpu-quota"), period),
        }
    }
}

fn memory(bytes: i64) -> Option<u64> {
    let bytes = u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)?;
    Some(bytes.div_ceil(MIB))
}

fn cpus(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    let period = if period == 0 { 100_000 } else { period };
    Some(quota.saturating_mul(1000).div_ceil(period))
}

/// The VM for containers with these limits: memory is their sum, vCPUs their sum rounded up. All
/// without a limit share the defaults. It is no smaller than what was `announced` for all of the pod,
/// which may have limits of its own.
pub(crate) fn size(
    config: &Config,
    announced: Limits,
    containers: impl Iterator<Item = Limits>,
) -> Size {
    let (mut memory, mut milli) = (0_u64, 0_u64);
    let (mut memory_default, mut cpu_default) = (false, false);
    for limits in containers {
        memory = memory.saturating_add(limits.memory_mib.unwrap_or(0));
        milli = milli.saturating_add(limits.milli_cpus.unwrap_or(0));
        memory_default |= limits.memory_mib.is_none();
        cpu_default |= limits.milli_cpus.is_none();
    }
    if memory_default || memory == 0 {
        memory = memory.saturating_add(config.default_memory_mib.into());
    }
    if cpu_default || milli == 0 {
        milli = milli.saturating_add(1000 * u64::from(config.default_vcpus));
    }
    memory = memory.max(announced.memory_mib.unwrap_or(0));
    milli = milli.max(announced.milli_cpus.unwrap_or(0));
    let most = config.most();
    let memory = memory.saturating_add(config.guest_overhead_mib.into());
    let memory = memory.min(most.memory_mib);
    Size {
        vcpus: u8::try_from(milli.div_ceil(1000)).map_or(most.vcpus, |cpus| cpus.min(most.vcpus)),
        memory_mib: memory.next_multiple_of(BLOCK_MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::agent::oci::{LinuxCpu, LinuxMemory};

    /// One CPU and 512 MiB by default, 64 MiB for the guest, at most 4 CPUs and 8 GiB.
    fn config() -> Config {
        let text = "kernel = 'k'\nmax_vcpus = 4\nmax_memory_mib = 8192";
        toml::from_str(text).unwrap()
    }

    fn limits(memory: i64, quota: i64) -> Limits {
        Limits::of(&LinuxResources {
            memory: Some(LinuxMemory {
                limit: memory,
                ..LinuxMemory::default()
            }),
            cpu: Some(LinuxCpu {
                quota,
                period: 100_000,
                ..LinuxCpu::default()
            }),
            ..LinuxResources::default()
        })
    }

    fn sized(containers: &[Limits]) -> (u8, u64) {
        let size = size(&config(), Limits::default(), containers.iter().copied());
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn a_vm_has_the_sum_of_limits_and_defaults_for_the_rest() {
        let mib = 1 << 20;
        assert_eq!(sized(&[]), (1, 576));
        assert_eq!(sized(&[limits(0, 0), limits(-1, -1)]), (1, 576));
        assert_eq!(sized(&[limits(100 * mib, 50_000)]), (1, 164));
        let two = [limits(100 * mib, 150_000), limits(mib / 2, 60_000)];
        assert_eq!(sized(&two), (3, 166), "rounded up");
        assert_eq!(sized(&[two[0], limits(0, 0)]), (3, 676));
        assert_eq!(sized(&[limits(i64::MAX, i64::MAX)]), (4, 8192));
    }

    #[test]
    fn limits_without_end_are_as_much_as_there_may_be() {
        let cpu = LinuxCpu {
            quota: i64::MAX,
            period: 1,
            ..LinuxCpu::default()
        };
        let endless = Limits::of(&LinuxResources {
            cpu: Some(cpu),
            ..LinuxResources::default()
        });
        assert_eq!(sized(&[endless, endless, limits(0, 0)]), (4, 576));
    }

    #[test]
    fn a_vm_is_no_smaller_than_its_pod_was_announced() {
        let mib = 1 << 20;
        let announced = limits(2048 * mib, 300_000);
        let sized = |announced, containers: &[Limits]| {
            let size = size(&config(), announced, containers.iter().copied());
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(sized(announced, &[limits(0, 0)]), (3, 2112));
        assert_eq!(sized(announced, &[limits(3072 * mib, 50_000)]), (3, 3136));
        let (before, after) = (limits(1024 * mib, 200_000), limits(512 * mib, 100_000));
        let less = announced.less(before, after);
        assert_eq!(sized(less, &[after]), (2, 1600));
        assert_eq!(announced.less(after, before), announced);
        assert_eq!(announced.less(before, limits(0, 0)), announced);
    }

    #[test]
    fn an_update_changes_what_it_says_alone() {
        let before = limits(1 << 30, 50_000);
        let more_memory = LinuxResources {
            memory: limits_of_memory(2 << 30),
            ..LinuxResources::default()
        };
        assert_eq!(before.updated(&more_memory), limits(2 << 30, 50_000));
        assert_eq!(before.updated(&LinuxResources::default()), before);
    }

    fn limits_of_memory(limit: i64) -> Option<LinuxMemory> {
        Some(LinuxMemory {
            limit,
            ..LinuxMemory::default()
        })
    }

    #[test]
    fn a_pods_size_is_foretold_by_its_sandbox() {
        let mut spec = Spec::default();
        assert_eq!(Limits::of_pod(&spec), Limits::default());
        for (key, value) in [
            ("memory", "1073741824"),
            ("cpu-quota", "250000"),
            ("cpu-period", "100000"),
        ] {
            let key = format!("io.kubernetes.cri.sandbox-{key}");
            spec.annotations.insert(key, value.into());
        }
        assert_eq!(Limits::of_pod(&spec), limits(1 << 30, 250_000));
    }
}
