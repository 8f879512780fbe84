//! A guest made of a driver alone: it finds a device by its registers, negotiates, sets up queues
//! in RAM and exchanges buffers, with no KVM and no thread. For tests, benches and fuzzers.
//!
//! [`Guest`] does what a good driver does. A caller that wants a bad driver writes registers and
//! RAM directly.

mod bus;
mod lifecycle;
mod plug;
mod steps;

use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Debug};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::{Counters, GuestRam, Handler, Memory, Recall, Runner, Ticket, VirtioDevice};

pub use self::bus::{Access, survive_on_bus};
pub use self::lifecycle::lifecycle;
pub use self::plug::{Plug, Wiring};
pub use self::steps::{NUMBERS, QUEUES, Step, survive, survive_on};

/// RAM from 0, in two regions that touch.
pub const RAM_LEN: u64 = 16 << 20;
/// What every status bit up to DRIVER_OK makes.
pub const LIVE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

/// Each queue's areas start at a multiple of this.
const QUEUE_SPAN: u64 = 0x1_0000;
const DRIVER_AREA: u64 = 0x8000;
const DEVICE_AREA: u64 = 0xa000;
/// Buffers come from here on, round and round.
const BUFFERS: u64 = 4 << 20;

/// Runs handlers on the caller's thread, when told to.
pub struct InlineRunner(Mutex<Loop>);

struct Loop {
    manager: EventManager<Box<dyn Handler>>,
    running: HashMap<u64, SubscriberId>,
    started: u64,
    /// The most time of the processor that a round of events took.
    longest: Duration,
}

impl Default for InlineRunner {
    fn default() -> Self {
        let manager = EventManager::new().expect("create an event loop");
        Self(Mutex::new(Loop {
            manager,
            running: HashMap::new(),
            started: 0,
            longest: Duration::ZERO,
        }))
    }
}

impl InlineRunner {
    /// Handles events until there are none, but at most `limit` times. Says whether it came to
    /// rest.
    pub fn settle(&self, limit: usize) -> bool {
        let mut inner = self.0.lock().expect("no panic while locked");
        (0..limit).any(|_| {
            let started = processor_time();
            let events = inner.manager.run_with_timeout(0).expect("poll");
            let took = processor_time().saturating_sub(started);
            inner.longest = inner.longest.max(took);
            events == 0
        })
    }

    /// The most time of the processor that handlers took for the events that were due at once: for
    /// each of them a turn and one request.
    pub fn longest(&self) -> Duration {
        self.0.lock().expect("no panic while locked").longest
    }

    /// How many handlers there are.
    pub fn running(&self) -> usize {
        self.0.lock().expect("no panic while locked").running.len()
    }
}

/// What this thread has had of the processor, so that a busy machine makes nothing longer.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanos)
}

impl Runner for InlineRunner {
    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket> {
        let mut inner = self.0.lock().expect("no panic while locked");
        inner.started += 1;
        let number = inner.started;
        let id = inner.manager.add_subscriber(handler);
        inner.running.insert(number, id);
        Ok(Ticket(number))
    }

    fn recall(&self, ticket: Ticket, _: Duration) -> Recall {
        let mut inner = self.0.lock().expect("no panic while locked");
        let id = inner.running.remove(&ticket.0);
        let handler = id.and_then(|id| inner.manager.remove_subscriber(id).ok());
        handler.map_or(Recall::Gone, Recall::Back)
    }

    fn keep(&self, ticket: Ticket) -> io::Result<Ticket> {
        Ok(ticket)
    }
}

impl Debug for InlineRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineRunner")
            .field("running", &self.running())
            .finish()
    }
}

/// One buffer of a request.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// The device reads these bytes.
    Out(Vec<u8>),
    /// The device may write so many bytes.
    In(u32),
}

/// How a chain's descriptors reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Direct,
    Indirect,
}

/// A chain in the device's hands.
#[derive(Debug, Default)]
struct Sent {
    descriptors: Vec<u16>,
    /// Start and length of each writable buffer, the length in bytes.
    writable: Vec<(u64, u32)>,
}

#[derive(Debug)]
struct DriverQueue {
    size: u16,
    base: u64,
    free: VecDeque<u16>,
    /// What the device has, by head.
    chains: HashMap<u16, Sent>,
    added: u16,
    taken: u16,
}

