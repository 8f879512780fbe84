//! The host bridge: configuration mechanism 1 (PCI 3.0 §3.2.2.3.2), bus 0 and where BARs are.
//!
//! podvmm places each BAR when the function is added. A guest may move it within the bridge's window, and
//! the memory follows; of BARs that lie on one another the one of the lowest device answers, and one that is
//! not wholly in the window answers nowhere: so none hides RAM, another device's window or an APIC.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::Function;
use super::config::{BAR, ConfigSpace, Identity};
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
const DEVICES: usize = 32;

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
    /// Devices 1, 2, ...
    slots: Vec<Slot>,
    memory: Arc<Bus>,
    window: Range<u64>,
    /// Where the next BAR may be.
    free: u64,
}

/// What a snapshot keeps of the bridge. Where BARs are is kept with the functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeState {
    address: u32,
}

/// There is no place for one more function.
#[derive(Debug, thiserror::Error)]
#[error("the PCI bus is full: {max} devices are possible", max = DEVICES - 1)]
pub struct Full;

impl Bridge {
    /// A bus without functions. Their memory is put on `memory`, within `window`.
    pub fn new(memory: Arc<Bus>, window: Range<u64>) -> Self {
        Self {
            address: 0,
            own: ConfigSpace::new(IDENTITY),
            slots: Vec::new(),
            memory,
            free: window.start,
            window,
        }
    }

    /// Adds a function as the next device, and writes into its BAR where it may be. It answers there as soon
    /// as the driver has it decode memory.
    pub fn add(&mut self, function: Arc<Mutex<dyn Function>>) -> Result<(), Full> {
        let mut held = lock(&function);
        let len = held.bar_len();
        let start = self.free.next_multiple_of(len);
        let bar = u32::try_from(start).map_err(|_| Full)?;
        if self.slots.len() + 1 >= DEVICES || start + len > self.window.end {
            return Err(Full);
        }
        held.write_config(BAR, bar, u32::MAX);
        drop(held);
        self.free = start + len;
        self.slots.push(Slot { function, at: None });
        Ok(())
    }

    pub fn state(&self) -> BridgeState {
        let address = self.address;
        BridgeState { address }
    }

    /// Goes on where another bridge was, after its functions.
    pub fn restore(&mut self, state: BridgeState) {
        self.address = state.address & ADDRESS_BITS;
        self.place();
    }

    /// The function and register that the address names. None if there is no such function.
    fn selected(&self) -> Option<(Selected<'_>, usize)> {
        let [register, function, bus, _] = self.address.to_le_bytes();
        let (device, function) = (usize::from(function >> 3), function & 7);
        if self.address & ENABLE == 0 || (bus, function) != (0, 0) {
            return None;
        }
        let selected = match device.checked_sub(1) {
            None => Selected::Bridge,
            Some(index) => Selected::Function(&self.slots.get(index)?.function),
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
        for slot in &self.slots {
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
        for (slot, (target, _)) in self.slots.iter_mut().zip(&targets) {
            if slot.at != *target
                && let Some(start) = slot.at.take()
            {
                self.memory.remove(start);
                lock(&slot.function).moved(None);
            }
        }
        for (slot, (target, len)) in self.slots.iter_mut().zip(targets) {
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

/// Which bytes of the window an access is to.
fn window(offset: u64, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset.checked_sub(DATA)?).ok()?;
    let end = start.checked_add(len).filter(|end| *end <= 4)?;
    Some(start..end)
}

fn lock<'a>(function: &'a Mutex<dyn Function>) -> MutexGuard<'a, dyn Function + 'static> {
    function
        .lock()
        .expect("a panic ends the process, so no lock is poisoned")
}

#[cfg(test)]
mod tests;
