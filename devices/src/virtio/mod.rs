//! Virtio devices (virtio 1.3): two traits, and what every device shares.
//!
//! A [`VirtioDevice`] is what the driver configures: it lives behind its transport
//! ([`transport::Transport`]) on the bus. When the driver is ready the device turns its queues and
//! host resources into [`Handler`]s, which *own* them and run on an event loop: nothing on the
//! data path takes a lock. To pause a device its handlers are taken off their loops and kept; to
//! go on they are put back; at a reset they are dropped.
//!
//! ```text
//!  vCPU: register access ─▶ Transport ──▶ Session ─▶ VirtioDevice::activate
//!                                               │  ▲            │ Handlers
//!                             Runner::run ◀─────┘  └─ recall ◀──┘
//!  io:   kick (ioeventfd) ─▶ Handler ─▶ Ring ─▶ Interrupt (irqfd)
//! ```
//!
//! [`rng`] is the smallest device and the one to copy.

pub mod balloon;
pub mod blk;
mod chain;
pub mod console;
mod counters;
pub mod fs;
#[cfg(test)]
mod hostile;
mod interrupt;
mod lent;
mod limiter;
pub mod mem;
mod negotiation;
pub mod net;
mod queue;
pub mod rng;
mod segments;
mod session;
mod setup;
mod state;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod transport;
pub mod vectored;
pub mod vsock;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use event_manager::MutEventSubscriber;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

pub use self::chain::Chain;
pub use self::counters::Counters;
pub use self::interrupt::Interrupt;
pub use self::lent::{Lender, Lent};
pub use self::limiter::{Limits, Rate};
pub use self::queue::{Ring, RingState};
pub use self::segments::{AccessError, Segments};
pub use self::state::{DeviceState, StateError, TransportState};
pub use self::transport::{MmioTransport, PciTransport, Transport};

/// Guest RAM as one reader sees it.
pub type GuestRam = GuestMemoryMmap<()>;
/// Guest RAM that may be mapped anew while devices run. A clone is the same memory.
pub type Memory = GuestMemoryAtomic<GuestRam>;

/// What a driver can configure and activate, whatever the transport.
///
/// All of it runs with the transport's lock held, on the vCPU thread that touched a register.
pub trait VirtioDevice: Send + Debug {
    /// Device ID (virtio 1.3 §5, Device Types).
    fn id(&self) -> u32;

    /// How many queues there are, and the largest size of each: a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Most bytes of one request on queue `queue`, what the device reads and what it writes together.
    /// The ring returns a longer one as not well formed, so that the work of a request has a bound:
    /// a chain can name all of RAM a thousand times. [`usize::MAX`] is for a queue whose handler
    /// keeps to a bound of its own.
    fn max_request_len(&self, queue: u16) -> usize;

    /// Feature bits of the device type. What the transport and the rings offer is added.
    fn features(&self) -> u64;

    /// Fills `data` from the device's configuration space. `data` arrives zeroed and may reach
    /// beyond what the device has, which reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Most devices have nothing there to write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Makes what it stores into longer or shorter, while no handler is at work.
    fn resize(&mut self, bytes: u64) -> Result<(), ResizeError> {
        let _ = bytes;
        Err(ResizeError::Fixed)
    }

    /// The threads that the device's handlers will run on. The transport has them started before the
    /// guest runs, so that no thread that a driver's access reaches has to start another.
    fn threads(&self) -> Vec<Thread> {
        vec![Thread::Io]
    }

    /// Shared with the device's handlers and with the code that gathers metrics.
    fn counters(&self) -> &Arc<Counters>;

    /// What a snapshot must keep that neither the configuration nor the transport says. Handlers
    /// add what they own ([`Handler::add_state`]).
    fn state(&self) -> DeviceState;

    /// Takes over the state of another device of the same configuration, before the first
    /// activation, which is then to go on where that one was.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError>;

    /// The driver has set DRIVER_OK: queues move into handlers. After a device reset this happens
    /// again, so what a handler takes from the device must return when it is dropped ([`Lent`]).
    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError>;
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Feature bits that device and driver agreed on.
    pub features: u64,
    pub memory: Memory,
    /// The queues the driver set up, by ascending index. It need not use all.
    pub rings: Vec<Ring>,
    pub interrupt: Interrupt,
}

impl Activation {
    /// Whether feature `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Takes the ring of the queue numbered `index`, if the driver set it up.
    pub fn take_ring(&mut self, index: u16) -> Option<Ring> {
        let position = self.rings.iter().position(|ring| ring.index() == index)?;
        Some(self.rings.remove(position))
    }
}

