//! A 16550A serial port: early console and, without a command to run, the user's terminal.
//!
//! The registers are vm-superio's. What is added is the host's side: the guest writes one byte
//! per exit, on a vCPU thread that must not wait for a slow terminal, so what is given as `out`
//! must not block for long (see [`crate::host::Output`]); and the guest reads when it likes, so
//! input that finds the 64-byte FIFO full stays with the host until there is room.

use std::fmt::{self, Debug};
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
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

impl Events {
    fn new() -> io::Result<Self> {
        Ok(Self {
            counters: Arc::default(),
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }
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

/// What a snapshot keeps of a serial port: its registers, and input the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState(#[serde(with = "Registers")] vm_superio::SerialState);

/// A serial port's state in a snapshot.
#[derive(Serialize, Deserialize)]
#[serde(remote = "vm_superio::SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A serial port on eight consecutive I/O ports.
pub struct Serial {
    uart: vm_superio::Serial<Irqfd, Events, Box<dyn Write + Send>>,
}

impl Serial {
    /// `interrupt` is the irqfd of the port's line. `out` gets each byte the guest sends and a
    /// flush after it, on a vCPU thread.
    pub fn new(interrupt: EventFd, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let uart = vm_superio::Serial::with_events(Irqfd(interrupt), Events::new()?, out);
        Ok(Self { uart })
    }

    /// Goes on where another port was.
    pub fn restored(
        state: &SerialState,
        interrupt: EventFd,
        out: Box<dyn Write + Send>,
    ) -> io::Result<Self> {
        // Refuses more input than the FIFO holds.
        let uart = vm_superio::Serial::from_state(&state.0, Irqfd(interrupt), Events::new()?, out)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{error:?}")))?;
        Ok(Self { uart })
    }

    pub fn state(&self) -> SerialState {
        SerialState(self.uart.state())
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

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use proptest::prelude::*;

    use super::*;

    // Registers, and of those behind another one the name it has when it is reached.
    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_ID: u64 = 2;
    const FIFO_CONTROL: u64 = 2;
    const LINE_CONTROL: u64 = 3;
    const LINE_STATUS: u64 = 5;
    const MODEM_STATUS: u64 = 6;
    const SCRATCH: u64 = 7;

    struct Sink(mpsc::Sender<u8>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            bytes
                .iter()
                .try_for_each(|&byte| self.0.send(byte))
                .map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Port {
        serial: Serial,
        irq: EventFd,
        printed: mpsc::Receiver<u8>,
    }

    fn port() -> Port {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (sender, printed) = mpsc::channel();
        let serial = Serial::new(irq.try_clone().unwrap(), Box::new(Sink(sender))).unwrap();
        Port {
            serial,
            irq,
            printed,
        }
    }

    impl Port {
        fn read(&mut self, register: u64) -> u8 {
            let mut data = [0];
            self.serial.read(register, &mut data);
            data[0]
        }

        fn write(&mut self, register: u64, value: u8) {
            self.serial.write(register, &[value]);
        }
    }

    #[test]
    fn a_restored_port_goes_on_with_its_registers_and_input() {
        let mut port = port();
        port.serial.write(SCRATCH, &[0x5a]);
        port.serial.enqueue(b"xy");
        let text = serde_json::to_string(&port.serial.state()).unwrap();
        let state: SerialState = serde_json::from_str(&text).unwrap();
        let irq = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut other = Serial::restored(&state, irq(), Box::new(io::sink())).unwrap();
        let read = |serial: &mut Serial, register| {
            let mut byte = [0];
            serial.read(register, &mut byte);
            byte[0]
        };
        let found = [SCRATCH, DATA, DATA].map(|register| read(&mut other, register));
        assert_eq!(found, *b"\x5axy");
        let mut crammed = state;
        crammed.0.in_buffer = vec![0; 65];
        Serial::restored(&crammed, irq(), Box::new(io::sink())).unwrap_err();
    }

    #[test]
    fn what_the_guest_sends_is_printed() {
        let mut port = port();
        port.write(DATA, b'h');
        port.write(DATA, b'i');
        assert_eq!(port.printed.try_iter().collect::<Vec<_>>(), b"hi");
        assert_eq!(port.serial.counters().sent.get(), 2);
    }

    #[test]
    fn output_that_is_refused_is_counted_and_the_guest_goes_on() {
        let mut port = port();
        port.printed = mpsc::channel().1;
        port.write(INTERRUPT_ENABLE, 0b10);
        let raised = port.irq.read().unwrap();
        port.read(INTERRUPT_ID);
        port.write(DATA, b'x');
        assert_eq!(port.serial.counters().lost.get(), 1);
        assert_eq!((raised, port.irq.read().unwrap()), (1, 1));
    }

    /// The steps of Linux's 8250 probe that decide which chip it sees and how long it waits.
    #[test]
    fn linux_finds_a_16550a() {
        let mut port = port();
        port.write(SCRATCH, 0x5a);
        assert_eq!(port.read(SCRATCH), 0x5a);
        // Nothing but the four interrupts of a 16550A can be enabled.
        port.write(INTERRUPT_ENABLE, 0xff);
        assert_eq!(port.read(INTERRUPT_ENABLE), 0x0f);
        port.write(INTERRUPT_ENABLE, 0);
        // Loopback: RTS and OUT2 come back as CTS and DCD.
        port.write(MODEM_CONTROL.into(), 0x1a);
        assert_eq!(port.read(MODEM_STATUS) & 0xf0, 0x90);
        port.write(MODEM_CONTROL.into(), 0);
        port.write(FIFO_CONTROL, 0x01);
        assert_eq!(port.read(INTERRUPT_ID) >> 6, 0b11);
        // The transmitter is always empty, so the driver does not poll for it.
        assert_eq!(port.read(LINE_STATUS), 0x60);
    }

    #[test]
    fn input_beyond_the_fifo_stays_with_the_host_until_there_is_room() {
        let mut port = port();
        let room = port.serial.room().unwrap();
        let input: Vec<u8> = (0..100).collect();
        assert_eq!(port.serial.enqueue(&input), 64);
        assert_eq!(
            (port.serial.free(), port.serial.enqueue(&input[64..])),
            (0, 0)
        );
        room.read().unwrap_err();
        let first: Vec<u8> = (0..64).map(|_| port.read(DATA)).collect();
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(port.serial.enqueue(&input[64..]), 36);
        let rest: Vec<u8> = (0..36).map(|_| port.read(DATA)).collect();
        assert_eq!([first, rest].concat(), input);
        assert_eq!(port.read(LINE_STATUS) & 1, 0);
    }

    #[test]
    fn input_raises_the_line_if_the_guest_wants() {
        let mut port = port();
        port.serial.enqueue(b"a");
        port.irq.read().unwrap_err();
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!(port.irq.read().unwrap(), 1);
        assert_eq!(port.read(LINE_STATUS) & 1, 1);
    }

    #[test]
    fn input_during_loopback_waits_for_its_end() {
        let mut port = port();
        let room = port.serial.room().unwrap();
        port.write(MODEM_CONTROL.into(), 0x10);
        room.read().unwrap();
        assert_eq!(port.serial.enqueue(b"abc"), 0);
        port.write(MODEM_CONTROL.into(), 0);
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(port.serial.enqueue(b"abc"), 3);
    }

    #[test]
    fn accesses_wider_than_a_byte_change_nothing() {
        let mut port = port();
        port.serial.write(DATA, b"ab");
        port.serial.write(LINE_CONTROL, &[]);
        assert_eq!(port.printed.try_iter().count(), 0);
        let mut data = [0; 2];
        port.serial.read(SCRATCH, &mut data);
        assert_eq!(data, [0; 2]);
    }

    proptest! {
        #[test]
        fn any_access_of_any_width_is_survived(
            accesses in prop::collection::vec(
                (any::<bool>(), 0u64..10, prop::collection::vec(any::<u8>(), 0..9)), 0..200),
        ) {
            let bus: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(port().serial));
            for (write, offset, mut data) in accesses {
                let mut device = bus.lock().unwrap();
                match write {
                    true => device.write(offset, &data),
                    false => device.read(offset, &mut data),
                }
            }
        }
    }
}
