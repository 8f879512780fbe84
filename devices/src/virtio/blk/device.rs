//! What the driver of a disk configures: its size, its limits and its queues.

use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::handler::BlkHandler;
use super::image::{BlkError, Image};
use super::request::{
    ID_LEN, Limits, MAX_DISCARD, MAX_DISCARD_RANGES, MAX_ZERO_RANGES, MAX_ZEROES,
};
use crate::virtio::limiter::Tokens;
use crate::virtio::{
    self, ActivateError, Activation, Counters, DeviceState, Handler, ResizeError, StateError,
    Thread, VirtioDevice, Work, read_config_bytes,
};

/// A disk to be opened.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    pub readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// 1 to 16 queues, each with a thread.
    pub queues: u16,
    /// Descriptors per queue: a power of two from 4 to 1024.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number: at most 20 bytes.
    pub serial: String,
    /// What the disk is held to, all queues together.
    pub rates: virtio::Limits,
    /// Names the threads `<name>-q<n>`; at most 11 bytes, so that they are told apart.
    pub name: String,
}

/// A block device.
#[derive(Debug)]
pub struct Blk {
    image: Arc<Image>,
    limits: Limits,
    queue_sizes: Vec<u16>,
    id: [u8; ID_LEN],
    tokens: Tokens,
    name: String,
    counters: Arc<Counters>,
}

impl Blk {
    /// Opens and locks the image.
    pub fn open(config: BlkConfig) -> Result<Self, BlkError> {
        let BlkConfig {
            path,
            readonly,
            direct,
            queues,
            queue_size,
            serial,
            rates,
            name,
        } = config;
        if !(1..=16).contains(&queues) {
            return Err(BlkError::QueueCount(queues));
        }
        if !(4..=1024).contains(&queue_size) || !queue_size.is_power_of_two() {
            return Err(BlkError::QueueSize(queue_size));
        }
        let mut id = [0; ID_LEN];
        match id.get_mut(..serial.len()) {
            Some(front) => front.copy_from_slice(serial.as_bytes()),
            None => return Err(BlkError::LongSerial(serial)),
        }
        let image = Image::open(&path, readonly, direct)?;
        let limits = Limits {
            sectors: image.sectors(),
            block: image.block(),
            readonly,
        };
        Ok(Self {
            image: Arc::new(image),
            limits,
            queue_sizes: vec![queue_size; queues.into()],
            id,
            tokens: Tokens::new(rates),
            name,
            counters: Arc::default(),
        })
    }

    /// `struct virtio_blk_config` (virtio 1.3 §5.2.4), up to the fields of write zeroes.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let queues = u16::try_from(self.queue_sizes.len()).expect("at most 16");
        // Two descriptors of a chain are the header and the status.
        let segments = u32::from(self.queue_sizes[0] - 2);
        let block_sectors = self.limits.block / 512;
        put(0, &self.image.sectors().to_le_bytes());
        put(12, &segments.to_le_bytes());
        put(20, &self.limits.block.to_le_bytes());
        put(34, &queues.to_le_bytes());
        put(36, &MAX_DISCARD.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &block_sectors.to_le_bytes());
        put(48, &MAX_ZEROES.to_le_bytes());
        put(52, &MAX_ZERO_RANGES.to_le_bytes());
        // write_zeroes_may_unmap.
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // Where the status goes, a request is refused by it; see `MAX_TRANSFER`.
        usize::MAX
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ;
        let access = if self.limits.readonly {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | access
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn resize(&mut self, bytes: u64) -> Result<(), ResizeError> {
        match self.limits.readonly {
            true => Err(ResizeError::ReadOnly),
            false => self.image.resize(bytes),
        }
    }

    fn threads(&self) -> Vec<Thread> {
        let queues = (0..).zip(&self.queue_sizes).map(|(index, _)| index);
        let thread = |index| Thread::of_queue(&self.name, index, Work::Disk);
        queues.map(thread).collect()
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Blk
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Blk => Ok(()),
            _ => Err(StateError::Kind),
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        // A driver that did not take FLUSH cannot make its writes stable, so each is made so before
        // it is completed.
        let write_through = !activation.has(VIRTIO_BLK_F_FLUSH);
        let Activation { memory, rings, .. } = activation;
        rings
            .into_iter()
            .map(|ring| {
                let limiter = self.tokens.limiter();
                let handler = BlkHandler {
                    thread: Thread::of_queue(&self.name, ring.index(), Work::Disk),
                    image: self.image.clone(),
                    limits: self.limits,
                    id: self.id,
                    write_through,
                    memory: memory.clone(),
                    ring,
                    limiter: limiter.map_err(ActivateError::EventFd)?,
                    counters: self.counters.clone(),
                };
                Ok(Box::new(handler) as Box<dyn Handler>)
            })
            .collect()
    }
}
