//! Block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, HostPath, Others, Part, RATES, RateLimits, check_queues};

/// A raw disk image or block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskConfig {
    /// Path of the disk's file or block device.
    pub path: PathBuf,
    /// Whether the guest's writes are refused.
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Request queues, 1 to 16.
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Bounds of its bytes and requests.
    #[serde(skip_serializing_if = "RateLimits::are_none")]
    pub rate_limiter_config: RateLimits,
    /// What the image is said to be. It is read as a raw one.
    pub image_type: ImageType,
    /// Whether io_uring is not to be used, which podvmm does not use in any case.
    pub disable_io_uring: bool,
    /// What it is called: a name that podvmm gives it, if its client does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

/// Kata's Rust client does not know what its images are, and they are raw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the words are Cloud Hypervisor's")]
pub enum ImageType {
    #[default]
    Raw,
    Unknown,
}

impl Default for DiskConfig {
    /// A disk that has no file yet.
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            serial: None,
            rate_limiter_config: RateLimits::default(),
            image_type: ImageType::Raw,
            disable_io_uring: false,
            id: None,
            others: Others::new(),
        }
    }
}

impl Part for DiskConfig {
    const SECTION: &'static str = "disks";
    const USAGE: &'static [&'static str] = &[
        "path=FILE[,readonly=on][,direct=on][,queues=N][,queue_size=N][,id=S]",
        RATES,
    ];

    fn host_paths(&self) -> Vec<HostPath> {
        vec![match self.readonly {
            true => HostPath::read(&self.path),
            false => HostPath::write(&self.path),
        }]
    }

    fn checked(self) -> Result<Self, ConfigError> {
        if self.path.as_os_str().is_empty() {
            return Err(ConfigError::Missing("path"));
        }
        check_queues(self.num_queues, self.queue_size, 4)?;
        self.rate_limiter_config.check()?;
        match self.serial {
            Some(serial) if serial.len() > 20 => Err(ConfigError::SerialTooLong(serial)),
            _ => Ok(self),
        }
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
            refusal::<DiskConfig>("path=x,id=123456789012345678901"),
            "the serial number '123456789012345678901' is longer than 20 bytes"
        );
        let expected = DiskConfig {
            path: "/x".into(),
            readonly: true,
            ..DiskConfig::default()
        };
        assert_eq!(
            DiskConfig::from_options("path=/x,readonly=on").unwrap(),
            expected
        );
    }
}
