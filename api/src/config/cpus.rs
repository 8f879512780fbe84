//! vCPUs.

use std::str::FromStr;

use super::ConfigError;
use crate::options::Options;
use crate::units::CpuCount;

/// vCPUs: `boot=N[,max=M]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpusConfig {
    boot: CpuCount,
    max: CpuCount,
}

impl CpusConfig {
    /// `boot` vCPUs that can grow to `max`.
    pub fn new(boot: u8, max: u8) -> Result<Self, ConfigError> {
        let boot = CpuCount::try_from(boot).map_err(ConfigError::Unit)?;
        let max = CpuCount::try_from(max).map_err(ConfigError::Unit)?;
        Self::ordered(boot, max)
    }

    fn ordered(boot: CpuCount, max: CpuCount) -> Result<Self, ConfigError> {
        if max < boot {
            return Err(ConfigError::MaxBelowBoot { boot, max });
        }
        Ok(Self { boot, max })
    }

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

impl FromStr for CpusConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["boot", "max"])?;
        let boot = options.required("boot")?;
        let max = options.value("max")?.unwrap_or(boot);
        Self::ordered(boot, max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

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
}
