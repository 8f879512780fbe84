//! Fills the guest's buffers with random bytes from the host.
//!
//! Runs on the shared I/O loop and waits for the driver's kick alone: getrandom(2) does not block
//! once the host has booted.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::{GuestAddressSpace, VolatileSlice};

use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{Counters, GuestRam, Handler, Memory, Ring, RingState, Segments, Thread};

/// Most bytes given for one request, so that none holds up the loop: the device "MAY use less than
/// the entire buffer length" (virtio 1.3 §5.4.6.2).
const MAX_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct RngHandler {
    memory: Memory,
    ring: Ring,
    counters: Arc<Counters>,
}

impl RngHandler {
    pub(super) fn new(memory: Memory, ring: Ring, counters: Arc<Counters>) -> Self {
        Self {
            memory,
            ring,
            counters,
        }
    }

    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        self.ring
            .serve(&ram, |chain| match fill(&ram, &chain.writable) {
                Ok(written) => {
                    self.counters.requests.increment();
                    self.counters.bytes_in.add(written.into());
                    written
                }
                Err(_) => {
                    self.counters.errors.increment();
                    0
                }
            })
    }
}

impl MutEventSubscriber for RngHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.ring.watch(ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.serve();
    }
}

impl Handler for RngHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn drain(&mut self) {
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        vec![self.ring.state()]
    }
}

/// Fills the front of `room` and returns how much of it.
fn fill(ram: &GuestRam, room: &Segments) -> io::Result<u32> {
    let mut filled = 0;
    for slice in room.slices(ram, MAX_BYTES) {
        let slice = slice?;
        let mut done = 0;
        while done < slice.len() {
            done += random(&slice.offset(done).map_err(io::Error::other)?)?;
        }
        filled += done;
    }
    Ok(u32::try_from(filled).expect("bounded by MAX_BYTES"))
}

/// Some random bytes at the start of `slice`. Returns how many.
fn random(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    // SAFETY: the slice is guest RAM that `ram` keeps mapped, and Rust holds no reference into it.
    let written = unsafe { libc::getrandom(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), 0) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
