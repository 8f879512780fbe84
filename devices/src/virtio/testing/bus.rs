//! A guest that follows no rules on a PCI bus: at the ports of the bridge, at configuration space and at the
//! memory behind BARs. For property tests and fuzzers.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::steps::{EVENTS, MAX_WORK};
use super::{Buffer, Guest, LIVE, Plug};
use crate::bus::{Bus, BusDevice};
use crate::pci::{BAR, Bridge, COMMAND, Function};
use crate::virtio::PciTransport;

/// Where the bridge lets BARs be.
const WINDOW: Range<u64> = 0xe000_0000..0xe010_0000;
/// The data of the ports.
const DATA: u64 = 4;
/// The last capability's registers: which BAR, offset and length are reached, and the data.
const REACH: usize = 37;
/// The number of queues, behind a BAR.
const QUEUES: u64 = 0x12;

/// One thing that the guest does. What it writes, it reads again.
#[derive(Clone, Debug)]
pub enum Access {
    /// To the ports of the bridge.
    Port { offset: u64, data: Vec<u8> },
    /// To some bytes of a register of configuration space.
    Config {
        device: u32,
        register: usize,
        first: u64,
        data: Vec<u8>,
    },
    /// Says where a BAR is to be, by quarters of its size around the bridge's window, and the command.
    Place { device: u32, at: u32, command: u32 },
    /// To the memory behind a BAR, by way of configuration space: which BAR, offset and length.
    Reach {
        device: u32,
        target: [u32; 3],
        value: u32,
    },
    /// To the memory behind a BAR, wherever that is.
    Memory {
        function: usize,
        offset: u64,
        data: Vec<u8>,
    },
    /// Makes a request available, of which the device is not notified.
    Request { function: usize },
}

/// A function, and the guest that has a driver for it.
#[derive(Debug)]
struct Driven {
    guest: Guest,
    /// Where the bridge has its memory.
    at: Option<u64>,
}

impl Driven {
    fn transport(&mut self) -> &mut PciTransport {
        match &mut self.guest.transport {
            Plug::Pci(transport, _) => transport,
            Plug::Mmio(_) => panic!("it is on PCI"),
        }
    }
}

impl BusDevice for Driven {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.transport().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport().write(offset, data);
    }
}

impl Function for Driven {
    fn read_config(&mut self, register: usize) -> u32 {
        self.transport().read_config(register)
    }

    fn write_config(&mut self, register: usize, value: u32, mask: u32) {
        self.transport().write_config(register, value, mask);
    }

    fn bar_len(&self) -> u64 {
        match &self.guest.transport {
            Plug::Pci(transport, _) => transport.bar_len(),
            Plug::Mmio(_) => panic!("it is on PCI"),
        }
    }

    fn wanted(&self) -> Option<u64> {
        match &self.guest.transport {
            Plug::Pci(transport, _) => transport.wanted(),
            Plug::Mmio(_) => panic!("it is on PCI"),
        }
    }

    fn moved(&mut self, address: Option<u64>) {
        self.at = address;
        self.transport().moved(address);
    }

    fn placed(&mut self, device: Option<u8>) {
        self.transport().placed(device);
    }
}

struct Board {
    bridge: Bridge,
    memory: Arc<Bus>,
    functions: Vec<Arc<Mutex<Driven>>>,
}

impl Board {
    /// A bus of these functions, whose drivers are ready.
    fn new(guests: impl IntoIterator<Item = Guest>) -> Self {
        let memory = Arc::new(Bus::new());
        let line = EventFd::new(libc::EFD_NONBLOCK).expect("there are descriptors");
        let mut board = Self {
            bridge: Bridge::new(memory.clone(), WINDOW, line),
            memory,
            functions: Vec::new(),
        };
        for (device, mut guest) in (1..).zip(guests) {
            guest.start(u64::MAX, 16);
            let mut driven = Driven { guest, at: None };
            // The driver has placed the memory by itself.
            driven.moved(None);
            driven.write_config(COMMAND, 0, u32::MAX);
            let function = Arc::new(Mutex::new(driven));
            board
                .bridge
                .add(function.clone(), None)
                .expect("there is room");
            board.functions.push(function);
            board.write(device, COMMAND, 2);
        }
        board
    }

    fn select(&mut self, device: u32, register: usize) {
        let register = u32::try_from(register * 4).expect("there are 64");
        let address = 1 << 31 | device << 11 | register;
        self.bridge.write(0, &address.to_le_bytes());
    }

    fn write(&mut self, device: u32, register: usize, value: u32) {
        self.select(device, register);
        self.bridge.write(DATA, &value.to_le_bytes());
    }

    fn port(&mut self, offset: u64, data: &[u8]) {
        self.bridge.write(offset, data);
        self.bridge.read(offset, &mut vec![0; data.len()]);
    }

