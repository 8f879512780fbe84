//! vCPUs.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Others, Part};
use crate::units::CpuCount;

/// The vCPUs of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpusConfig {
    boot_vcpus: CpuCount,
    max_vcpus: Option<CpuCount>,
    /// Kata reads it back. Guests have as many bits of physical addresses as the host.
    max_phys_bits: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    topology: Option<Topology>,
    #[serde(flatten)]
    others: Others,
}

/// Guests have one package with one die, and one thread for each core.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Topology {
    /// Cores of the die: all there can be, or 0.
    cores_per_die: u32,
    /// What else Cloud Hypervisor has here is 1, or refused
    /// ([`unsupported`](super::unsupported)).
    #[serde(flatten)]
    others: Others,
}

impl CpusConfig {
    /// `boot` vCPUs that can grow to `max`.
    pub fn new(boot: CpuCount, max: CpuCount) -> Result<Self, ConfigError> {
        let cpus = Self {
            boot_vcpus: boot,
            max_vcpus: Some(max),
            ..Self::default()
        };
        cpus.checked()
    }

    /// These settings with `boot` vCPUs at boot, and as many at most as before.
    pub(crate) fn with_boot(&self, boot: CpuCount) -> Result<Self, ConfigError> {
        let cpus = Self {
            boot_vcpus: boot,
            max_vcpus: Some(self.max()),
            ..self.clone()
        };
        cpus.checked()
    }

    /// vCPUs that run from the start.
    pub fn boot(&self) -> CpuCount {
        self.boot_vcpus
    }

    /// vCPUs the VM can grow to, at least `boot`.
    pub fn max(&self) -> CpuCount {
        self.max_vcpus.unwrap_or(self.boot_vcpus)
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: CpuCount::ONE,
            max_vcpus: None,
            max_phys_bits: 46,
            topology: None,
            others: Others::new(),
        }
    }
}

impl Part for CpusConfig {
    const SECTION: &'static str = "cpus";
    const USAGE: &'static [&'static str] = &["boot=N[,max=M]"];

    fn checked(mut self) -> Result<Self, ConfigError> {
        let (boot, max) = (self.boot(), self.max());
        if max < boot {
            return Err(ConfigError::MaxBelowBoot { boot, max });
        }
        let cores = self.topology.as_ref().map_or(0, |it| it.cores_per_die);
        if cores != 0 && cores != u32::from(max.get()) {
            return Err(ConfigError::CoresPerDie);
        }
        self.max_vcpus = Some(max);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn cpus_can_grow_from_boot_to_max() {
        let counts = |text| {
            let cpus = CpusConfig::from_options(text).unwrap();
            (cpus.boot().get(), cpus.max().get())
        };
        assert_eq!(counts("boot=2,max=4"), (2, 4));
        assert_eq!(counts("boot=3"), (3, 3));
        assert_eq!(counts("max=2"), (1, 2));
    }

    #[test]
    fn nonsense_about_cpus_is_named() {
        assert_eq!(
            refusal::<CpusConfig>("boot=4,max=2"),
            "max=2 is less than boot=4"
        );
        for count in ["0", "255", "65537"] {
            let refused = refusal::<CpusConfig>(&format!("boot={count}"));
            assert_eq!(
                refused,
                format!("boot: {count} vCPUs: 1 to 254 is possible")
            );
        }
    }
}
