//! What the driver of a balloon configures.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::PAGE_BYTES;
use super::discard::Discard;
use super::handler::{self, BalloonHandler, Queues};
use super::target::{BalloonHandle, Target};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, StateError, Thread, VirtioDevice,
    read_config_bytes,
};

/// Feature bits (virtio 1.3 §5.5.3).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_PAGE_REPORTING: u32 = 5;

/// inflateq, deflateq, statsq and reporting_vq (virtio 1.3 §5.5.2). The last is the fourth, not the
/// fifth: queues of features that are not offered are left out, as by other devices and by Linux.
const QUEUE_SIZES: [u16; 4] = [128, 128, 16, 32];

/// Most bytes of page numbers in one request. Each page may take a system call; Linux sends 256 of them.
const MAX_NUMBERS: usize = 64 << 10;
/// Most bytes of pages that one request reports as free. Linux reports up to 128 MiB.
const MAX_REPORT: usize = 1 << 30;

/// A balloon.
#[derive(Clone, Copy, Debug, Default)]
pub struct BalloonConfig {
    /// Memory that the balloon is to take from the guest at first, in bytes.
    pub size: u64,
    /// The guest may take pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest reports free pages by itself.
    pub free_page_reporting: bool,
}

/// What a snapshot keeps of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    pages: u32,
    actual: u32,
}

/// A balloon device.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    target: Arc<Target>,
    counters: Arc<Counters>,
}

impl Balloon {
    pub fn new(config: BalloonConfig) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let pages = u32::try_from(config.size / PAGE_BYTES).unwrap_or(u32::MAX);
        let target = Target {
            pages: AtomicU32::new(pages),
            actual: AtomicU32::new(0),
            statistics: Mutex::new(None),
            changed: event()?,
            ask: event()?,
        };
        Ok(Self {
            config,
            target: Arc::new(target),
            counters: Arc::default(),
        })
    }

    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(self.target.clone())
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = if self.config.free_page_reporting {
            4
        } else {
            3
        };
        &QUEUE_SIZES[..count]
    }

    fn max_request_len(&self, queue: u16) -> usize {
        match queue {
            0 | 1 => MAX_NUMBERS,
            // Statistics, of which only the first are looked at, and reports.
            _ => MAX_REPORT,
        }
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_STATS_VQ
            | u64::from(self.config.deflate_on_oom) << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | u64::from(self.config.free_page_reporting) << VIRTIO_BALLOON_F_PAGE_REPORTING
    }

    /// num_pages and actual (virtio 1.3 §5.5.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target.pages.load(Ordering::SeqCst).to_le_bytes());
        config[4..].copy_from_slice(&self.target.actual.load(Ordering::SeqCst).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    /// The driver writes `actual`, always as a whole.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(actual);
            self.target.actual.store(actual, Ordering::SeqCst);
        }
    }

    fn threads(&self) -> Vec<Thread> {
        vec![handler::thread()]
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            pages: self.target.pages.load(Ordering::SeqCst),
            actual: self.target.actual.load(Ordering::SeqCst),
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(state) = state else {
            return Err(StateError::Kind);
        };
        self.target.pages.store(state.pages, Ordering::SeqCst);
        self.target.actual.store(state.actual, Ordering::SeqCst);
        Ok(())
    }

    fn activate(
        &mut self,
        mut activation: Activation,
    ) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let statistics = activation.has(VIRTIO_BALLOON_F_STATS_VQ);
        let reporting = activation.has(VIRTIO_BALLOON_F_PAGE_REPORTING);
        let queues = Queues {
            inflate: activation.take_ring(0),
            deflate: activation.take_ring(1),
            statistics: statistics.then(|| activation.take_ring(2)).flatten(),
            reporting: reporting
                .then(|| activation.take_ring(2 + u16::from(statistics)))
                .flatten(),
        };
        Ok(vec![Box::new(BalloonHandler {
            discard: Discard::new(&activation.memory.memory()),
            queues,
            unused: activation.rings,
            target: self.target.clone(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            counters: self.counters.clone(),
        })])
    }
}
