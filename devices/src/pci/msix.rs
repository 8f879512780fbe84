//! MSI-X (PCI 3.0 §6.8.2): a message for each vector, which the driver writes into a table.
//!
//! Each vector has an event fd, which the device writes to from any thread. While the vector is open, which it
//! is unless it is masked, the [`Host`] has taken the event fd and sends the message: no lock and no exit.
//! While it is closed what was written stays in the event fd, and that is the vector's pending bit.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{ConfigSpace, Host, Message};

/// Bytes of the table that a vector has.
const ENTRY_LEN: u64 = 16;
/// The most vectors a table may have (PCI 3.0 §6.8.2).
const MAX_VECTORS: usize = 2048;

const CAPABILITY: u8 = 0x11;
/// Bits of the message control.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: Message,
    masked: bool,
    open: bool,
}

/// The vectors of a function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    events: Arc<[EventFd]>,
    control: u16,
    /// The register of the capability.
    register: usize,
    host: Arc<dyn Host>,
}

/// A vector in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryState {
    message: Message,
    masked: bool,
    pending: bool,
}

impl Msix {
    /// Adds the capability to `config`: a vector for each of `events`, 1 to 2048 of them, and their table and
    /// pending bits at these offsets of the first BAR.
    pub fn new(
        config: &mut ConfigSpace,
        events: Arc<[EventFd]>,
        (table, pending): (u32, u32),
        host: Arc<dyn Host>,
    ) -> Self {
        let vectors = events.len().clamp(1, MAX_VECTORS);
        let last = u16::try_from(vectors - 1).expect("it is less than 2048");
        let body = [
            &last.to_le_bytes()[..],
            &table.to_le_bytes(),
            &pending.to_le_bytes(),
        ];
        let control = (FUNCTION_MASK | ENABLE).to_le_bytes();
        // At reset each vector is masked.
        let entry = Entry {
            message: Message::default(),
            masked: true,
            open: false,
        };
        Self {
            entries: vec![entry; vectors],
            register: config.add_capability(CAPABILITY, &body.concat(), &control),
            events,
            control: 0,
            host,
        }
    }

    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Follows a write to `register` of `config`.
    pub fn configured(&mut self, config: &ConfigSpace, register: usize) {
        if register != self.register {
            return;
        }
        let [.., low, high] = config.read(register).to_le_bytes();
        let control = u16::from_le_bytes([low, high]);
        if control & ENABLE != 0 && !self.is_enabled() {
            // What came while there were no messages is not to be sent now.
            for event in self.events.iter() {
                let _ = event.read();
            }
        }
        self.control = control;
        (0..self.entries.len()).for_each(|vector| self.settle(vector));
    }

    /// Reads 4 or 8 bytes of the table, as drivers do. Of anything else, and beyond the table, `data` stays
    /// as it is, and that is false.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) -> bool {
        read_words(offset, data, |word| {
            let entry = self.entries.get(entry_of(word))?;
            let address = entry.message.address.to_le_bytes();
            let half = |at: usize| {
                u32::from_le_bytes(address[at..at + 4].try_into().expect("it is four bytes"))
            };
            Some(match word % 4 {
                0 => half(0),
                1 => half(4),
                2 => entry.message.data,
                _ => entry.masked.into(),
            })
        })
    }

    /// Writes 4 or 8 bytes of the table. False if that is none.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> bool {
        if !is_words(offset, data.len()) {
            return false;
        }
        for (word, bytes) in (offset / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(bytes.try_into().expect("it is four bytes"));
            let index = entry_of(word);
            let Some(entry) = self.entries.get_mut(index) else {
                return false;
            };
            let Message { address, data } = &mut entry.message;
            match word % 4 {
                // "System software must write these to zero" (§6.8.2.7).
                0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
                1 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
                2 => *data = value,
                _ => entry.masked = value & 1 != 0,
            }
            // Another message is none until it is told to the host.
            if word % 4 != 3 {
                self.close(index);
            }
            self.settle(index);
        }
        true
    }

    /// Reads 4 or 8 bytes of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) -> bool {
        read_words(offset, data, |word| {
            let first = usize::try_from(word).ok()?.checked_mul(32)?;
            (first < self.entries.len().next_multiple_of(64)).then(|| {
                let pending = (0..32).filter(|bit| self.is_pending(first + bit));
                pending.fold(0, |bits, bit| bits | 1 << bit)
            })
        })
    }

    /// Whether something was written to the vector's event fd that no message was sent for.
    fn is_pending(&self, vector: usize) -> bool {
        let (Some(entry), Some(event)) = (self.entries.get(vector), self.events.get(vector)) else {
            return false;
        };
        // The event fd of an open vector is the host's to read.
        !entry.open && event.read().is_ok_and(|count| event.write(count).is_ok())
    }

    /// Opens the vector or closes it, as the driver has said.
    fn settle(&mut self, vector: usize) {
        let entry = self.entries[vector];
        let wanted = self.is_enabled() && self.control & FUNCTION_MASK == 0 && !entry.masked;
        if !wanted {
            self.close(vector);
        } else if !entry.open {
            let number = u16::try_from(vector).expect("there are 2048 at most");
            match self
                .host
                .deliver(number, &self.events[vector], entry.message)
            {
                Ok(()) => self.entries[vector].open = true,
                // A driver can bring it about as often as it likes.
                Err(error) => log::debug!("send messages of vector {vector}: {error}"),
            }
        }
    }

    fn close(&mut self, vector: usize) {
        if !std::mem::take(&mut self.entries[vector].open) {
            return;
        }
        let number = u16::try_from(vector).expect("there are 2048 at most");
        if let Err(error) = self.host.keep(number, &self.events[vector]) {
            log::debug!("keep messages of vector {vector}: {error}");
        }
    }

    /// Sends no message any more, until the driver writes the table again.
    pub fn close_all(&mut self) {
        (0..self.entries.len()).for_each(|vector| self.close(vector));
    }

    /// The table and the pending bits, for a snapshot.
    pub fn state(&self) -> Vec<EntryState> {
        let entry = |(vector, entry): (usize, &Entry)| EntryState {
            message: entry.message,
            masked: entry.masked,
            pending: self.is_pending(vector),
        };
        self.entries.iter().enumerate().map(entry).collect()
    }

    /// Takes over another one's vectors, with `config` restored before. False if there are not as many.
    pub fn restore(&mut self, config: &ConfigSpace, state: &[EntryState]) -> bool {
        if state.len() != self.entries.len() {
            return false;
        }
        for (entry, state) in self.entries.iter_mut().zip(state) {
            entry.message = state.message;
            // A driver's write of the address leaves out the same bits.
            entry.message.address &= !3;
            entry.masked = state.masked;
        }
        self.configured(config, self.register);
        for (event, state) in self.events.iter().zip(state) {
            if state.pending {
                // Fails only when 2^64 - 2 are pending.
                let _ = event.write(1);
            }
        }
        true
    }
}

fn entry_of(word: u64) -> usize {
    usize::try_from(word * 4 / ENTRY_LEN).unwrap_or(usize::MAX)
}

/// Whether an access is one of those that drivers are to make (§6.8.2: "software must use aligned DWORD or
/// aligned QWORD transactions").
fn is_words(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn read_words(offset: u64, data: &mut [u8], word: impl Fn(u64) -> Option<u32>) -> bool {
    if !is_words(offset, data.len()) {
        return false;
    }
    for (number, bytes) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
        let Some(value) = word(number) else {
            return false;
        };
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    true
}

#[cfg(test)]
mod tests;
