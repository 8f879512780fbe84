//! One VM: what it hands over, and its faults until its end.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;

use super::compressed::{CHUNK, CHUNK_BYTES};
use super::removed::Removed;
use super::source::Source;
use crate::memory::handover::{self, Mapping};
use crate::memory::userfault::{Event, Userfault};
use crate::memory::{PAGE, PAGE_BYTES};

/// How long a VM may take to hand over its RAM.
const HANDOVER: Duration = Duration::from_secs(5);

/// How long a VM takes to give memory back once it has said so, about.
const MOMENT: Duration = Duration::from_micros(100);

/// Why a VM is given no more pages.
#[derive(Debug, Error)]
pub(super) enum ServeError {
    #[error("it hands over no RAM")]
    HandOver(#[source] io::Error),
    #[error("wait for it")]
    Wait(#[source] io::Error),
    #[error("it has given back more runs of RAM than can be remembered")]
    ManyRuns,
    #[error("it has not said which RAM is at {0:#x}")]
    Nowhere(u64),
    #[error("read the RAM at offset {0:#x}")]
    Read(u64, #[source] io::Error),
    #[error("put the RAM at offset {0:#x}")]
    Put(u64, #[source] io::Error),
}

/// What a VM was given.
#[derive(Debug, Default)]
pub(super) struct Served {
    faults: u64,
    copied: u64,
    zeros: u64,
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            faults,
            copied,
            zeros,
        } = self;
        write!(f, "{faults} faults, {copied} bytes and {zeros} of zeros")
    }
}

/// Gives a VM pages until it is gone.
pub(super) fn serve(stream: &UnixStream, source: &Source) -> Result<Served, ServeError> {
    let received = stream
        .set_read_timeout(Some(HANDOVER))
        .and_then(|()| handover::receive(stream, source.len()));
    let (userfault, mappings) = received.map_err(ServeError::HandOver)?;
    let mut vm = Vm {
        userfault,
        mappings,
        source,
        given: HashSet::new(),
        waiting: VecDeque::new(),
        removed: Removed::default(),
        buffer: vec![0; CHUNK],
        served: Served::default(),
    };
    while vm.waits(stream).map_err(ServeError::Wait)? {
        vm.listen()?;
        while let Some(address) = vm.waiting.pop_front() {
            match vm.give(address) {
                // Its process is gone; the connection says so, too.
                Err(ServeError::Put(_, error)) if is_gone(&error) => return Ok(vm.served),
                // It gives memory back just now, and goes on once that is known here.
                Err(ServeError::Put(_, error)) if is_busy(&error) => {
                    vm.waiting.push_back(address);
                    vm.listen()?;
                    thread::sleep(MOMENT);
                }
                other => other?,
            }
        }
    }
    Ok(vm.served)
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAGAIN)
}

struct Vm<'a> {
    userfault: Userfault,
    mappings: Vec<Mapping>,
    source: &'a Source,
    /// The chunks that it was given, by their number.
    given: HashSet<u64>,
    /// Addresses of pages that its threads wait for.
    waiting: VecDeque<u64>,
    removed: Removed,
    buffer: Vec<u8>,
    served: Served,
}