/// A device, its driver, and the RAM between them.
#[derive(Debug)]
pub struct Guest {
    pub transport: Plug,
    pub memory: Memory,
    pub irq: EventFd,
    pub runner: Arc<InlineRunner>,
    queues: Vec<DriverQueue>,
    event_idx: bool,
    next_buffer: u64,
}

impl Guest {
    /// Plugs the device in. The driver has not seen it yet.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::new_on(Wiring::Mmio, device)
    }

    /// Plugs the device into a bus of choice.
    pub fn new_on(wiring: Wiring, device: impl VirtioDevice + 'static) -> Self {
        let half = usize::try_from(RAM_LEN / 2).expect("fits");
        let ranges = [(GuestAddress(0), half), (GuestAddress(RAM_LEN / 2), half)];
        let memory = Memory::new(GuestRam::from_ranges(&ranges).expect("map RAM"));
        Self::wire(wiring, memory, device)
    }

    /// Plugs the device into a board with this RAM, which must begin at 0 and be [`RAM_LEN`] long.
    pub fn on(memory: Memory, device: impl VirtioDevice + 'static) -> Self {
        Self::wire(Wiring::Mmio, memory, device)
    }

    fn wire(wiring: Wiring, memory: Memory, device: impl VirtioDevice + 'static) -> Self {
        let irq = EventFd::new(libc::EFD_NONBLOCK).expect("create an event fd");
        let runner = Arc::new(InlineRunner::default());
        let transport = Plug::new(
            wiring,
            memory.clone(),
            Box::new(device),
            irq.try_clone().expect("duplicate an event fd"),
            runner.clone(),
        );
        Self {
            transport: transport.expect("create the transport"),
            memory,
            irq,
            runner,
            queues: Vec::new(),
            event_idx: false,
            next_buffer: BUFFERS,
        }
    }

    /// Moves the driver from the device it has to another one, by way of a snapshot, as if RAM had
    /// been saved and loaded. The first device is gone before `make` is called.
    pub fn move_to<D: VirtioDevice + 'static>(mut self, make: impl FnOnce() -> D) -> Self {
        let before = self.transport.state();
        let mut guest = self.carry_to(make);
        assert_eq!(guest.transport.state(), before);
        guest
    }

    /// Like [`move_to`](Self::move_to), onto a host where not everything is as it was.
    pub fn carry_to<D: VirtioDevice + 'static>(self, make: impl FnOnce() -> D) -> Self {
        let Self {
            mut transport,
            memory,
            queues,
            event_idx,
            next_buffer,
            ..
        } = self;
        let (state, wiring) = (transport.state(), transport.wiring());
        drop(transport);
        let mut guest = Self::wire(wiring, memory, make());
        guest.transport.restore(state).expect("restore");
        Self {
            queues,
            event_idx,
            next_buffer,
            ..guest
        }
    }

    /// Plugs the device in and brings it to DRIVER_OK with all features and all queues.
    pub fn live(device: impl VirtioDevice + 'static) -> Self {
        let mut guest = Self::new(device);
        guest.start(u64::MAX, 16);
        guest
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.transport.counters()
    }

    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Reads `N` bytes of the configuration space.
    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport
            .read(u64::from(VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    pub fn status(&mut self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    /// The features the device offers.
    pub fn offered(&mut self) -> u64 {
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Resets the device and brings it to DRIVER_OK, with the offered features that are also in
    /// `wanted` and queues of at most `size`.
    pub fn start(&mut self, wanted: u64, size: u16) {
        self.negotiate(wanted);
        self.set_up_queues(size);
        self.write(VIRTIO_MMIO_STATUS, LIVE);
    }

    /// Resets the device and goes up to FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.write(
            VIRTIO_MMIO_STATUS,
            VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER,
        );
        let features = self.offered() & wanted;
        for (page, bits) in features.to_le_bytes().chunks(4).enumerate() {
            let bits = u32::from_le_bytes(bits.try_into().expect("four bytes"));
            self.write(
                VIRTIO_MMIO_DRIVER_FEATURES_SEL,
                u32::try_from(page).expect("0 or 1"),
            );
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, bits);
        }
        self.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.write(VIRTIO_MMIO_STATUS, LIVE & !VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// Sets up every queue the device has.
    pub fn set_up_queues(&mut self, size: u16) {
        self.queues.clear();
        for index in 0..u32::try_from(self.transport.kicks().len()).expect("fits") {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            let max_size = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
            let size = size.min(u16::try_from(max_size).expect("a queue size is 16 bits"));
            let base = QUEUE_SPAN * (u64::from(index) + 1);
            let zeroes = vec![0; usize::try_from(QUEUE_SPAN).expect("fits")];
            self.ram()
                .write_slice(&zeroes, GuestAddress(base))
                .expect("queues lie in RAM");
            self.write(VIRTIO_MMIO_QUEUE_NUM, size.into());
            let low = |address| u32::try_from(address).expect("queues lie below 4 GiB");
            self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, low(base));
            self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, low(base + DRIVER_AREA));
            self.write(VIRTIO_MMIO_QUEUE_USED_LOW, low(base + DEVICE_AREA));
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
            self.queues.push(DriverQueue {
                size,
                base,
                free: (0..size).collect(),
                chains: HashMap::new(),
                added: 0,
                taken: 0,
            });
        }
    }

    /// Makes a request available to the device, without telling it. None if the queue is full.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> Option<u16> {
        self.add_by(Table::Direct, queue, buffers)
    }

    /// Like [`add`](Self::add), by a descriptor table of the queue or of its own.
    pub fn add_by(&mut self, table: Table, queue: usize, buffers: &[Buffer]) -> Option<u16> {
        let needed = match table {
            Table::Direct => buffers.len(),
            Table::Indirect => 1,
        };
        if self.queues[queue].free.len() < needed {
            return None;
        }
        let held: Vec<u16> = self.queues[queue].free.drain(..needed).collect();
        let (start, indices) = match table {
            Table::Direct => (self.queues[queue].base, held.clone()),
            Table::Indirect => {
                let entries = u16::try_from(buffers.len()).expect("fits");
                (
                    self.allocate(u32::from(entries) * 16),
                    (0..entries).collect(),
                )
            }
        };
        let writable = self.write_table(start, &indices, buffers);
        if table == Table::Indirect {
            let base = self.queues[queue].base;
            let len = u32::try_from(buffers.len() * 16).expect("fits");
            self.write_descriptor(base, held[0], start, len, VRING_DESC_F_INDIRECT, 0);
        }
        let head = held[0];
        self.queues[queue].chains.insert(
            head,
            Sent {
                descriptors: held,
                writable,
            },
        );
        self.publish(queue, head);
        Some(head)
    }

    /// Makes one writable buffer available that lies at `start`. None if the queue is full.
    pub fn add_at(&mut self, queue: usize, start: u64, len: u32) -> Option<u16> {
        let head = self.queues[queue].free.pop_front()?;
        let base = self.queues[queue].base;
        self.write_descriptor(base, head, start, len, VRING_DESC_F_WRITE, 0);
        let sent = Sent {
            descriptors: vec![head],
            writable: vec![(start, len)],
        };
        self.queues[queue].chains.insert(head, sent);
        self.publish(queue, head);
        Some(head)
    }

    /// Puts `head` into the available ring, whatever it is.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.queues[queue];
        let base = ring.base + DRIVER_AREA;
        let slot = u64::from(ring.added % ring.size);
        ring.added = ring.added.wrapping_add(1);
        let added = ring.added;
        let ram = self.ram();
        ram.write_obj(head, GuestAddress(base + 4 + 2 * slot))
            .expect("the ring lies in RAM");
        ram.write_obj(added, GuestAddress(base + 2))
            .expect("the ring lies in RAM");
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(
            VIRTIO_MMIO_QUEUE_NOTIFY,
            u32::try_from(queue).expect("fits"),
        );
    }

    /// Lets the device work until it rests. A device that never does is the test's failure.
    pub fn settle(&mut self) {
        assert!(self.runner.settle(10_000), "the device never rests");
    }

    /// Adds a request, kicks, lets the device work and returns what it answered.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Option<Vec<u8>> {
        self.add(queue, buffers)?;
        self.kick(queue);
        self.settle();
        self.take(queue)
    }

    /// Whether the device wants to be told of the chain that is added next (virtio 1.3 §2.7.10): if
    /// not, it must find that without a kick.
    pub fn is_to_kick(&self, queue: usize) -> bool {
        let ring = &self.queues[queue];
        let word = |offset: u64| -> u16 {
            let place = GuestAddress(ring.base + DEVICE_AREA + offset);
            self.ram().read_obj(place).expect("the ring lies in RAM")
        };
        if self.event_idx {
            // The avail_event field follows the ring.
            word(4 + 8 * u64::from(ring.size)) == ring.added
        } else {
            word(0) & 1 == 0
        }
    }

    /// How many chains the device has and has not returned.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].chains.len()
    }

    /// Takes the next used chain: the bytes the device says it wrote.
    pub fn take(&mut self, queue: usize) -> Option<Vec<u8>> {
        self.take_used(queue).map(|(_, bytes)| bytes)
    }

    /// Like [`take`](Self::take), with the head of the chain.
    pub fn take_used(&mut self, queue: usize) -> Option<(u16, Vec<u8>)> {
        let ram = self.ram();
        let ring = &mut self.queues[queue];
        let base = ring.base + DEVICE_AREA;
        let used: u16 = ram
            .read_obj(GuestAddress(base + 2))
            .expect("the ring lies in RAM");
        if used == ring.taken {
            return None;
        }
        let slot = base + 4 + 8 * u64::from(ring.taken % ring.size);
        ring.taken = ring.taken.wrapping_add(1);
        let id: u32 = ram
            .read_obj(GuestAddress(slot))
            .expect("the ring lies in RAM");
        let len: u32 = ram
            .read_obj(GuestAddress(slot + 4))
            .expect("the ring lies in RAM");
        let head = u16::try_from(id).expect("a head is 16 bits");
        let Sent {
            descriptors,
            writable,
        } = ring.chains.remove(&head).unwrap_or_default();
        ring.free.extend(descriptors);
        if self.event_idx {
            let used_event = ring.base + DRIVER_AREA + 4 + 2 * u64::from(ring.size);
            ram.write_obj(ring.taken, GuestAddress(used_event))
                .expect("the ring lies in RAM");
        }
        let mut bytes = Vec::new();
        for (start, room) in writable {
            let mut part = vec![0; room as usize];
            ram.read_slice(&mut part, GuestAddress(start))
                .expect("buffers lie in RAM");
            bytes.extend(part);
        }
        bytes.truncate(len as usize);
        Some((head, bytes))
    }

    /// How often the device interrupted since the last time.
    pub fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0) + self.transport.messages()
    }

    pub fn ram(&self) -> impl std::ops::Deref<Target = GuestRam> + use<> {
        self.memory.memory()
    }

    /// Where the queue's descriptor table, driver area and device area are.
    pub fn areas(&self, queue: usize) -> [u64; 3] {
        let base = self.queues[queue].base;
        [base, base + DRIVER_AREA, base + DEVICE_AREA]
    }

    /// Writes one descriptor into the table at `table`.
    pub fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        start: u64,
        len: u32,
        flags: u32,
        next: u16,
    ) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&start.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes()[..2]);
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        let place = GuestAddress(table + 16 * u64::from(index));
        self.ram()
            .write_slice(&descriptor, place)
            .expect("the table lies in RAM");
    }

    /// Links `buffers` by the descriptors numbered `indices`. Returns the writable parts.
    fn write_table(&mut self, table: u64, indices: &[u16], buffers: &[Buffer]) -> Vec<(u64, u32)> {
        let mut writable = Vec::new();
        for (position, buffer) in buffers.iter().enumerate() {
            let (start, len, write) = match buffer {
                Buffer::Out(bytes) => {
                    let len = u32::try_from(bytes.len()).expect("fits");
                    let start = self.allocate(len);
                    let ram = self.ram();
                    ram.write_slice(bytes, GuestAddress(start))
                        .expect("buffers lie in RAM");
                    (start, len, 0)
                }
                Buffer::In(len) => {
                    let start = self.allocate(*len);
                    writable.push((start, *len));
                    (start, *len, VRING_DESC_F_WRITE)
                }
            };
            let next = indices.get(position + 1);
            let flags = write | if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
            let next = next.copied().unwrap_or(0);
            self.write_descriptor(table, indices[position], start, len, flags, next);
        }
        writable
    }

    fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(16);
        if self.next_buffer + len > RAM_LEN {
            self.next_buffer = BUFFERS;
        }
        let start = self.next_buffer;
        self.next_buffer += len;
        start
    }
}
