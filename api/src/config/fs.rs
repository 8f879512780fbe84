//! Shared folders.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, HostPath, Others, Part, RATES, RateLimits, check_queues};

/// A share, which podvmm serves from a folder, or another process on a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FsConfig {
    /// What the guest mounts it by: 1 to 36 bytes, none of them NUL.
    pub tag: String,
    /// The folder that podvmm serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_dir: Option<PathBuf>,
    /// The socket where another process, such as virtiofsd, serves the share by vhost-user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Whether the guest's writes are refused.
    pub readonly: bool,
    /// What the guest may keep without asking again.
    pub cache: FsCache,
    /// The guest may keep what it writes for a while.
    pub writeback: bool,
    /// Request queues, 1 to 16.
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Bounds of its bytes and requests.
    #[serde(skip_serializing_if = "RateLimits::are_none")]
    pub rate_limiter_config: RateLimits,
    /// What it is called: a name that podvmm gives it, if its client does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

/// Who serves a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsSource<'a> {
    /// podvmm serves the share, from this folder.
    Folder(&'a Path),
    /// Another process, by vhost-user on this socket.
    Socket(&'a Path),
}

/// What a guest may keep of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsCache {
    /// The guest keeps nothing.
    None,
    /// Names and attributes for a second, content until it is seen to have changed.
    #[default]
    Auto,
    /// The guest keeps everything.
    Always,
}

impl FsConfig {
    /// Who serves the share.
    pub fn source(&self) -> Result<FsSource<'_>, ConfigError> {
        match (&self.shared_dir, &self.socket) {
            (Some(folder), None) => Ok(FsSource::Folder(folder)),
            (None, Some(socket)) => Ok(FsSource::Socket(socket)),
            _ => Err(ConfigError::FolderOrSocket),
        }
    }

    /// The first of its options that only podvmm's own server has.
    fn own_option(&self) -> Option<&'static str> {
        let default = Self::default();
        if self.readonly {
            Some("readonly")
        } else if self.cache != default.cache {
            Some("cache")
        } else if self.writeback {
            Some("writeback")
        } else if self.rate_limiter_config != default.rate_limiter_config {
            Some("rate_limiter_config")
        } else {
            None
        }
    }
}

impl Default for FsConfig {
    /// A share that is not served yet.
    fn default() -> Self {
        Self {
            tag: String::new(),
            shared_dir: None,
            socket: None,
            readonly: false,
            cache: FsCache::default(),
            writeback: false,
            num_queues: 1,
            queue_size: 512,
            rate_limiter_config: RateLimits::default(),
            id: None,
            others: Others::new(),
        }
    }
}

impl Part for FsConfig {
    const SECTION: &'static str = "fs";
    const USAGE: &'static [&'static str] = &[
        "tag=T,shared_dir=D[,readonly=on][,cache=none|auto|always][,writeback=on]",
        "|tag=T,socket=S",
        "[,queues=N][,queue_size=N]",
        RATES,
    ];

    fn host_paths(&self) -> Vec<HostPath> {
        let path = self.source().map(|source| match source {
            FsSource::Folder(folder) if self.readonly => HostPath::read(folder),
            FsSource::Folder(folder) => HostPath::write(folder),
            FsSource::Socket(socket) => HostPath::socket(socket),
        });
        path.into_iter().collect()
    }

    fn checked(self) -> Result<Self, ConfigError> {
        if let (FsSource::Socket(_), Some(option)) = (self.source()?, self.own_option()) {
            return Err(ConfigError::NotOurShare(option));
        }
        if !(1..=36).contains(&self.tag.len()) || self.tag.contains('\0') {
            return Err(ConfigError::Tag(self.tag));
        }
        check_queues(self.num_queues, self.queue_size, 16)?;
        self.rate_limiter_config.check()?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_share_has_a_tag_and_a_folder_or_a_socket() {
        let text = "tag=t,shared_dir=/d,readonly=on,cache=always,queues=2";
        let expected = FsConfig {
            tag: "t".into(),
            shared_dir: Some("/d".into()),
            readonly: true,
            cache: FsCache::Always,
            num_queues: 2,
            ..FsConfig::default()
        };
        assert_eq!(FsConfig::from_options(text).unwrap(), expected);
        let fs = FsConfig::from_options("tag=t,socket=/s").unwrap();
        assert_eq!(fs.source().unwrap(), FsSource::Socket(Path::new("/s")));
    }

    #[test]
    fn nonsense_about_shares_is_named() {
        let cases = [
            ("tag=t", "give either shared_dir=FOLDER or socket=PATH"),
            (
                "tag=t,shared_dir=/d,socket=/s",
                "give either shared_dir=FOLDER or socket=PATH",
            ),
            (
                "shared_dir=/d",
                "tag='': 1 to 36 bytes without NUL are possible",
            ),
            (
                "tag=,shared_dir=/d",
                "tag='': 1 to 36 bytes without NUL are possible",
            ),
            (
                "tag=t,shared_dir=/d,cache=some",
                "cache: unknown variant `some`, expected one of `none`, `auto`, `always`",
            ),
            (
                "tag=t,socket=/s,readonly=on",
                "readonly: the process that serves the socket has options of its own",
            ),
            (
                "tag=t,socket=/s,ops_size=9,ops_refill_time=1",
                "rate_limiter_config: the process that serves the socket has options of its own",
            ),
            (
                "tag=t,shared_dir=/d,bw_size=9",
                "a rate needs a size and a refill time, each at least 1",
            ),
            (
                "tag=t,shared_dir=/d,queues=0",
                "queues=0: 1 to 16 are possible",
            ),
            (
                "tag=t,shared_dir=/d,queue_size=8",
                "queue_size=8 is not a power of two from 16 to 1024",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(refusal::<FsConfig>(text), message);
        }
    }
}
