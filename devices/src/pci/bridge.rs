//! The host bridge: configuration mechanism 1 (PCI 3.0 §3.2.2.3.2), bus 0 and where BARs are.
//!
//! podvmm places each BAR when the function is added, in a part of the bridge's window that belongs to the device's
//! number. A guest may move it within the window, and the memory follows; of BARs that lie on one another the
//! one of the lowest device answers, and one that is not wholly in the window answers nowhere: so none hides
//! RAM, another device's window or an APIC.
//!
//! Functions come and go while the guest runs. It finds them when it looks again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::Function;
use super::config::{BAR, ConfigSpace, Identity};
use super::events::{EventState, Events};
use crate::bus::{Bus, BusDevice};

/// The ports of configuration mechanism 1: an address, then a window of four bytes.
pub const CONFIG_PORTS: u64 = 0xcf8;
pub const CONFIG_PORTS_LEN: u64 = 8;

/// Where in the ports the window is.
const DATA: u64 = 4;
/// Bits of the address that are not reserved, or always zero.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;
const ENABLE: u32 = 1 << 31;
/// Devices on a bus, the bridge among them.
const DEVICES: u8 = 32;

/// A host bridge that has no faults for kernels to work around, as those of real boards have: QEMU's.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

#[derive(Debug)]
struct Slot {
    function: Arc<Mutex<dyn Function>>,
    /// Where its memory answers.
    at: Option<u64>,
}

/// Device 0 of bus 0, and the way to all others.
#[derive(Debug)]
pub struct Bridge {
    address: u32,
    own: ConfigSpace,
    /// Devices by their numbers, 1 to 31.
    slots: BTreeMap<u8, Slot>,
    memory: Arc<Bus>,
    window: Range<u64>,
    events: Events,
}

/// What a snapshot keeps of the bridge. Where BARs are is kept with the functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeState {
    address: u32,
    events: EventState,
}

/// Why a function could not be added.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("the PCI bus is full: {max} devices are possible", max = DEVICES - 1)]
    Full,
    /// Only a file can ask for that.
    #[error("there is no place for device {0} on the PCI bus")]
    Place(u8),
    #[error("a BAR of {0} bytes has no place on the PCI bus")]
    Large(u64),
}

impl Bridge {
    /// A bus without functions. Their memory is put on `memory`, within `window`. `line` interrupts the guest when
    /// functions came or are to go.
    pub fn new(memory: Arc<Bus>, window: Range<u64>, line: EventFd) -> Self {
        Self {
            address: 0,
            own: ConfigSpace::new(IDENTITY),
            slots: BTreeMap::new(),
            memory,
            window,
            events: Events::new(line),
        }
    }

    /// Adds a function as the device of number `place`, or of the lowest that is free, and writes into its BAR
    /// where it may be. It answers there as soon as the driver has it decode memory. Returns its number.
    pub fn add(
        &mut self,
        function: Arc<Mutex<dyn Function>>,
        place: Option<u8>,
    ) -> Result<u8, AddError> {
        let is_free = |device: &u8| !self.slots.contains_key(device);
        let device = match place {
            None => (1..DEVICES).find(is_free).ok_or(AddError::Full)?,
            Some(device) if (1..DEVICES).contains(&device) && is_free(&device) => device,
            Some(device) => return Err(AddError::Place(device)),
        };
        let mut held = lock(&function);
        let len = held.bar_len();
        let bar = u32::try_from(self.window.start + u64::from(device) * self.share());
        let bar = bar.ok().filter(|_| len <= self.share());
        held.write_config(BAR, bar.ok_or(AddError::Large(len))?, u32::MAX);
        held.placed(Some(device));
        drop(held);
        self.slots.insert(device, Slot { function, at: None });
        Ok(device)
    }

    /// Takes a device from the bus: when this returns, the guest reaches it no more.
    pub fn remove(&mut self, device: u8) {
        let Some(slot) = self.slots.remove(&device) else {
            return;
        };
        if let Some(start) = slot.at {
            self.memory.remove(start);
            lock(&slot.function).moved(None);
        }
        lock(&slot.function).placed(None);
        self.events.gone(device);
        // What another one's BAR may have lain on.
        self.place();
    }

    /// Tells the guest that a device came. Those that it finds at its start need not be told of.
    pub fn announce(&mut self, device: u8) {
        self.events.came(device);
    }

    /// Asks the guest to let go of a device.
    pub fn ask_to_leave(&mut self, device: u8) {
        self.events.leave(device);
    }

    /// How much of the window each device has for its BAR at first: a power of two.
    fn share(&self) -> u64 {
        1 << ((self.window.end - self.window.start) / u64::from(DEVICES)).ilog2()
    }

