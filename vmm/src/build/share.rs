//! Shares from where a configuration says they are.

use api::{ConfigError, FsCache, FsConfig, FsSource};
use devices::virtio::VirtioDevice;
use devices::virtio::fs::{self, Cache, Fs, FsError, VhostUserFs, VhostUserFsConfig};
use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::rates;

/// Why there is no share.
#[derive(Debug, Error)]
pub(crate) enum ShareError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// Descriptors that shares leave to everything else.
const OTHERS: u64 = 512;

/// The device that `config` describes, one of `count`. Its threads are called by `name`.
pub(crate) fn device(
    config: &FsConfig,
    name: String,
    count: usize,
) -> Result<Box<dyn VirtioDevice>, ShareError> {
    let (tag, queues, queue_size) = (config.tag.clone(), config.num_queues, config.queue_size);
    match config.source()? {
        FsSource::Folder(folder) => {
            let share = Fs::new(fs::FsConfig {
                tag,
                folder: folder.into(),
                readonly: config.readonly,
                cache: match config.cache {
                    FsCache::None => Cache::None,
                    FsCache::Auto => Cache::Auto,
                    FsCache::Always => Cache::Always,
                },
                writeback: config.writeback,
                queues,
                queue_size,
                descriptors: descriptors(count),
                rates: rates(&config.rate_limiter_config),
                name,
            });
            Ok(Box::new(share?))
        }
        FsSource::Socket(socket) => {
            let share = VhostUserFs::connect(VhostUserFsConfig {
                tag,
                socket: socket.into(),
                queues,
                queue_size,
            });
            Ok(Box::new(share?))
        }
    }
}

/// What each of `count` shares may open of the files that this process may have open. Shares that were there before
/// one more came keep what they have, so together they may try to open more than there are: then it is this
/// VM's requests that fail.
fn descriptors(count: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let all = usize::try_from(limit.saturating_sub(OTHERS)).unwrap_or(usize::MAX);
    all / count.max(1)
}
