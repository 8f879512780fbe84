//! A driver that keeps to the rules, over either transport, by way of the puppet: what each case begins
//! with, and what answers or not when it is over.

use std::cell::Cell;
use std::fmt::Debug;

use crate::pci;
use crate::puppet::{Op, Puppet, Step};
use crate::rig::{Rig, Transport};

// Registers (virtio 1.3 §4.2.2, MMIO Device Register Layout).
pub(crate) const DRIVER_FEATURES: u64 = 0x20;
pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
pub(crate) const QUEUE_SEL: u64 = 0x30;
pub(crate) const QUEUE_NUM: u64 = 0x38;
pub(crate) const QUEUE_READY: u64 = 0x44;
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
pub(crate) const INTERRUPT_ACK: u64 = 0x64;
pub(crate) const STATUS: u64 = 0x70;
pub(crate) const QUEUE_DESC: u64 = 0x80;
pub(crate) const QUEUE_DRIVER: u64 = 0x90;
pub(crate) const QUEUE_DEVICE: u64 = 0xa0;
pub(crate) const CONFIG: u64 = 0x100;

// Bits of the status.
pub(crate) const ACKNOWLEDGE: u64 = 1;
pub(crate) const DRIVER: u64 = 2;
pub(crate) const DRIVER_OK: u64 = 4;
pub(crate) const FEATURES_OK: u64 = 8;
pub(crate) const NEEDS_RESET: u64 = 0x40;
pub(crate) const FAILED: u64 = 0x80;
/// What a driver reads that is served.
pub(crate) const LIVE: u64 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Descriptors in each queue.
pub(crate) const SIZE: u16 = 8;
/// Where the queues are, each with its three areas.
const RINGS: u64 = 0x40_0000;
const RING_BYTES: u64 = 0x1_0000;
const DRIVER_AREA: u64 = 0x5000;
const DEVICE_AREA: u64 = 0x8000;
/// For tables of indirect descriptors.
pub(crate) const TABLES: u64 = 0x50_0000;
/// Where requests are. What of it no request lets the device write keeps its pattern.
pub(crate) const BUFFERS: u64 = 0x60_0000;
pub(crate) const BUFFERS_BYTES: usize = 0x1_0000;
const PATTERN: u8 = 0xa5;
/// Room for large requests, which the device may fill.
pub(crate) const LARGE: u64 = 0x100_0000;
pub(crate) const LARGE_BYTES: u64 = 0x200_0000;

/// A part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Buffer {
    /// The device reads it.
    Out(Vec<u8>),
    /// The device writes it.
    In(u32),
    /// Readable, elsewhere in guest RAM or not.
    OutAt(u64, u32),
    /// Writable, elsewhere.
    InAt(u64, u32),
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It came back: how many bytes the device says that it wrote, and what the writable parts hold.
    Answered(u32, Vec<u8>),
    NeedsReset,
}

impl Verdict {
    pub(crate) fn answer(self, of: &str) -> Vec<u8> {
        match self {
            Self::Answered(_, bytes) => bytes,
            Self::NeedsReset => panic!("{of}: the device asks for a reset"),
        }
    }
}

/// A device under test, seen by a driver that knows it.
pub(crate) trait Subject: Debug {
    fn name(&self) -> &'static str;
    /// The virtio device ID.
    fn id(&self) -> u32;
    fn queues(&self) -> u16;
    /// Beside the version.
    fn features(&self) -> u64 {
        0
    }
    /// Follows DRIVER_OK.
    fn begin(&self, driver: &Driver<'_>) {
        let _ = driver;
    }
    /// Sends a well-formed request, and asserts that it is answered rightly.
    fn good(&self, driver: &Driver<'_>, after: &str);
    /// A well-formed request, and its queue.
    fn request(&self) -> (u16, Vec<Buffer>);
    /// Has the device look at a queue of buffers for what comes from the host.
    fn provoke(&self, driver: &Driver<'_>, queue: u16) {
        driver.kick(queue);
    }
    /// Queues whose chains the device looks at as soon as it is provoked.
    fn looked_at(&self) -> Vec<u16> {
        vec![self.request().0]
    }
}

/// The state of one queue.
#[derive(Debug, Default)]
struct Place {
    available: Cell<u16>,
    used: Cell<u16>,
}

/// The driver of one device.
#[derive(Debug)]
pub(crate) struct Driver<'a> {
    pub(crate) rig: &'a Rig,
    pub(crate) subject: &'a dyn Subject,
    pub(crate) window: u64,
    places: Vec<Place>,
}

