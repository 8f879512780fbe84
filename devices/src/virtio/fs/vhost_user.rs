//! A share that another process serves, such as virtiofsd, by the vhost-user protocol: it maps the
//! guest's RAM and works on the queues itself. Here the driver is answered, the other is told where
//! the queues are, and its interrupts are passed on.
//!
//! The other process sees all of the guest's RAM, and the whole region of memory that can be
//! plugged. It is trusted with the guest, not with this process: what it says is checked, and it
//! has five seconds for each answer.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::device::{TAG_LEN, config_space, padded};
use super::{FsError, FsState};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Interrupt, Lender, Lent, Memory,
    Ring, RingState, StateError, Thread, VirtioDevice, read_config_bytes,
};

/// How long the other process may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What every device here offers, and so the other process must have.
const NEEDED: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A share to be connected to.
#[derive(Clone, Debug)]
pub struct VhostUserFsConfig {
    /// What the guest mounts it by: 1 to 36 bytes, none of them NUL.
    pub tag: String,
    /// Where the other process listens.
    pub socket: PathBuf,
    /// 1 to 16 request queues.
    pub queues: u16,
    /// Descriptors per queue: a power of two from 16 to 1024.
    pub queue_size: u16,
}

/// A file system device whose queues another process serves.
#[derive(Debug)]
pub struct VhostUserFs {
    tag: [u8; TAG_LEN],
    queue_sizes: Vec<u16>,
    backend: Lender<Backend>,
    counters: Arc<Counters>,
}

/// The other process.
struct Backend {
    frontend: Frontend,
    socket: PathBuf,
}

impl VhostUserFs {
    /// Connects to the other process, which must be listening, and agrees on the protocol.
    pub fn connect(config: VhostUserFsConfig) -> Result<Self, FsError> {
        let VhostUserFsConfig {
            tag,
            socket,
            queues,
            queue_size,
        } = config;
        let all = u64::from(queues) + 1;
        let connect = |source| FsError::Connect {
            socket: socket.clone(),
            source,
        };
        let stream = UnixStream::connect(&socket).map_err(connect)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(connect)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(connect)?;
        let mut frontend = Frontend::from_stream(stream, all);
        let agree = |source| FsError::Agree {
            socket: socket.clone(),
            source,
        };
        let lacks = |what| FsError::Lacks {
            socket: socket.clone(),
            what,
        };
        let features = frontend.get_features().map_err(agree)?;
        if features & NEEDED != NEEDED {
            return Err(lacks(
                "virtio 1.0 with indirect descriptors and event index",
            ));
        }
        frontend.set_owner().map_err(agree)?;
        let mut queue_sizes = vec![queue_size; 2];
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let offered = frontend.get_protocol_features().map_err(agree)?;
            let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
            frontend
                .set_protocol_features(offered & wanted)
                .map_err(agree)?;
            if offered.contains(VhostUserProtocolFeatures::MQ)
                && frontend.get_queue_num().map_err(agree)? < all
            {
                return Err(lacks("so many queues"));
            }
            queue_sizes.resize(usize::from(queues) + 1, queue_size);
        } else if queues > 1 {
            return Err(lacks("more than one request queue"));
        }
        Ok(Self {
            tag: padded(tag)?,
            queue_sizes,
            backend: Lender::new(Backend { frontend, socket }),
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for VhostUserFs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // The other process serves them.
        usize::MAX
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = config_space(&self.tag, self.queue_sizes.len() - 1);
        read_config_bytes(&config, offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// What the other process knows of the guest's files stays there.
    fn state(&self) -> DeviceState {
        DeviceState::Fs(FsState::default())
    }

    fn restore(&mut self, _state: DeviceState) -> Result<(), StateError> {
        Err(StateError::Device(
            "its files are known to the process that served it, and to no other".into(),
        ))
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let backend = self.backend.lend().ok_or(ActivateError::Held {
            what: "connection to the process that serves the share",
        })?;
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        let call = EventFd::new(flags).map_err(ActivateError::EventFd)?;
        let Activation {
            features,
            memory,
            rings,
            interrupt,
        } = activation;
        let mut handler = VhostUserHandler {
            backend,
            features,
            memory,
            rings,
            call,
            interrupt,
            counters: self.counters.clone(),
            works: false,
        };
        handler.introduce().map_err(ActivateError::Backend)?;
        handler.start().map_err(ActivateError::Backend)?;
        Ok(vec![Box::new(handler)])
    }
}

/// Passes the other process's interrupts on, and sees when it is gone.
#[derive(Debug)]
struct VhostUserHandler {
    backend: Lent<Backend>,
    features: u64,
    memory: Memory,
    rings: Vec<Ring>,
    /// Written to by the other process when it has used buffers.
    call: EventFd,
    interrupt: Interrupt,
    counters: Arc<Counters>,
    /// The other process works on the queues.
    works: bool,
}

/// What the events of its loop are.
const CALL: u32 = 0;
const SOCKET: u32 = 1;

impl VhostUserHandler {
    /// Tells what was agreed on with the driver, and where RAM is.
    fn introduce(&self) -> Result<(), vhost::Error> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.backend
            .frontend
            .set_features(self.features | protocol)?;
        let ram = self.memory.memory();
        let regions: Option<Vec<_>> = ram.iter().map(region).collect();
        // This was checked when the VM was configured, so an error here is a defect to report.
        let regions = regions.ok_or(vhost::Error::InvalidGuestMemory)?;
        self.backend.frontend.set_mem_table(&regions)?;
        Ok(())
    }

    fn start(&mut self) -> Result<(), vhost::Error> {
        let ram = self.memory.memory();
        for ring in &self.rings {
            let index = usize::from(ring.index());
            let queue = ring.queue();
            let frontend = &self.backend.frontend;
            frontend.set_vring_num(index, queue.size())?;
            let address = |guest: u64| {
                let host = ram.get_host_address(GuestAddress(guest));
                let host = host.map_err(|_| vhost::Error::InvalidGuestMemory)?;
                Ok::<_, vhost::Error>(host.addr() as u64)
            };
            frontend.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: queue.max_size(),
                    queue_size: queue.size(),
                    flags: 0,
                    desc_table_addr: address(queue.desc_table())?,
                    used_ring_addr: address(queue.used_ring())?,
                    avail_ring_addr: address(queue.avail_ring())?,
                    log_addr: None,
                },
            )?;
            frontend.set_vring_base(index, queue.next_avail())?;
            frontend.set_vring_call(index, &self.call)?;
            frontend.set_vring_kick(index, ring.kick())?;
        }
        for ring in &self.rings {
            let index = usize::from(ring.index());
            self.backend
                .frontend
                .clone()
                .set_vring_enable(index, true)?;
        }
        self.works = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), vhost::Error> {
        self.works = false;
        for ring in &mut self.rings {
            let index = ring.index();
            let base = self.backend.frontend.get_vring_base(index.into())?;
            let next = u16::try_from(base).map_err(|_| vhost::Error::InvalidQueue)?;
            // In a split queue that is used in order of completion nothing else is open.
            ring.restore(RingState {
                index,
                next_available: next,
                next_used: next,
            });
        }
        Ok(())
    }

