//! Guest RAM.

use std::str::FromStr;

use super::ConfigError;
use crate::options::Options;
use crate::units::RamSize;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

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
}