    pub fn state(&self) -> BridgeState {
        BridgeState {
            address: self.address,
            events: self.events.state,
        }
    }

    /// Goes on where another bridge was, after its functions.
    pub fn restore(&mut self, state: BridgeState) {
        self.address = state.address & ADDRESS_BITS;
        self.events.restore(state.events);
        self.place();
    }

    /// The function and register that the address names. None if there is no such function.
    fn selected(&self) -> Option<(Selected<'_>, usize)> {
        let [register, function, bus, _] = self.address.to_le_bytes();
        let (device, function) = (function >> 3, function & 7);
        if self.address & ENABLE == 0 || (bus, function) != (0, 0) {
            return None;
        }
        let selected = match device {
            0 => Selected::Bridge,
            device => Selected::Function(&self.slots.get(&device)?.function),
        };
        Some((selected, usize::from(register / 4)))
    }

    fn read_data(&self, place: Range<usize>, data: &mut [u8]) {
        let value = match self.selected() {
            None => u32::MAX,
            Some((Selected::Bridge, register)) => self.own.read(register),
            Some((Selected::Function(function), register)) => lock(function).read_config(register),
        };
        data.copy_from_slice(&value.to_le_bytes()[place]);
    }

    fn write_data(&mut self, place: Range<usize>, data: &[u8]) {
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        value[place.clone()].copy_from_slice(data);
        mask[place].fill(0xff);
        let (value, mask) = (u32::from_le_bytes(value), u32::from_le_bytes(mask));
        match self.selected() {
            None => {}
            Some((Selected::Bridge, register)) => self.own.write(register, value, mask),
            Some((Selected::Function(function), register)) => {
                let mut function = lock(function);
                let before = function.wanted();
                function.write_config(register, value, mask);
                let moves = function.wanted() != before;
                drop(function);
                if moves {
                    self.place();
                }
            }
        }
    }

    /// Has the memory of all functions where their drivers want it, as far as that can be.
    fn place(&mut self) {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut targets = Vec::with_capacity(self.slots.len());
        for slot in self.slots.values() {
            let function = lock(&slot.function);
            let len = function.bar_len();
            let wanted = function.wanted().map(|start| start..start + len);
            let free = wanted.filter(|wanted| {
                self.window.start <= wanted.start
                    && wanted.end <= self.window.end
                    && taken
                        .iter()
                        .all(|other| other.end <= wanted.start || wanted.end <= other.start)
            });
            targets.push((free.as_ref().map(|range| range.start), len));
            taken.extend(free);
        }
        // Those that go make room first.
        for (slot, (target, _)) in self.slots.values_mut().zip(&targets) {
            if slot.at != *target
                && let Some(start) = slot.at.take()
            {
                self.memory.remove(start);
                lock(&slot.function).moved(None);
            }
        }
        for (slot, (target, len)) in self.slots.values_mut().zip(targets) {
            let Some(start) = target.filter(|_| slot.at.is_none()) else {
                continue;
            };
            match self.memory.insert(start, len, slot.function.clone()) {
                Ok(()) => {
                    slot.at = Some(start);
                    lock(&slot.function).moved(Some(start));
                }
                Err(error) => log::debug!("move a BAR: {error}"),
            }
        }
    }
}

enum Selected<'a> {
    Bridge,
    Function(&'a Mutex<dyn Function>),
}

/// "Anything other than a DWORD access" to the address port "will not be treated as a configuration access"
/// (§3.2.2.3.2). The window takes accesses that lie wholly in it.
impl BusDevice for Bridge {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, window(offset, data.len())) {
            (0, _) if data.len() == 4 => data.copy_from_slice(&self.address.to_le_bytes()),
            (_, Some(place)) => self.read_data(place, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (
            offset,
            window(offset, data.len()),
            <[u8; 4]>::try_from(data),
        ) {
            (0, _, Ok(data)) => self.address = u32::from_le_bytes(data) & ADDRESS_BITS,
            (_, Some(place), _) => self.write_data(place, data),
            _ => {}
        }
    }
}

/// The ports of a bridge's events.
#[derive(Debug)]
pub struct EventPorts(pub Arc<Mutex<Bridge>>);

impl BusDevice for EventPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut bridge = self.0.lock().expect(UNPOISONED);
        bridge.events.read(offset, data);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// Which bytes of the window an access is to.
fn window(offset: u64, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset.checked_sub(DATA)?).ok()?;
    let end = start.checked_add(len).filter(|end| *end <= 4)?;
    Some(start..end)
}

fn lock<'a>(function: &'a Mutex<dyn Function>) -> MutexGuard<'a, dyn Function + 'static> {
    function.lock().expect(UNPOISONED)
}

const UNPOISONED: &str = "a panic ends the process, so no lock is poisoned";

#[cfg(test)]
mod tests;
