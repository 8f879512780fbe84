//! The keyboard controller, of which only the reset line exists.
//!
//! Linux reboots an x86 machine by writing 0xfe to port 0x64, once the input buffer is empty.
//!
//! There is no keyboard, and a guest should find that out quickly. The status says that input is
//! empty, so that a reboot never waits, and that output is full for ever: a driver that probes
//! first drains the output, and after 16 bytes Linux's knows that this is no controller. With an
//! empty output it would go on to the self-test and wait half a second for the result, which is
//! ten thousand exits.

use std::fmt::{self, Debug};

use crate::bus::BusDevice;

/// First port of the range: data at +0, status and command at +4.
pub const I8042_BASE: u64 = 0x60;
/// Ports 0x60 to 0x64. The system control port (0x61) and the two ports after it lie inside.
pub const I8042_LEN: u64 = 5;

const COMMAND: u64 = 4;
/// Status: a byte waits to be read, and none waits to be taken.
const OUTPUT_FULL: u8 = 0x01;
/// Pulse output line 0, which is wired to the CPU's reset.
const PULSE_RESET: u8 = 0xfe;

/// Calls `reset` when the guest pulls the reset line.
pub struct I8042 {
    reset: Box<dyn Fn() + Send>,
}

impl I8042 {
    /// `reset` runs on the vCPU thread that wrote the command, and may run more than once.
    pub fn new(reset: Box<dyn Fn() + Send>) -> Self {
        Self { reset }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == COMMAND
            && let Some(status) = data.first_mut()
        {
            *status = OUTPUT_FULL;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            (self.reset)();
        }
    }
}

impl Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::counter::Counter;

    fn controller() -> (I8042, Arc<Counter>) {
        let resets = Arc::new(Counter::default());
        let counted = resets.clone();
        (I8042::new(Box::new(move || counted.increment())), resets)
    }

    #[test]
    fn the_reset_command_pulls_the_reset_line() {
        let (mut i8042, resets) = controller();
        i8042.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(resets.get(), 1);
    }

    #[test]
    fn nothing_else_resets() {
        let (mut i8042, resets) = controller();
        i8042.write(0, &[PULSE_RESET]);
        i8042.write(COMMAND, &[0xff]);
        i8042.write(COMMAND, &[]);
        i8042.write(COMMAND, &[PULSE_RESET, PULSE_RESET]);
        i8042.write(u64::MAX, &[PULSE_RESET]);
        assert_eq!(resets.get(), 0);
    }

    #[test]
    fn status_never_makes_a_reboot_wait_and_ends_a_probe() {
        let (mut i8042, _) = controller();
        let mut data = [0xff; 4];
        i8042.read(COMMAND, &mut data);
        assert_eq!(data, [OUTPUT_FULL, 0, 0, 0]);
        i8042.read(0, &mut data[..1]);
        assert_eq!(data[0], 0);
        i8042.read(COMMAND, &mut []);
    }
}
