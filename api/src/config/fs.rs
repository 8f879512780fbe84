//! Shared folders.

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use super::ConfigError;
use crate::options::Options;

/// A share: `tag=T,shared_dir=D[,readonly=on][,cache=none|auto|always][,writeback=on]`, or
/// `tag=T,socket=S`, and `[,queues=N][,queue_size=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsConfig {
    /// What the guest mounts it by: 1 to 36 bytes, none of them NUL.
    pub tag: String,
    /// Who serves it.
    pub source: FsSource,
    /// Request queues, 1 to 16.
    pub queues: u16,
    /// Descriptors in each queue, a power of two from 16 to 1024.
    pub queue_size: u16,
}

/// Who serves a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsSource {
    /// podvmm, from a folder.
    Folder(FolderConfig),
    /// Another process, such as virtiofsd, by vhost-user on this socket.
    Socket(PathBuf),
}

/// A folder to be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderConfig {
    /// Where it is.
    pub path: PathBuf,
    /// Refuse writes.
    pub readonly: bool,
    /// What the guest may keep without asking again.
    pub cache: FsCache,
    /// The guest may keep what it writes for a while.
    pub writeback: bool,
}

/// What a guest may keep of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FsCache {
    /// Nothing.
    None,
    /// Names and attributes for a second, content until it is seen to have changed.
    #[default]
    Auto,
    /// Everything.
    Always,
}

/// No such mode.
#[derive(Debug, Error)]
#[error("'{0}' is none of none, auto, always")]
pub struct NotACache(String);

impl FromStr for FsCache {
    type Err = NotACache;

    fn from_str(text: &str) -> Result<Self, NotACache> {
        match text {
            "none" | "never" => Ok(Self::None),
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err(NotACache(text.into())),
        }
    }
}

impl FsConfig {
    /// A share with defaults for everything else.
    pub fn new(tag: String, source: FsSource) -> Self {
        Self {
            tag,
            source,
            queues: 1,
            queue_size: 512,
        }
    }

    /// Itself, if all of it is in range.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        if !(1..=36).contains(&self.tag.len()) || self.tag.contains('\0') {
            return Err(ConfigError::Tag(self.tag));
        }
        super::check_queues(self.queues, self.queue_size, 16)?;
        Ok(self)
    }
}

impl FolderConfig {
    /// A folder with defaults for everything else.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            readonly: false,
            cache: FsCache::default(),
            writeback: false,
        }
    }
}

impl FromStr for FsConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &[
            "tag",
            "shared_dir",
            "socket",
            "readonly",
            "cache",
            "writeback",
            "queues",
            "queue_size",
        ];
        const FOLDERS: [&str; 3] = ["readonly", "cache", "writeback"];
        let options = Options::parse(text, KEYS)?;
        let source = match (options.value("shared_dir")?, options.value("socket")?) {
            (Some(path), None) => FsSource::Folder(FolderConfig {
                path,
                readonly: options.switch("readonly", false)?,
                cache: options.value("cache")?.unwrap_or_default(),
                writeback: options.switch("writeback", false)?,
            }),
            (None, Some(socket)) => {
                if let Some(key) = FOLDERS.into_iter().find(|key| options.has(key)) {
                    return Err(ConfigError::NotOurShare(key));
                }
                FsSource::Socket(socket)
            }
            _ => return Err(ConfigError::FolderOrSocket),
        };
        let default = Self::new(options.required("tag")?, source);
        Self {
            queues: options.value("queues")?.unwrap_or(default.queues),
            queue_size: options.value("queue_size")?.unwrap_or(default.queue_size),
            ..default
        }
        .checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_share_has_a_tag_and_a_folder_or_a_socket() {
        let fs: FsConfig = "tag=t,shared_dir=/d,readonly=on,cache=always,queues=2"
            .parse()
            .unwrap();
        let folder = FolderConfig {
            readonly: true,
            cache: FsCache::Always,
            ..FolderConfig::new("/d".into())
        };
        assert_eq!((fs.source, fs.queues), (FsSource::Folder(folder), 2));
        let fs: FsConfig = "tag=t,socket=/s".parse().unwrap();
        assert_eq!(fs.source, FsSource::Socket("/s".into()));
    }

    #[test]
    fn nonsense_about_shares_is_named() {
        let cases = [
            ("tag=t", "give either shared_dir=FOLDER or socket=PATH"),
            (
                "tag=t,shared_dir=/d,socket=/s",
                "give either shared_dir=FOLDER or socket=PATH",
            ),
            ("shared_dir=/d", "'tag' is missing"),
            (
                "tag=,shared_dir=/d",
                "tag='': 1 to 36 bytes without NUL are possible",
            ),
            (
                "tag=t,shared_dir=/d,cache=some",
                "cache: 'some' is none of none, auto, always",
            ),
            (
                "tag=t,socket=/s,readonly=on",
                "'readonly' is for whoever serves the socket to say",
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
