//! How a guest that has read ACPI tables learns of devices that came or are to go: an interrupt, and two registers
//! that have a bit for each device of the bus. `arch`'s ACPI tables name them `PCIU` and `PCID`.
//!
//! Reading a register clears it. A third one is written when a device was ejected, which needs nothing more: podvmm
//! sees by the device's status that its driver has let go of it. A guest that looks for devices by itself reads
//! none of them.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// What the guest has not read yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EventState {
    /// Devices that came, a bit for each.
    came: u32,
    /// Devices that are to go.
    leaving: u32,
}

/// The registers behind the ports, and the line that says that there is something in them.
#[derive(Debug)]
pub(super) struct Events {
    pub(super) state: EventState,
    line: EventFd,
}

impl Events {
    /// Nothing has happened yet. `line` raises the interrupt.
    pub(super) fn new(line: EventFd) -> Self {
        let state = EventState::default();
        Self { state, line }
    }

    /// Tells that device `device` came.
    pub(super) fn came(&mut self, device: u8) {
        self.state.came |= 1 << device;
        self.raise();
    }

    /// Asks the guest to let go of device `device`.
    pub(super) fn leave(&mut self, device: u8) {
        self.state.leaving |= 1 << device;
        self.raise();
    }

    /// Device `device` is gone, and there is nothing more to say of it.
    pub(super) fn gone(&mut self, device: u8) {
        self.state.came &= !(1 << device);
        self.state.leaving &= !(1 << device);
    }

    /// Goes on where another one was. What the guest has not read it is told of again.
    pub(super) fn restore(&mut self, state: EventState) {
        self.state = state;
        if state != EventState::default() {
            self.raise();
        }
    }

    fn raise(&self) {
        // Fails only when 2^64 - 2 edges are already due.
        let _ = self.line.write(1);
    }

    /// Reads the register at `offset`, all of which are four bytes. Anything else is zero.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let register = match offset {
            0 => &mut self.state.came,
            4 => &mut self.state.leaving,
            _ => return,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = std::mem::take(register).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::{Bus, BusDevice};
    use crate::pci::{Bridge, EventPorts};

    fn ports() -> (EventPorts, EventFd) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let bridge = Bridge::new(
            Arc::new(Bus::new()),
            0xe000_0000..0xf000_0000,
            line.try_clone().unwrap(),
        );
        (EventPorts(Arc::new(Mutex::new(bridge))), line)
    }

    fn read(ports: &mut EventPorts, offset: u64) -> u32 {
        let mut data = [0; 4];
        ports.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_happened_is_told_once() {
        let (mut ports, line) = ports();
        let bridge = ports.0.clone();
        bridge.lock().unwrap().announce(3);
        bridge.lock().unwrap().announce(31);
        bridge.lock().unwrap().ask_to_leave(5);
        assert_eq!(line.read().unwrap(), 3);
        assert_eq!(read(&mut ports, 0), 1 << 31 | 1 << 3);
        assert_eq!(read(&mut ports, 4), 1 << 5);
        assert_eq!([read(&mut ports, 0), read(&mut ports, 4)], [0, 0]);
        line.read().unwrap_err();
    }

    #[test]
    fn other_accesses_mean_nothing() {
        let (mut ports, _line) = ports();
        ports.0.lock().unwrap().announce(1);
        for (offset, len) in [(0, 1), (0, 2), (1, 4), (8, 4), (0, 8), (11, 1)] {
            let mut data = vec![0; len];
            ports.read(offset, &mut data);
            assert!(
                data.iter().all(|byte| *byte == 0),
                "{len} bytes at {offset}"
            );
            ports.write(offset, &data);
        }
        assert_eq!(read(&mut ports, 0), 2);
    }

    #[test]
    fn what_was_not_read_is_told_again_after_a_restore() {
        let (mut first, _line) = ports();
        first.0.lock().unwrap().announce(2);
        let state = first.0.lock().unwrap().state();
        let (mut second, line) = ports();
        second.0.lock().unwrap().restore(state);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&mut second, 0), 4);
        assert_eq!(read(&mut first, 0), 4);
        let state = second.0.lock().unwrap().state();
        second.0.lock().unwrap().restore(state);
        line.read().unwrap_err();
    }
}
