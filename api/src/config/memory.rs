//! Guest RAM.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Others, Part};
use crate::units::{ByteSize, RamSize};

/// The RAM of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryConfig {
    /// How much RAM the guest has at the start.
    pub size: RamSize,
    /// How much more RAM the guest can get while it runs.
    pub hotplug_size: ByteSize,
    /// How much of `hotplug_size` the guest gets at once.
    pub hotplugged_size: ByteSize,
    /// Back it by 2 MiB pages from the host's pool (hugetlbfs).
    pub hugepages: bool,
    /// Let the host use transparent huge pages.
    pub thp: bool,
    /// Back it by a memfd that other processes can map.
    pub shared: bool,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: RamSize::default(),
            hotplug_size: ByteSize(0),
            hotplugged_size: ByteSize(0),
            hugepages: false,
            thp: true,
            shared: false,
            others: Others::new(),
        }
    }
}

impl MemoryConfig {
    /// Linux adds memory in blocks of at least this.
    const HOTPLUG_STEP: u64 = 128 << 20;

    /// These settings with `hotplug_size` rounded down to what can be had: whole blocks of 128 MiB,
    /// and 1 TiB with the RAM of the start. Kata asks for what is left of the host's memory, of any
    /// size.
    pub(crate) fn with_possible_hotplug(self) -> Self {
        let asked = self.hotplug_size.0;
        let most = RamSize::MAX.0.saturating_sub(self.size.bytes());
        let possible = asked.min(most) / Self::HOTPLUG_STEP * Self::HOTPLUG_STEP;
        if possible == asked {
            return self;
        }
        let hotplug_size = ByteSize(possible);
        log::debug!(
            "hotplug_size={}: {hotplug_size} is possible",
            self.hotplug_size
        );
        let plugged = self.hotplugged_size;
        Self {
            hotplug_size,
            // More than was asked for as a whole stays an error.
            hotplugged_size: if plugged.0 <= asked {
                plugged.min(hotplug_size)
            } else {
                plugged
            },
            ..self
        }
    }
}

impl Part for MemoryConfig {
    const SECTION: &'static str = "memory";
    const USAGE: &'static [&'static str] =
        &["size=S[,hugepages=on][,thp=off][,shared=on][,hotplug_size=S][,hotplugged_size=S]"];

    fn checked(self) -> Result<Self, ConfigError> {
        let (most, plugged) = (self.hotplug_size, self.hotplugged_size);
        let total = ByteSize(self.size.bytes().saturating_add(most.0));
        if !most.0.is_multiple_of(Self::HOTPLUG_STEP) {
            Err(ConfigError::HotplugUnaligned(most))
        } else if total > RamSize::MAX {
            Err(ConfigError::HotplugTooLarge(total))
        } else if plugged > most {
            Err(ConfigError::HotpluggedTooLarge { plugged, most })
        } else {
            Ok(self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn memory_keeps_its_defaults() {
        let memory = MemoryConfig::from_options("size=1G,shared=on").unwrap();
        let expected = MemoryConfig {
            size: "1G".parse().unwrap(),
            shared: true,
            ..MemoryConfig::default()
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn memory_to_be_plugged_has_a_step_and_a_limit() {
        let memory = MemoryConfig::from_options("hotplug_size=1G,hotplugged_size=512M").unwrap();
        assert_eq!(memory.hotplug_size, ByteSize(1 << 30));
        assert_eq!(memory.hotplugged_size, ByteSize(512 << 20));
        let refusals = [
            (
                "hotplug_size=64M",
                "hotplug_size=64M is not a multiple of 128M",
            ),
            (
                "hotplug_size=1024G",
                "1049088M of RAM with hotplug_size: 1024G at most is possible",
            ),
            (
                "hotplug_size=1G,hotplugged_size=2G",
                "hotplugged_size=2G is more than hotplug_size=1G",
            ),
        ];
        for (text, why) in refusals {
            assert_eq!(refusal::<MemoryConfig>(text), why);
        }
    }

    #[test]
    fn too_little_memory_is_named() {
        assert_eq!(
            refusal::<MemoryConfig>("size=4M"),
            "size: 4M of RAM: 32M to 1024G is possible"
        );
    }
}