    fn fail(&self, error: &dyn fmt::Display) {
        log::error!(
            "the share served on {}: {error}",
            self.backend.socket.display()
        );
        self.interrupt.notify_needs_reset();
    }

    fn socket(&self) -> BorrowedFd<'_> {
        let fd = self.backend.frontend.as_raw_fd();
        // SAFETY: the connection is open as long as `self.backend`, from which it is borrowed.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

fn region(region: &impl GuestMemoryRegion) -> Option<VhostUserMemoryRegionInfo> {
    let file = region.file_offset()?;
    let host = region
        .get_host_address(vm_memory::MemoryRegionAddress(0))
        .ok()?;
    Some(VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: host.addr() as u64,
        mmap_offset: file.start(),
        mmap_handle: file.file().as_raw_fd(),
    })
}

impl MutEventSubscriber for VhostUserHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if !self.works
            && let Err(error) = self.start()
        {
            self.fail(&error);
        }
        let call = Events::with_data(&self.call, CALL, EventSet::IN);
        let gone = EventSet::HANG_UP | EventSet::READ_HANG_UP;
        let socket = Events::with_data(&self.socket(), SOCKET, gone);
        for event in [call, socket] {
            if let Err(error) = ops.add(event) {
                self.fail(&io::Error::other(error));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == CALL {
            if let Ok(calls) = self.call.read() {
                self.counters.requests.add(calls);
                self.interrupt
                    .notify_queues(self.rings.iter().map(Ring::index));
            }
        } else {
            let socket = Events::with_data(&self.socket(), SOCKET, EventSet::empty());
            // It would be reported again and again.
            let _ = ops.remove(socket);
            self.works = false;
            self.fail(&"the process that serves it is gone");
        }
    }
}

impl Handler for VhostUserHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn rest(&mut self) {
        if self.works
            && let Err(error) = self.stop()
        {
            self.fail(&error);
        }
    }

    /// The other process finishes what it has taken before it says how far it is.
    fn drain(&mut self) {}

    fn rings(&self) -> Vec<RingState> {
        self.rings.iter().map(Ring::state).collect()
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
