//! What the driver of a file system device configures: its tag and its queues.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::handler::FsHandler;
use super::server::{Cache, MAX_REQUEST, Options, Scratch, Server};
use crate::virtio::limiter::Tokens;
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Limits, StateError, Thread,
    VirtioDevice, Work, read_config_bytes,
};

/// Bytes of a tag (virtio 1.3 §5.11.4).
pub(super) const TAG_LEN: usize = 36;

/// A share to be offered.
#[derive(Clone, Debug)]
pub struct FsConfig {
    /// What the guest mounts it by: 1 to 36 bytes, none of them NUL.
    pub tag: String,
    /// The folder to share.
    pub folder: PathBuf,
    pub readonly: bool,
    pub cache: Cache,
    /// The guest may keep what it writes for a while.
    pub writeback: bool,
    /// 1 to 16 request queues, each with a thread.
    pub queues: u16,
    /// Descriptors per queue: a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Files the host may have open for it, of any kind.
    pub descriptors: usize,
    /// What the share is held to, all queues together.
    pub rates: Limits,
    /// Names the threads `<name>-q<n>`; at most 11 bytes, so that they are told apart.
    pub name: String,
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("open shared folder {}", folder.display())]
    Open { folder: PathBuf, source: io::Error },
    #[error("{} is a proc file system: its files are the host itself", .0.display())]
    Proc(PathBuf),
    #[error("open /proc/self/fd, which files are opened by")]
    NoProc(#[source] io::Error),
    #[error("connect to the process that serves the share on {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("agree on vhost-user with the process on {}", socket.display())]
    Agree {
        socket: PathBuf,
        source: vhost::Error,
    },
    #[error("the process on {} does not have {what}", socket.display())]
    Lacks { socket: PathBuf, what: &'static str },
    #[error("a share's tag is 1 to 36 bytes without NUL, not {0:?}")]
    Tag(String),
    #[error("a share has 1 to 16 queues, not {0}")]
    QueueCount(u16),
    #[error("a share's queue size is a power of two from 16 to 1024, not {0}")]
    QueueSize(u16),
}

/// A file system device.
#[derive(Debug)]
pub struct Fs {
    server: Arc<Server>,
    tag: [u8; TAG_LEN],
    /// Size of the queue for requests of high priority, then the sizes of those for all others.
    queue_sizes: Vec<u16>,
    tokens: Tokens,
    name: String,
    counters: Arc<Counters>,
    /// The guest goes on where it was: its files are not to be forgotten.
    goes_on: bool,
}

impl Fs {
    /// Opens the folder.
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        let FsConfig {
            tag,
            folder,
            readonly,
            cache,
            writeback,
            queues,
            queue_size,
            descriptors,
            rates,
            name,
        } = config;
        if !(1..=16).contains(&queues) {
            return Err(FsError::QueueCount(queues));
        }
        if !(16..=1024).contains(&queue_size) || !queue_size.is_power_of_two() {
            return Err(FsError::QueueSize(queue_size));
        }
        let options = Options {
            readonly,
            cache,
            writeback,
            descriptors,
        };
        Ok(Self {
            tag: padded(tag)?,
            server: Arc::new(Server::new(&folder, &options)?),
            queue_sizes: vec![queue_size; usize::from(queues) + 1],
            tokens: Tokens::new(rates),
            name,
            counters: Arc::default(),
            goes_on: false,
        })
    }
}

pub(super) fn padded(tag: String) -> Result<[u8; TAG_LEN], FsError> {
    let mut padded = [0; TAG_LEN];
    match padded.get_mut(..tag.len()) {
        Some(front) if !tag.is_empty() && !tag.contains('\0') => {
            front.copy_from_slice(tag.as_bytes());
            Ok(padded)
        }
        _ => Err(FsError::Tag(tag)),
    }
}

/// `struct virtio_fs_config` (virtio 1.3 §5.11.4), without a notification queue.
pub(super) fn config_space(tag: &[u8; TAG_LEN], request_queues: usize) -> [u8; TAG_LEN + 4] {
    let queues = u32::try_from(request_queues).expect("at most 16");
    let mut config = [0; TAG_LEN + 4];
    config[..TAG_LEN].copy_from_slice(tag);
    config[TAG_LEN..].copy_from_slice(&queues.to_le_bytes());
    config
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        MAX_REQUEST
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = config_space(&self.tag, self.queue_sizes.len() - 1);
        read_config_bytes(&config, offset, data);
    }

    fn threads(&self) -> Vec<Thread> {
        let queues = (0..).zip(&self.queue_sizes).map(|(index, _)| index);
        let thread = |index| Thread::of_queue(&self.name, index, Work::Files);
        queues.map(thread).collect()
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Fs(self.server.state())
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Fs(state) = state else {
            return Err(StateError::Kind);
        };
        self.server.restore(state)?;
        self.goes_on = true;
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        if !std::mem::take(&mut self.goes_on) {
            self.server.clear();
        }
        let Activation { memory, rings, .. } = activation;
        let handlers = rings.into_iter().map(|ring| {
            let limiter = self.tokens.limiter();
            let handler = FsHandler {
                thread: Thread::of_queue(&self.name, ring.index(), Work::Files),
                server: self.server.clone(),
                memory: memory.clone(),
                ring,
                limiter: limiter.map_err(ActivateError::EventFd)?,
                counters: self.counters.clone(),
                scratch: Scratch::default(),
            };
            Ok(Box::new(handler) as Box<dyn Handler>)
        });
        handlers.collect()
    }
}
