//! The transport as a driver sees it, good or bad.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Buffer, Guest, InlineRunner, LIVE, Plug, Table};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Recall, RingState, StateError,
    Thread, Ticket, read_config_bytes,
};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const INT_CONFIG: u32 = 2;

/// A device that does nothing, and can be told to fail.
#[derive(Debug, Default)]
struct Dummy {
    config: Arc<Mutex<[u8; 6]>>,
    handlers: usize,
    fails: bool,
    drained: Arc<AtomicUsize>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct DummyHandler(Arc<AtomicUsize>);

impl MutEventSubscriber for DummyHandler {
    fn init(&mut self, _ops: &mut EventOps) {}
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

impl Handler for DummyHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn drain(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn rings(&self) -> Vec<RingState> {
        Vec::new()
    }
}

impl VirtioDevice for Dummy {
    fn id(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 256]
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        usize::MAX
    }

    fn features(&self) -> u64 {
        1 << 5 | 1 << 40
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&*self.config.lock().unwrap(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        if let Some(place) = config.get_mut(start..start + data.len()) {
            place.copy_from_slice(data);
        }
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(StateError::Kind),
        }
    }

    fn activate(&mut self, _: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        if self.fails {
            return Err(ActivateError::Held { what: "thing" });
        }
        let handler = |_| Box::new(DummyHandler(self.drained.clone())) as Box<dyn Handler>;
        Ok((0..self.handlers).map(handler).collect())
    }
}

/// Lets so many handlers run and then no more.
#[derive(Debug, Default)]
struct Limited {
    inner: InlineRunner,
    left: AtomicUsize,
}

impl Runner for Limited {
    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket> {
        let take = |left: usize| left.checked_sub(1);
        self.left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .map_err(|_| io::Error::other("no thread"))?;
        self.inner.run(handler)
    }

    fn recall(&self, ticket: Ticket, patience: Duration) -> Recall {
        self.inner.recall(ticket, patience)
    }

    fn keep(&self, ticket: Ticket) -> io::Result<Ticket> {
        Ok(ticket)
    }
}

/// Has handlers that come back and one that does not, while it is `stuck`.
#[derive(Debug, Default)]
struct Stuck {
    inner: InlineRunner,
    stuck: AtomicBool,
    kept: AtomicUsize,
}

impl Runner for Stuck {
    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket> {
        self.inner.run(handler)
    }

    fn recall(&self, ticket: Ticket, patience: Duration) -> Recall {
        match ticket {
            Ticket(2) if self.stuck.load(Ordering::SeqCst) => Recall::Late(ticket),
            ticket => self.inner.recall(ticket, patience),
        }
    }

    fn keep(&self, ticket: Ticket) -> io::Result<Ticket> {
        self.kept.fetch_add(1, Ordering::SeqCst);
        Ok(ticket)
    }
}

/// A live device of three handlers, of which the second is stuck.
fn stuck() -> (Guest, Arc<Stuck>) {
    let runner = Arc::new(Stuck::default());
    let mut guest = Guest::new(Dummy::default());
    let device = Box::new(Dummy {
        handlers: 3,
        ..Dummy::default()
    });
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(guest.memory.clone(), device, irqfd, runner.clone());
    guest.transport = Plug::Mmio(transport.unwrap());
    guest.start(u64::MAX, 8);
    runner.stuck.store(true, Ordering::SeqCst);
    (guest, runner)
}

#[test]
fn a_device_that_cannot_be_paused_goes_on() {
    let (mut guest, runner) = stuck();
    guest.transport.pause().unwrap_err();
    assert_eq!(guest.status(), LIVE);
    assert_eq!(runner.inner.running(), 3);
    assert_eq!(runner.kept.load(Ordering::SeqCst), 1);
    runner.stuck.store(false, Ordering::SeqCst);
    guest.transport.pause().unwrap();
    assert_eq!(runner.inner.running(), 0);
    guest.transport.resume().unwrap();
    assert_eq!(runner.inner.running(), 3);
}

#[test]
fn a_reset_is_complete_only_when_no_request_is_under_way() {
    let (mut guest, runner) = stuck();
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    assert_eq!(runner.inner.running(), 3);
    runner.stuck.store(false, Ordering::SeqCst);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((guest.status(), runner.inner.running()), (0, 0));
}

#[test]
fn a_device_that_cannot_be_drained_is_given_up() {
    let (mut guest, runner) = stuck();
    guest.transport.drain();
    drop(guest);
    assert_eq!(runner.inner.running(), 3, "they end with their runner");
}

#[test]
fn a_driver_finds_the_device() {
    let mut guest = Guest::new(Dummy::default());
    let found = [
        VIRTIO_MMIO_MAGIC_VALUE,
        VIRTIO_MMIO_VERSION,
        VIRTIO_MMIO_DEVICE_ID,
        VIRTIO_MMIO_VENDOR_ID,
        VIRTIO_MMIO_STATUS,
        VIRTIO_MMIO_CONFIG_GENERATION,
        VIRTIO_MMIO_INTERRUPT_STATUS,
    ]
    .map(|register| guest.read(register));
    assert_eq!(found, [0x7472_6976, 2, 42, 0x2064_6f70, 0, 0, 0]);
    assert_eq!(
        guest.offered(),
        1 << 5 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 40
    );
}

#[test]
fn each_queue_has_its_own_maximum_and_those_that_are_not_have_none() {
    let mut guest = Guest::new(Dummy::default());
    let sizes = [0, 1, 2, u32::MAX].map(|queue| {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX)
    });
    assert_eq!(sizes, [8, 256, 0, 0]);
    guest.negotiate(u64::MAX);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 2);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn no_shared_memory_region_exists() {
    let mut guest = Guest::new(Dummy::default());
    guest.write(VIRTIO_MMIO_SHM_SEL, 0);
    let lengths = [VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_LEN_HIGH];
    assert_eq!(lengths.map(|register| guest.read(register)), [u32::MAX; 2]);
    assert_eq!(guest.counters().bad_accesses.get(), 0);
}

