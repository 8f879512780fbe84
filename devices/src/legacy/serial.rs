//! A 16550A serial port: early console and, without a command to run, the user's terminal.
//!
//! The registers are vm-superio's. What is added is the host's side: the guest writes one byte
//! per exit, on a vCPU thread that must not wait for a slow terminal, so `out` is expected to
//! take bytes without blocking; and the guest reads when it likes,
//! so input that finds the 64-byte FIFO full stays with the host until there is room.

use std::fmt::{self, Debug};
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::counter::Counter;

/// Number of registers, one port each.
pub const SERIAL_LEN: u64 = 8;
/// First port of COM1, which raises ISA interrupt 4.
pub const COM1_BASE: u64 = 0x3f8;

const MODEM_CONTROL: u8 = 4;

/// Raises the interrupt line through KVM_IRQFD (kvm/api.rst 4.75).
struct Irqfd(EventFd);

impl Trigger for Irqfd {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What a serial port has seen, readable from any thread.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes the guest sent and `out` took.
    pub sent: Counter,
    /// Bytes the guest sent that `out` refused.
    pub lost: Counter,
    /// Bytes the guest read.
    pub received: Counter,
}

struct Events {
    counters: Arc<SerialCounters>,
    room: EventFd,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {
        self.counters.received.increment();
    }

    fn out_byte(&self) {
        self.counters.sent.increment();
    }

    fn tx_lost_byte(&self) {
        self.counters.lost.increment();
    }

    fn in_buffer_empty(&self) {
        // Fails only when 2^64 - 2 earlier wake-ups are still unread: then one is due anyway.
        let _ = self.room.write(1);
    }
}

/// A serial port on eight consecutive I/O ports.
pub struct Serial {
    uart: vm_superio::Serial<Irqfd, Events, Box<dyn Write + Send>>,
}

impl Serial {
    /// `interrupt` is the irqfd of the port's line. `out` gets each byte the guest sends and a
    /// flush after it, on a vCPU thread.
    pub fn new(interrupt: EventFd, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let counters = Arc::default();
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let events = Events { counters, room };
        let uart = vm_superio::Serial::with_events(Irqfd(interrupt), events, out);
        Ok(Self { uart })
    }

    /// Gives the guest as much of `input` as the FIFO has room for and returns how much that was.
    /// The rest stays with the caller, who tries again when [`Serial::room`] fires.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let free = self.free();
        // A full FIFO and loopback mode take nothing, and an irqfd that cannot be raised has one
        // pending: what was taken shows in the room that is left.
        let _ = self.uart.enqueue_raw_bytes(input);
        free - self.free()
    }

    /// How many bytes of input fit now.
    pub fn free(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Fires whenever the guest has emptied the FIFO, or may have left loopback mode.
    pub fn room(&self) -> io::Result<EventFd> {
        self.uart.events().room.try_clone()
    }

    pub fn counters(&self) -> Arc<SerialCounters> {
        self.uart.events().counters.clone()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(register), [value]) = (u8::try_from(offset), data) {
            *value = self.uart.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), [value]) = (u8::try_from(offset), data) {
            // Lost output is counted where it is lost, and an irqfd that cannot be raised has
            // one pending already.
            let _ = self.uart.write(register, *value);
            if register == MODEM_CONTROL {
                let _ = self.uart.events().room.write(1);
            }
        }
    }
}

impl Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("counters", &self.uart.events().counters)
            .finish()
    }
}
