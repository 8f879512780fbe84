//! Block devices.

use std::path::PathBuf;
use std::str::FromStr;

use super::{ConfigError, RateLimits};
use crate::options::Options;

/// A raw disk image or block device:
/// `path=F[,readonly=on][,direct=on][,queues=N][,queue_size=N][,id=S]`, and what [`RateLimits`]
/// takes.
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
    /// What it is held to.
    pub rates: RateLimits,
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
            rates: RateLimits::default(),
        }
    }

    /// Itself, if all of it is in range.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        super::check_queues(self.queues, self.queue_size, 4)?;
        self.rates.checked()?;
        match self.id {
            Some(id) if id.len() > 20 => Err(ConfigError::IdTooLong(id)),
            _ => Ok(self),
        }
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &[
            "path",
            "readonly",
            "direct",
            "queues",
            "queue_size",
            "id",
            "bw_size",
            "bw_one_time_burst",
            "bw_refill_time",
            "ops_size",
            "ops_one_time_burst",
            "ops_refill_time",
        ];
        let options = Options::parse(text, KEYS)?;
        let default = Self::new(
            options.required("path")?,
            options.switch("readonly", false)?,
        );
        let disk = Self {
            direct: options.switch("direct", default.direct)?,
            queues: options.value("queues")?.unwrap_or(default.queues),
            queue_size: options.value("queue_size")?.unwrap_or(default.queue_size),
            id: options.value("id")?,
            rates: RateLimits::of(&options)?,
            ..default
        };
        disk.checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

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
}