#[test]
fn registers_take_only_aligned_words() {
    let mut guest = Guest::new(Dummy::default());
    let mut wide = [0; 8];
    guest.transport.read(0, &mut wide);
    let mut byte = [0; 1];
    guest.transport.read(0, &mut byte);
    let mut word = [0; 4];
    guest.transport.read(2, &mut word);
    assert_eq!((wide, byte, word), ([0; 8], [0], [0; 4]));
    guest.transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1]);
    guest
        .transport
        .write(u64::from(VIRTIO_MMIO_STATUS), &[1; 8]);
    guest
        .transport
        .write(u64::from(VIRTIO_MMIO_STATUS) + 1, &[1, 0, 0, 0]);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.counters().bad_accesses.get(), 6);
}

#[test]
fn the_configuration_takes_any_width_once_there_is_a_driver() {
    let mut guest = Guest::new(Dummy::default());
    let config = u64::from(VIRTIO_MMIO_CONFIG);
    guest.transport.write(config, &[9]);
    guest.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    guest.transport.write(config + 1, &[1, 2]);
    guest.transport.write(config + 3, &[3]);
    assert_eq!(guest.config::<8>(0), [0, 1, 2, 3, 0, 0, 0, 0]);
    assert_eq!(guest.config::<2>(2), [2, 3]);
    assert_eq!(guest.config::<4>(5), [0; 4]);
    assert_eq!(guest.config::<4>(0xefc), [0; 4]);
}

#[test]
fn queues_are_set_up_only_between_features_ok_and_driver_ok() {
    let ready = |guest: &mut Guest| {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
        guest.read(VIRTIO_MMIO_QUEUE_READY)
    };
    let mut guest = Guest::new(Dummy::default());
    assert_eq!(ready(&mut guest), 0);
    guest.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    assert_eq!(ready(&mut guest), 0);
    guest.negotiate(u64::MAX);
    assert_eq!(ready(&mut guest), 1);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 7);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.set_up_queues(8);
    guest.write(VIRTIO_MMIO_STATUS, LIVE);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(
        guest.read(VIRTIO_MMIO_QUEUE_READY),
        1,
        "only a reset stops a live queue"
    );
}

#[test]
fn a_queue_that_is_ready_does_not_move() {
    let mut guest = Guest::new(Rng::new());
    guest.negotiate(u64::MAX);
    guest.set_up_queues(16);
    guest.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000);
    guest.write(VIRTIO_MMIO_STATUS, LIVE);
    assert_eq!(guest.request(0, &[Buffer::In(8)]).unwrap().len(), 8);
}