impl<'a> Driver<'a> {
    pub(crate) fn new(rig: &'a Rig, subject: &'a dyn Subject) -> Self {
        Self {
            rig,
            subject,
            window: rig.window(subject.id()),
            places: (0..subject.queues()).map(|_| Place::default()).collect(),
        }
    }

    pub(crate) fn puppet(&self) -> &'a Puppet {
        &self.rig.puppet
    }

    /// The step that writes a register, which is named by its offset in virtio-mmio's window.
    pub(crate) fn register(&self, register: u64, value: u64) -> Step {
        let (address, width) = self.place(register, value);
        Step::write(address, width, value)
    }

    /// The step that reads a register.
    pub(crate) fn read(&self, register: u64) -> Step {
        let (address, width) = self.place(register, 0);
        Step::read(address, width)
    }

    /// Where a register is, with its width, for a driver that writes `value` there.
    pub(crate) fn place(&self, register: u64, value: u64) -> (u64, u32) {
        let (offset, width) = match self.rig.transport {
            Transport::Mmio => (register, 4),
            Transport::Pci => pci::place(register, value),
        };
        (self.window + offset, width)
    }

    /// Whether a register is wide enough for a value.
    pub(crate) fn has_room(&self, register: u64, value: u64) -> bool {
        let (_, width) = self.place(register, value);
        value < 1 << (8 * width)
    }

    pub(crate) fn set(&self, register: u64, value: u64) {
        self.puppet().run_one(self.register(register, value));
    }

    pub(crate) fn get(&self, register: u64) -> u64 {
        self.puppet().run_one(self.read(register)).value
    }

    pub(crate) fn status(&self) -> u64 {
        self.get(STATUS)
    }

    pub(crate) fn areas(queue: u16) -> [u64; 3] {
        let start = RINGS + u64::from(queue) * RING_BYTES;
        [start, start + DRIVER_AREA, start + DEVICE_AREA]
    }

    /// The steps up to FEATURES_OK.
    pub(crate) fn negotiation(&self, features: u64) -> Vec<Step> {
        let features = features | F_VERSION_1;
        vec![
            self.register(STATUS, 0),
            self.register(STATUS, ACKNOWLEDGE),
            self.register(STATUS, ACKNOWLEDGE | DRIVER),
            self.register(DRIVER_FEATURES_SEL, 0),
            self.register(DRIVER_FEATURES, features & 0xffff_ffff),
            self.register(DRIVER_FEATURES_SEL, 1),
            self.register(DRIVER_FEATURES, features >> 32),
            self.register(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ]
    }

    /// The steps that set up a queue.
    pub(crate) fn queue_setup(&self, queue: u16, size: u16) -> Vec<Step> {
        let [table, driver, device] = Self::areas(queue);
        vec![
            self.register(QUEUE_SEL, queue.into()),
            self.register(QUEUE_NUM, size.into()),
            self.register(QUEUE_DESC, table),
            self.register(QUEUE_DRIVER, driver),
            self.register(QUEUE_DEVICE, device),
            self.register(QUEUE_READY, 1),
        ]
    }

    /// Resets the device and has it serve again, as the subject likes it.
    pub(crate) fn start(&self) {
        self.start_with(self.subject.features());
    }

    pub(crate) fn start_with(&self, features: u64) {
        self.start_sized(features, SIZE);
    }

    pub(crate) fn start_sized(&self, features: u64, size: u16) {
        let mut steps = self.negotiation(features);
        // Rings are cleared while no device looks at them.
        let reset = steps.remove(0);
        self.puppet().run_one(reset);
        self.clear();
        for queue in 0..self.subject.queues() {
            steps.extend(self.queue_setup(queue, size));
        }
        steps.extend([self.register(STATUS, LIVE), self.read(STATUS)]);
        let came = self.puppet().run(&steps);
        let status = came[steps.len() - 1].value;
        assert_eq!(status, LIVE, "{} does not start", self.subject.name());
        self.subject.begin(self);
    }

    /// Clears the rings and the buffers.
    pub(crate) fn clear(&self) {
        let ram = &self.puppet().ram;
        for (queue, place) in (0..).zip(&self.places) {
            let [start, ..] = Self::areas(queue);
            ram.write(start, &[0; 0x8100]);
            place.available.set(0);
            place.used.set(0);
        }
        ram.write(BUFFERS, &[PATTERN; BUFFERS_BYTES]);
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, queue: u16, index: u16, descriptor: (u64, u32, u16, u16)) {
        let [table, ..] = Self::areas(queue);
        let at = table + 16 * u64::from(index);
        self.puppet().ram.write(at, &descriptor_bytes(descriptor));
    }

    /// Makes a chain available by its head, without a notification.
    pub(crate) fn publish(&self, queue: u16, head: u16) {
        let available = self.available(queue);
        let [_, driver, _] = Self::areas(queue);
        let slot = driver + 4 + 2 * u64::from(available % SIZE);
        let ram = &self.puppet().ram;
        ram.write(slot, &head.to_le_bytes());
        self.set_available(queue, available.wrapping_add(1));
    }

    pub(crate) fn available(&self, queue: u16) -> u16 {
        self.places[usize::from(queue)].available.get()
    }

    /// Writes the index of the driver area.
    pub(crate) fn set_available(&self, queue: u16, index: u16) {
        let [_, driver, _] = Self::areas(queue);
        self.puppet().ram.write(driver + 2, &index.to_le_bytes());
        self.places[usize::from(queue)].available.set(index);
    }

    /// The device area's index, as the device has it.
    pub(crate) fn used(&self, queue: u16) -> u16 {
        let [.., device] = Self::areas(queue);
        self.puppet().ram.u16(device + 2)
    }

    pub(crate) fn kick(&self, queue: u16) {
        self.set(QUEUE_NOTIFY, queue.into());
    }

    /// Notifies the device of a queue, and waits until so many chains more came back or the device asks for
    /// a reset: whether it does not.
    pub(crate) fn kick_and_await(&self, queue: u16, chains: u16, what: &str) -> bool {
        let kick = self.register(QUEUE_NOTIFY, queue.into());
        self.run_and_await(&[kick], queue, chains, what)
    }

    /// Waits for what was notified already.
    pub(crate) fn wait(&self, queue: u16, chains: u16, what: &str) -> bool {
        self.run_and_await(&[], queue, chains, what)
    }

    pub(crate) fn run_and_await(
        &self,
        steps: &[Step],
        queue: u16,
        chains: u16,
        what: &str,
    ) -> bool {
        let [.., device] = Self::areas(queue);
        let place = &self.places[usize::from(queue)];
        let expected = place.used.get().wrapping_add(chains);
        let mut steps = steps.to_vec();
        let wait = Step::new(Op::AwaitUsed, device + 2).value(expected.into());
        let (status, width) = self.place(STATUS, 0);
        steps.push(wait.extra(status).width(width));
        self.puppet().begin(0, &steps);
        let came = self.puppet().finish(0, steps.len());
        let name = self.subject.name();
        let came = came.unwrap_or_else(|| {
            let used = self.used(queue);
            panic!("{name}: {what}: no answer on queue {queue}; used {used} of {expected}")
        });
        let is_served = came[steps.len() - 1].more == 0;
        if is_served {
            place.used.set(expected);
        }
        is_served
    }

    /// The chain that came back last: its head, and the bytes said to be written.
    pub(crate) fn last_used(&self, queue: u16) -> (u32, u32) {
        let used = self.places[usize::from(queue)].used.get();
        self.used_at(queue, used.wrapping_sub(1))
    }

    fn used_at(&self, queue: u16, index: u16) -> (u32, u32) {
        let [.., device] = Self::areas(queue);
        let at = device + 4 + 8 * u64::from(index % SIZE);
        let ram = &self.puppet().ram;
        (ram.u32(at), ram.u32(at + 4))
    }

    /// Lays a request out as a chain that begins with descriptor 0. Returns where its writable parts are.
    pub(crate) fn lay(&self, queue: u16, request: &[Buffer]) -> Vec<(u64, u32)> {
        self.lay_from(queue, 0, BUFFERS, request)
    }

    /// Like [`lay`](Self::lay), from another descriptor on and with its buffers elsewhere.
    pub(crate) fn lay_from(
        &self,
        queue: u16,
        first: u16,
        buffers: u64,
        request: &[Buffer],
    ) -> Vec<(u64, u32)> {
        let mut at = buffers;
        let mut room = Vec::new();
        let last = first + u16::try_from(request.len()).expect("it is short") - 1;
        for (index, buffer) in (first..).zip(request) {
            let more = if index < last { NEXT } else { 0 };
            let (start, len, flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.puppet().ram.write(at, bytes);
                    let len = u32::try_from(bytes.len()).expect("it is short");
                    (at, len, more)
                }
                Buffer::In(len) => (at, *len, more | WRITE),
                Buffer::OutAt(start, len) => (*start, *len, more),
                Buffer::InAt(start, len) => (*start, *len, more | WRITE),
            };
            if flags & WRITE != 0 {
                room.push((start, len));
            }
            self.describe(queue, index, (start, len, flags, index + 1));
            if start == at {
                // A gap shows what is written beyond its end.
                at = (at + u64::from(len) + 64).next_multiple_of(16);
            }
        }
        room
    }

    /// Sends one request and waits for what becomes of it.
    pub(crate) fn send(&self, queue: u16, request: &[Buffer], what: &str) -> Verdict {
        self.puppet().ram.write(BUFFERS, &[PATTERN; BUFFERS_BYTES]);
        let before = self.written_before(queue);
        let room = self.lay(queue, request);
        self.publish(queue, 0);
        if !self.kick_and_await(queue, 1, what) {
            return Verdict::NeedsReset;
        }
        let name = self.subject.name();
        let (head, written) = self.last_used(queue);
        assert_eq!(
            head, 0,
            "{name}: {what}: another chain came back; {before:?}"
        );
        let bytes = room.iter().filter(|(start, _)| Self::holds(*start));
        let bytes = bytes.map(|(start, len)| self.puppet().ram.bytes(*start, *len as usize));
        let bytes: Vec<u8> = bytes.flatten().collect();
        self.buffers_are_whole(&room, what);
        Verdict::Answered(written, bytes)
    }

    fn written_before(&self, queue: u16) -> (u16, u16) {
        let place = &self.places[usize::from(queue)];
        (place.available.get(), place.used.get())
    }

    fn holds(start: u64) -> bool {
        (BUFFERS..BUFFERS + BUFFERS_BYTES as u64).contains(&start)
    }

    /// Asserts that of the buffers nothing but `room` and what the driver wrote has changed.
    fn buffers_are_whole(&self, room: &[(u64, u32)], what: &str) {
        // What lies behind the last buffer, and in the gaps behind the writable ones.
        let ram = self.puppet().ram.bytes(BUFFERS, BUFFERS_BYTES);
        let name = self.subject.name();
        for (start, len) in room.iter().filter(|(start, _)| Self::holds(*start)) {
            let end = usize::try_from(start - BUFFERS).expect("it is there") + *len as usize;
            let gap = ram.get(end..(end + 48).min(ram.len())).unwrap_or_default();
            assert!(
                gap.iter().all(|byte| *byte == PATTERN),
                "{name}: {what}: the device wrote beyond a buffer"
            );
        }
        let rest = &ram[BUFFERS_BYTES - 0x1000..];
        let is_used = room
            .iter()
            .any(|(start, len)| start + u64::from(*len) > BUFFERS + BUFFERS_BYTES as u64 - 0x1000);
        assert!(
            is_used || rest.iter().all(|byte| *byte == PATTERN),
            "{name}: {what}: the device wrote where no buffer is"
        );
    }

    /// After a case: a device that asked for a reset gets it, and a well-formed request is answered.
    pub(crate) fn recover(&self, after: &str) {
        if self.status() != LIVE {
            self.start();
        }
        self.subject.good(self, after);
    }

    /// Asserts what the device's status is.
    pub(crate) fn has_status(&self, expected: u64, after: &str) {
        let status = self.status();
        let name = self.subject.name();
        assert_eq!(status, expected, "{name}: {after}: status {status:#x}");
    }

    /// Takes what has come back on a queue as seen, and what the driver area says as written.
    pub(crate) fn follow(&self, queue: u16) {
        let [_, driver, _] = Self::areas(queue);
        let place = &self.places[usize::from(queue)];
        place.available.set(self.puppet().ram.u16(driver + 2));
        place.used.set(self.used(queue));
    }
}

pub(crate) fn descriptor_bytes((start, len, flags, next): (u64, u32, u16, u16)) -> Vec<u8> {
    let mut bytes = start.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}