impl Vm<'_> {
    /// Waits for a fault. False if there will be none.
    fn waits(&self, stream: &UnixStream) -> io::Result<bool> {
        let mut both = [
            PollFd::new(&self.userfault, PollFlags::IN),
            PollFd::new(stream, PollFlags::RDHUP),
        ];
        loop {
            match poll(&mut both, None) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(both[1].revents().is_empty()),
            }
        }
    }

    /// Takes in what it tells. A thread of it that gives memory back waits for that.
    fn listen(&mut self) -> Result<(), ServeError> {
        for event in self.userfault.events().map_err(ServeError::Wait)? {
            match event {
                Event::Fault(address) => self.waiting.push_back(address),
                Event::Removed(run) => {
                    if !self.removed.add(run) {
                        return Err(ServeError::ManyRuns);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives it the page at an address, and those around it that it has never been given: what it had
    /// and has not any more it gave back.
    fn give(&mut self, address: u64) -> Result<(), ServeError> {
        self.served.faults += 1;
        let found = self.mappings.iter().find_map(|mapping| {
            let offset = mapping.offset_of(address)?;
            Some((*mapping, offset))
        });
        let (mapping, offset) = found.ok_or(ServeError::Nowhere(address))?;
        let run = match self.given.insert(offset / CHUNK_BYTES) {
            true => {
                let first = offset - offset % CHUNK_BYTES;
                let all = mapping.offsets();
                first.max(all.start)..(first + CHUNK_BYTES).min(all.end)
            }
            false => offset..offset + PAGE_BYTES,
        };
        self.give_run(mapping, run)?;
        // It waits for ever if the page is there already, or is no RAM of ours any more.
        let wake = self.userfault.wake(address..address + PAGE_BYTES);
        wake.map_err(|error| ServeError::Put(offset, error))
    }

    fn give_run(&mut self, mapping: Mapping, run: Range<u64>) -> Result<(), ServeError> {
        let len = usize::try_from(run.end - run.start).expect("it is a chunk at most");
        let bytes = &mut self.buffer[..len];
        let read = self.source.read(run.start, bytes);
        read.map_err(|error| ServeError::Read(run.start, error))?;
        let (pages, _) = bytes.as_chunks_mut::<{ PAGE.len() }>();
        for (page, offset) in pages.iter_mut().zip((run.start..).step_by(PAGE.len())) {
            if self.removed.has(mapping.address(offset)) {
                *page = PAGE;
            }
        }
        let mut offset = run.start;
        for alike in pages.chunk_by(|page, next| (*page == PAGE) == (*next == PAGE)) {
            let bytes = alike.as_flattened();
            let address = mapping.address(offset);
            let counter = match alike[0] == PAGE {
                true => &mut self.served.zeros,
                false => &mut self.served.copied,
            };
            let put = put(&self.userfault, address, bytes, alike[0] == PAGE);
            *counter += put.map_err(|error| ServeError::Put(offset, error))?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Puts pages at `address`, all of them zeros or none, where there are none. Returns how many bytes
/// that were.
fn put(userfault: &Userfault, address: u64, bytes: &[u8], zeros: bool) -> io::Result<u64> {
    let mut rest = bytes;
    let mut count = 0;
    while !rest.is_empty() {
        let at = address + (bytes.len() - rest.len()) as u64;
        let put = match zeros {
            true => userfault.zero(at..at + rest.len() as u64),
            false => userfault.copy(at, rest),
        };
        let done = match put {
            Ok(done) => {
                count += done;
                done
            }
            Err(error) => match error.raw_os_error() {
                // There is one already, or its RAM was taken away.
                Some(libc::EEXIST | libc::ENOENT) => PAGE_BYTES,
                _ => return Err(error),
            },
        };
        rest = &rest[usize::try_from(done).expect("it is a chunk at most")..];
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::slice;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::JoinHandle;

    use api::MemoryConfig;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::memory::Ram;

    const MIB: u64 = 1 << 20;

    /// RAM whose first 16 MiB come from elsewhere: the pages of each MiB hold its number.
    struct Remote {
        ram: Ram,
        source: Source,
        userfault: Userfault,
        mappings: Vec<Mapping>,
    }

    impl Remote {
        /// None if this test can make no userfaultfd on this host.
        fn new() -> Option<Self> {
            Self::with(Userfault::new())
        }

        fn with(userfault: io::Result<Userfault>) -> Option<Self> {
            let userfault = match userfault {
                Ok(userfault) => userfault,
                Err(error) => {
                    eprintln!("SKIPPED: no userfaultfd: {error}");
                    return None;
                }
            };
            let config = MemoryConfig {
                size: "32M".parse().unwrap(),
                thp: false,
                ..Default::default()
            };
            let mut ram = Ram::new(&config).unwrap();
            let file = tempfile::tempfile().unwrap();
            for number in 0..16_u8 {
                let at = u64::from(number) * MIB;
                file.write_all_at(&[number; 1 << 20], at).unwrap();
            }
            file.set_len(32 * MIB).unwrap();
            let all = 0..32 * MIB;
            let covered: Vec<_> = std::iter::once(0..16 * MIB).collect();
            let mappings = ram.expect(&covered, slice::from_ref(&all), &userfault);
            Some(Self {
                ram,
                source: Source::of(all.end, covered, file),
                userfault,
                mappings: mappings.unwrap(),
            })
        }

        /// Starts giving its pages, until the stream is closed.
        fn serve(self) -> (Ram, UnixStream, JoinHandle<Result<Served, ServeError>>) {
            let (here, there) = UnixStream::pair().unwrap();
            handover::send(&here, &self.userfault, &self.mappings).unwrap();
            let serves = thread::spawn(move || serve(&there, &self.source));
            (self.ram, here, serves)
        }
    }

    fn byte(ram: &Ram, at: u64) -> u8 {
        ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// As a guest that gives memory back has it done.
    fn discard(ram: &Ram, at: u64, len: usize) {
        let slice = ram.memory().get_slice(GuestAddress(at), len).unwrap();
        let host = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the range is of the RAM's mapping, and Rust holds no references into it.
        let done = unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) };
        assert_eq!(done, 0);
    }

    #[test]
    fn a_fault_brings_the_pages_around_it_once() {
        let Some(remote) = Remote::new() else { return };
        let (ram, stream, serves) = remote.serve();
        let read = [0, MIB, 15 * MIB + 0xf000, 16 * MIB].map(|at| byte(&ram, at));
        assert_eq!(read, [0, 1, 15, 0]);
        ram.memory().write_obj(9_u8, GuestAddress(MIB)).unwrap();
        // What was given back is what it was, and nothing else comes back with it.
        discard(&ram, 2 * MIB, 0x10000);
        assert_eq!(byte(&ram, 2 * MIB), 2);
        discard(&ram, 2 * MIB, 0x10000);
        assert_eq!(byte(&ram, 2 * MIB + 0x3000), 2);
        assert_eq!((byte(&ram, MIB), byte(&ram, MIB + 0x1000)), (9, 1));
        drop(stream);
        let served = serves.join().unwrap().unwrap();
        assert_eq!((served.faults, served.zeros), (5, 0x10000));
        assert_eq!(served.copied, 3 * 0x10000 + 0x1000);
    }

    /// Of Firecracker's VMs, which say so.
    #[test]
    fn what_a_vm_says_it_gave_back_is_zeros() {
        let Some(remote) = Remote::with(Userfault::with_removals()) else {
            return;
        };
        let (ram, stream, serves) = remote.serve();
        assert_eq!(byte(&ram, MIB), 1);
        // Some of it was there and some was not; each of these waits until the server knows.
        discard(&ram, MIB + 0x8000, 0x10000);
        discard(&ram, 2 * MIB, 0x2000);
        let read = [0x8000, 0xf000, 0x1_0000, 0x1_7000].map(|at| byte(&ram, MIB + at));
        assert_eq!(read, [0; 4]);
        let read = [0, 0x7000, 0x1_8000].map(|at| byte(&ram, MIB + at));
        assert_eq!(read, [1; 3]);
        let read = [0x1000, 0x2000].map(|at| byte(&ram, 2 * MIB + at));
        assert_eq!(read, [0, 2]);
        drop(stream);
        serves.join().unwrap().unwrap();
    }

    #[test]
    fn memory_is_given_back_while_pages_are_given() {
        let Some(remote) = Remote::with(Userfault::with_removals()) else {
            return;
        };
        let (ram, stream, serves) = remote.serve();
        thread::scope(|scope| {
            scope.spawn(|| {
                for page in (0..4 * MIB).step_by(0x2000) {
                    discard(&ram, 8 * MIB + page, 0x1000);
                }
            });
            for page in (0..4 * MIB).step_by(0x1000) {
                let number = u8::try_from(page / MIB).unwrap();
                assert_eq!(byte(&ram, 4 * MIB + page), 4 + number);
            }
        });
        let read = [0, 0x1000].map(|at| byte(&ram, 8 * MIB + at));
        assert_eq!(read, [0, 8]);
        drop(stream);
        serves.join().unwrap().unwrap();
    }

    /// Starts a thread that reads a byte of RAM, and waits until it waits.
    fn waiter(ram: &Ram, at: u64) -> Receiver<u8> {
        let memory = ram.memory().clone();
        let (found, finds) = channel();
        thread::spawn(move || found.send(memory.read_obj(GuestAddress(at)).unwrap()));
        assert!(finds.recv_timeout(Duration::from_millis(100)).is_err());
        finds
    }

    fn finds(waiter: &Receiver<u8>) -> u8 {
        waiter.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn two_may_wait_for_pages_side_by_side() {
        let Some(remote) = Remote::new() else { return };
        let waiters = [0, 0x2000, 0x2000].map(|at| waiter(&remote.ram, 3 * MIB + at));
        let (_ram, stream, serves) = remote.serve();
        assert_eq!(waiters.each_ref().map(finds), [3; 3]);
        drop(stream);
        assert_eq!(serves.join().unwrap().unwrap().copied, 0x10000);
    }

    #[test]
    fn a_touch_of_memory_that_was_taken_away_waits_for_no_page() {
        let Some(mut remote) = Remote::new() else {
            return;
        };
        // A thread waits for a page. Meanwhile its memory is taken away, as by a memory device.
        let waiter = waiter(&remote.ram, 4 * MIB + 0x8000);
        let away = 4 * MIB + 0x8000..5 * MIB;
        remote.ram.lay(&[], slice::from_ref(&away), true).unwrap();
        let (ram, stream, serves) = remote.serve();
        assert_eq!(finds(&waiter), 0);
        let read = [4 * MIB, 4 * MIB + 0x9000, 5 * MIB].map(|at| byte(&ram, at));
        assert_eq!(read, [4, 0, 5]);
        drop(stream);
        serves.join().unwrap().unwrap();
    }

    #[test]
    fn a_vm_that_hands_over_no_ram_is_not_served() {
        let Some(remote) = Remote::new() else { return };
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        let left = serve(&there, &remote.source).unwrap_err();
        assert_eq!(left.to_string(), "it hands over no RAM");
    }
}