#[test]
fn a_live_queue_does_not_move() {
    let mut guest = Guest::live(Rng::new());
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    guest.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000);
    guest.write(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 0xffff);
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 1);
    assert_eq!(guest.request(0, &[Buffer::In(8)]).unwrap().len(), 8);
    assert_eq!(guest.counters().bad_accesses.get(), 3);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut guest = Guest::new(Dummy::default());
    guest.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1 | 1 << 9);
    guest.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_queue_that_is_not_in_ram_asks_for_a_reset() {
    let mut guest = Guest::new(Dummy::default());
    guest.negotiate(u64::MAX);
    guest.set_up_queues(8);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    guest.write(VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    guest.write(VIRTIO_MMIO_STATUS, LIVE);
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), INT_CONFIG);
    assert_eq!(guest.interrupts(), 1);
    guest.start(u64::MAX, 8);
    assert_eq!(guest.status(), LIVE);
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let mut guest = Guest::live(Dummy {
        fails: true,
        ..Dummy::default()
    });
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn if_one_handler_cannot_run_none_does() {
    let mut guest = Guest::new(Dummy::default());
    let runner = Arc::new(Limited {
        left: AtomicUsize::new(2),
        ..Limited::default()
    });
    let device = Box::new(Dummy {
        handlers: 3,
        ..Dummy::default()
    });
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(guest.memory.clone(), device, irqfd, runner.clone());
    guest.transport = Plug::Mmio(transport.unwrap());
    guest.start(u64::MAX, 8);
    assert_eq!(guest.status(), LIVE | NEEDS_RESET);
    assert_eq!(runner.inner.running(), 0);
}

#[test]
fn draining_pauses_and_drains_every_handler_once() {
    let drained = Arc::default();
    let device = Dummy {
        handlers: 3,
        drained: Arc::clone(&drained),
        ..Dummy::default()
    };
    let mut guest = Guest::live(device);
    guest.transport.drain();
    assert_eq!(
        (drained.load(Ordering::SeqCst), guest.runner.running()),
        (3, 0)
    );
}

#[test]
fn a_device_that_goes_away_takes_its_handlers_along() {
    let guest = Guest::live(Dummy {
        handlers: 2,
        ..Dummy::default()
    });
    let runner = guest.runner.clone();
    assert_eq!(runner.running(), 2);
    drop(guest);
    assert_eq!(runner.running(), 0);
}

#[test]
fn interrupts_are_acknowledged_by_reason() {
    let mut guest = Guest::live(Rng::new());
    guest.request(0, &[Buffer::In(1)]).unwrap();
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 2);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_notification_of_no_queue_or_before_its_time_means_nothing() {
    let mut guest = Guest::new(Rng::new());
    guest.kick(0);
    guest.start(u64::MAX, 16);
    guest.kick(1);
    guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    guest.settle();
    assert_eq!(guest.counters().bad_accesses.get(), 3);
    assert_eq!(guest.counters().kicks.get(), 0);
}

#[test]
fn a_kick_that_came_while_paused_is_not_lost() {
    let mut guest = Guest::live(Rng::new());
    guest.transport.pause().unwrap();
    guest.add(0, &[Buffer::In(4)]).unwrap();
    guest.transport.kicks()[0].write(1).unwrap();
    guest.settle();
    assert_eq!(guest.take(0), None);
    guest.transport.resume().unwrap();
    guest.settle();
    assert_eq!(guest.take(0).unwrap().len(), 4);
}

#[test]
fn what_was_queued_without_a_kick_is_found_on_resume() {
    let mut guest = Guest::live(Rng::new());
    guest.transport.pause().unwrap();
    guest.add(0, &[Buffer::In(4)]).unwrap();
    guest.transport.resume().unwrap();
    guest.settle();
    assert_eq!(guest.take(0).unwrap().len(), 4);
}

#[test]
fn an_interrupt_that_was_not_seen_comes_again_on_resume() {
    let mut guest = Guest::live(Rng::new());
    guest.request(0, &[Buffer::In(4)]).unwrap();
    assert_eq!(guest.interrupts(), 1);
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!(guest.interrupts(), 1);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn a_reset_with_work_queued_leaves_guest_memory_alone() {
    let mut guest = Guest::live(Rng::new());
    guest.add_by(Table::Indirect, 0, &[Buffer::In(8)]).unwrap();
    guest.kick(0);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    guest.settle();
    let used: u16 = guest
        .ram()
        .read_obj(GuestAddress(guest.areas(0)[2] + 2))
        .unwrap();
    assert_eq!((used, guest.interrupts()), (0, 0));
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
}
