//! The keyboard of a guest's serial console: standard input, or a socket.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, Weak};
use std::thread::Builder;
use std::time::Duration;

use devices::legacy::Serial;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::poll::PollContext;

use crate::host::thread::Kind;

/// Ctrl-A begins an order to podvmm itself.
const ESCAPE: u8 = 0x01;
const END: u8 = b'x';

/// Starts a thread that types what is `typed` into `serial`, as long as that is there. `end` is
/// called when the user types Ctrl-A x, if `escapes` are looked for.
pub(crate) fn attach(
    mut typed: impl Read + Send + 'static,
    serial: &Arc<Mutex<Serial>>,
    escapes: bool,
    end: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let room = lock(serial).room()?;
    let serial = Arc::downgrade(serial);
    let builder = Builder::new().name("keyboard".into()).stack_size(64 << 10);
    Kind::Console.spawn(builder, move || {
        let mut filter = Filter {
            escapes,
            escaped: false,
        };
        let mut input = [0; 64];
        loop {
            // A closed terminal types nothing any more; the guest lives on.
            let Ok(count @ 1..) = typed.read(&mut input) else {
                return;
            };
            let (bytes, ends) = filter.apply(&input[..count]);
            if type_all(&serial, &room, &bytes).is_none() {
                return;
            }
            if ends {
                end();
            }
        }
    })?;
    Ok(())
}

/// Types `bytes`, waiting for room whenever the guest is slow to read. None once there is no serial
/// port any more.
fn type_all(serial: &Weak<Mutex<Serial>>, room: &EventFd, mut bytes: &[u8]) -> Option<()> {
    loop {
        let taken = lock(&*serial.upgrade()?).enqueue(bytes);
        bytes = &bytes[taken..];
        if bytes.is_empty() {
            return Some(());
        }
        wait(room).ok()?;
    }
}

/// Waits for room, for a while.
fn wait(room: &EventFd) -> io::Result<()> {
    let poll = PollContext::<u32>::new().map_err(io::Error::from)?;
    poll.add(room, 0).map_err(io::Error::from)?;
    let ready = poll
        .wait_timeout(Duration::from_secs(1))
        .map_err(io::Error::from)?;
    match ready.iter().next() {
        Some(_) => room.read().map(drop),
        None => Ok(()),
    }
}

fn lock(serial: &Mutex<Serial>) -> std::sync::MutexGuard<'_, Serial> {
    serial
        .lock()
        .expect("no thread panics while it holds the serial port")
}

/// Takes orders to podvmm out of what is typed.
struct Filter {
    escapes: bool,
    escaped: bool,
}

impl Filter {
    /// What the guest gets, and whether the user wants to end it.
    fn apply(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        if !self.escapes {
            return (input.to_vec(), false);
        }
        let mut typed = Vec::with_capacity(input.len());
        for &byte in input {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, END) => return (typed, true),
                // Ctrl-A twice types it once.
                (_, byte) => typed.push(byte),
            }
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut filter = Filter {
            escapes: true,
            escaped: false,
        };
        let mut all = (Vec::new(), false);
        for part in parts {
            let (typed, ends) = filter.apply(part);
            all.0.extend(typed);
            all.1 |= ends;
        }
        all
    }

    #[test]
    fn ctrl_a_x_ends_even_in_two_pieces() {
        assert_eq!(filtered(&[b"ls\x01", b"xy"]), (b"ls".to_vec(), true));
    }

    #[test]
    fn ctrl_a_twice_types_it_once() {
        assert_eq!(filtered(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
    }
}