/// Why a driver's DRIVER_OK could not be followed. The device then asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("queue {index} is not set up as the driver must")]
    BadQueue { index: u16 },
    #[error("the {what} is still held by an earlier handler")]
    Held { what: &'static str },
    #[error("hand the queues to their thread")]
    Run(#[source] io::Error),
    #[error("duplicate an event fd")]
    EventFd(#[source] io::Error),
    #[error("hand the queues to the process that serves them")]
    Backend(#[source] vhost::Error),
}

/// The active half of a device: it owns queues and host resources, and serves them on one thread.
///
/// `init` registers the fds to watch and may be called again, on another loop, after a pause.
/// `process` must return soon on [`Thread::Io`], and in the time of one batch of requests
/// elsewhere: the thread that recalls the handler waits for it.
pub trait Handler: MutEventSubscriber + Send + Debug {
    /// The thread it must run on.
    fn thread(&self) -> Thread;

    /// Called when the handler was taken off its loop: it must stop any process that works for it
    /// elsewhere. When the handler is put back on a loop, its `init` lets that process go on.
    fn rest(&mut self) {}

    /// Finishes what the guest has queued so far and can be finished, so that nothing it said is
    /// lost when the VM ends. Called while the handler is on no loop and the vCPUs stand still;
    /// may block, but not for ever.
    fn drain(&mut self);

    /// The handler's queues as they stand, for a snapshot.
    fn rings(&self) -> Vec<RingState>;

    /// Adds what the handler owns to its device's state.
    fn add_state(&self, device: &mut DeviceState) {
        let _ = device;
    }
}

/// Where a handler runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Thread {
    /// The loop that all devices share: nothing there may block.
    Io,
    /// A thread of its own, for work that blocks.
    Own {
        /// At most 15 bytes.
        name: String,
        work: Work,
    },
}

/// What a thread of a handler's own does, which says what it needs of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Reads and writes the image of a disk.
    Disk,
    /// Serves the files of a share.
    Files,
    /// Gives guest RAM back to the host, and takes it again.
    Memory,
}

impl Thread {
    /// The thread of queue `index` of the device `name`.
    pub(crate) fn of_queue(name: &str, index: u16, work: Work) -> Self {
        Self::Own {
            name: format!("{name}-q{index}"),
            work,
        }
    }
}

/// Stands for a handler on its loop.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// Runs handlers on event loops. Its calls come from vCPU threads and the control thread, never from a
/// handler.
pub trait Runner: Send + Sync {
    /// Starts the thread, if it is not there yet. What has one loop for all has nothing to start.
    fn prepare(&self, thread: Thread) -> io::Result<()> {
        let _ = thread;
        Ok(())
    }

    /// Ends the thread, once each device has released it that had it prepared.
    fn release(&self, thread: Thread) {
        let _ = thread;
    }

    /// Returns once the handler has been added.
    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket>;

    /// Takes the handler back, after the event it is at. Waits for that for at most `patience`. A
    /// handler that is late leaves its loop as soon as it can; another recall, or [`keep`](Self::keep),
    /// says what becomes of it then.
    fn recall(&self, ticket: Ticket, patience: Duration) -> Recall;

    /// Has a handler that was late for its recall go on as if it had not been recalled.
    fn keep(&self, ticket: Ticket) -> io::Result<Ticket>;
}

/// What became of a recall.
#[derive(Debug)]
pub enum Recall {
    Back(Box<dyn Handler>),
    /// The handler is still at an event, so the host does not answer.
    Late(Ticket),
    /// The handler's loop is gone, and so is the handler.
    Gone,
}

/// A request has been under way for so long that its device could not be stopped.
#[derive(Debug, thiserror::Error)]
#[error("the host has not finished a request for {} s; the device goes on", .0.as_secs())]
pub struct Busy(pub Duration);

/// Why a device has the size that it had.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    #[error("it is no disk, and has one size")]
    Fixed,
    #[error("{bytes} bytes are not a multiple of the {block} that a block has")]
    Odd { bytes: u64, block: u32 },
    #[error("it is read-only")]
    ReadOnly,
    #[error("it is a block device of the host's, which has {0} bytes")]
    BlockDevice(u64),
    #[error("change the length of its file")]
    File(#[source] io::Error),
    #[error(transparent)]
    Busy(#[from] Busy),
    #[error("go on with its requests")]
    Resume(#[source] io::Error),
}

/// Copies from a configuration space that is `config`, and zero beyond it.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..));
    let rest = rest.unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