    fn take(&mut self, access: Access) {
        match access {
            Access::Port { offset, data } => self.port(offset, &data),
            Access::Config {
                device,
                register,
                first,
                data,
            } => {
                self.select(device, register);
                self.port(DATA + first, &data);
            }
            Access::Place {
                device,
                at,
                command,
            } => {
                self.write(device, BAR, 0xdfff_0000_u32.wrapping_add(at * 0x2000));
                self.write(device, COMMAND, command);
            }
            Access::Reach {
                device,
                target,
                value,
            } => {
                for (register, value) in (REACH..).zip(target) {
                    self.write(device, register, value);
                }
                self.select(device, REACH + 3);
                self.port(DATA, &value.to_le_bytes());
            }
            Access::Memory {
                function,
                offset,
                data,
            } => {
                let start = lock(&self.functions[function]).at.unwrap_or(WINDOW.start);
                self.memory.write(start + offset, &data);
                self.memory.read(start + offset, &mut vec![0; data.len()]);
            }
            Access::Request { function } => {
                // A full queue stays as it is.
                let _ = lock(&self.functions[function])
                    .guest
                    .add(0, &[Buffer::In(8)]);
            }
        }
    }

    /// Lets devices work, and asserts that each memory answers where it is said to be, alone and in the window.
    fn is_in_order(&self, taken: &Access) {
        let mut ranges = Vec::new();
        for function in &self.functions {
            let mut driven = lock(function);
            driven.guest.runner.settle(EVENTS);
            let longest = driven.guest.runner.longest();
            assert!(longest < MAX_WORK, "{taken:?} took {longest:?}");
            let id = driven.read_config(0);
            assert_eq!(id & 0xffff, 0x1af4, "{taken:?}");
            let queues = driven.guest.transport.kicks().len();
            let (at, len) = (driven.at, driven.bar_len());
            drop(driven);
            let Some(start) = at else { continue };
            ranges.push(start..start + len);
            let mut found = [0; 2];
            self.memory.read(start + QUEUES, &mut found);
            assert_eq!(usize::from(u16::from_le_bytes(found)), queues, "{taken:?}");
        }
        ranges.sort_by_key(|range| range.start);
        let within = |range: &Range<u64>| WINDOW.start <= range.start && range.end <= WINDOW.end;
        assert!(ranges.iter().all(within), "{taken:?}: {ranges:x?}");
        let apart = |two: &[Range<u64>]| two[0].end <= two[1].start;
        assert!(ranges.windows(2).all(apart), "{taken:?}: {ranges:x?}");
    }
}

fn lock(function: &Mutex<Driven>) -> MutexGuard<'_, Driven> {
    function.lock().expect("no panic while locked")
}

/// Takes all accesses on a bus of two functions, whose first queues take any request, and then finds that
/// each of them serves a good driver and sends it messages.
pub fn survive_on_bus(guests: [Guest; 2], accesses: impl IntoIterator<Item = Access>) {
    let mut board = Board::new(guests);
    for access in accesses {
        let taken = access.clone();
        board.take(access);
        board.is_in_order(&taken);
    }
    for function in &board.functions {
        let guest = &mut lock(function).guest;
        guest.start(u64::MAX, 16);
        assert_eq!(guest.status(), LIVE);
        guest.settle();
        guest.interrupts();
        let request = [Buffer::Out(vec![0xff; 4]), Buffer::In(8)];
        assert!(guest.request(0, &request).is_some(), "it is served");
        assert_eq!(guest.interrupts(), 1, "there is a message");
    }
}

/// What a fuzzer may choose: mostly what means something.
#[cfg(feature = "test-utils")]
mod fuzzing {
    use arbitrary::{Arbitrary, Result, Unstructured};

    use super::Access;

    impl<'a> Arbitrary<'a> for Access {
        fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
            let device = u.int_in_range(0..=3)?;
            let function = usize::from(device > 1);
            Ok(match u.int_in_range(0..=9)? {
                0 => Self::Port {
                    offset: u.int_in_range(0..=8)?,
                    data: bytes(u)?,
                },
                1 | 2 => Self::Config {
                    device,
                    register: u.int_in_range(0..=63)?,
                    first: u.int_in_range(0..=3)?,
                    data: bytes(u)?,
                },
                3 => Self::Place {
                    device,
                    at: u.int_in_range(0..=47)?,
                    command: u.int_in_range(0..=7)?,
                },
                4 | 5 => Self::Reach {
                    device,
                    target: [
                        u.int_in_range(0..=7)? / 7,
                        u.int_in_range(0..=0x8003)?,
                        1 << u.int_in_range(0..=3_u32)?,
                    ],
                    value: u.arbitrary()?,
                },
                6..=8 => Self::Memory {
                    function,
                    offset: u.int_in_range(0..=7_u64)? << 12 | u.int_in_range(0..=0x7f)?,
                    data: bytes(u)?,
                },
                _ => Self::Request { function },
            })
        }
    }

    fn bytes(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; u.int_in_range(1..=8)?];
        u.fill_buffer(&mut bytes)?;
        Ok(bytes)
    }
}
