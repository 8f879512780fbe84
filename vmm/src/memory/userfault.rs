//! userfaultfd: a thread that touches a page which is not there waits until a thread with the
//! descriptor, of this process or another, has put it there (Linux, admin-guide/mm/userfaultfd.rst).
//!
//! podvmm's own VMs ask for no events but faults: a thread that gives memory back or maps it anew
//! sends no event and waits for no process. Other monitors' VMs tell what they give back.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mm::UserfaultfdFlags;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use crate::memory::PAGE_BYTES;

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;
/// Length of `struct uffd_msg`, in bytes. The next three say where in it the address of a fault is,
/// and the start and the end of what was removed.
const MESSAGE_BYTES: usize = 32;
const ADDRESS: Range<usize> = 16..24;
const START: Range<usize> = 8..16;
const END: Range<usize> = 16..24;
/// What the link of such a descriptor in /proc says.
const LINK: &str = "anon_inode:[userfaultfd]";
/// Messages read at once.
const MESSAGES: usize = 16;

/// What a descriptor tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// Pages at these addresses were given back (UFFD_EVENT_REMOVE): they hold zeros from now on.
    Removed(Range<u64>),
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct Zero {
    span: Span,
    mode: u64,
    done: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Span);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, Zero);

/// The descriptor. The memory is that of the process that made it.
#[derive(Debug)]
pub(crate) struct Userfault(File);

impl Userfault {
    /// A userfaultfd for memory of this process. The kernel's own accesses count, as KVM's are.
    pub(crate) fn new() -> io::Result<Self> {
        Self::with(0)
    }

    /// A userfaultfd that also tells what is given back, as other monitors have it.
    #[cfg(test)]
    pub(crate) fn with_removals() -> io::Result<Self> {
        const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
        Self::with(UFFD_FEATURE_EVENT_REMOVE)
    }

    fn with(features: u64) -> io::Result<Self> {
        let fd = match Self::of_device() {
            Ok(fd) => fd,
            Err(_) => Self::of_call()?,
        };
        let mut api = Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes such a struct, which outlives the call.
        check(unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) })?;
        Ok(Self(fd.into()))
    }

    /// Makes a userfaultfd by /dev/userfaultfd: since Linux 6.1, for whom the device lets in.
    fn of_device() -> io::Result<OwnedFd> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")?;
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: USERFAULTFD_IOC_NEW takes flags and touches no memory.
        let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags.bits().into()) };
        check(fd)?;
        // SAFETY: `fd` was just opened and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Makes a userfaultfd by the system call: for root.
    fn of_call() -> io::Result<OwnedFd> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: what the descriptor can do to memory is done by the ioctls below.
        let fd = unsafe { rustix::mm::userfaultfd(flags) };
        Ok(fd?)
    }

    /// Makes a thread that touches these addresses of guest RAM wait for a page where there is none
    /// yet.
    pub(crate) fn register(&self, addresses: Range<u64>) -> io::Result<()> {
        let mut register = Register {
            span: span(addresses),
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes such a struct, which outlives the call. The
        // addresses are of guest RAM: no code relies on when or with what its pages come.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// What the userfaultfd tells, as far as that is known yet, in its order.
    pub(crate) fn events(&self) -> io::Result<Vec<Event>> {
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        let read = match (&self.0).read(&mut messages) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            // It is no userfaultfd.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            other => other?,
        };
        let (messages, _) = messages[..read].as_chunks::<MESSAGE_BYTES>();
        Ok(messages.iter().filter_map(event).collect())
    }

    /// Puts pages at an address, and wakes who waits for them. Returns how many bytes it came to
    /// before it met one that was there.
    pub(crate) fn copy(&self, to: u64, pages: &[u8]) -> io::Result<u64> {
        let mut copy = Copy {
            to,
            from: pages.as_ptr().addr() as u64,
            len: pages.len() as u64,
            mode: 0,
            done: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes such a struct and reads `pages`, which both outlive
        // the call. It puts pages only into memory that was registered, where there are none.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) };
        done(result, copy.done)
    }

    /// Puts pages of zeros at an address; the rest is as with [`Self::copy`].
    pub(crate) fn zero(&self, addresses: Range<u64>) -> io::Result<u64> {
        let mut zero = Zero {
            span: span(addresses),
            mode: 0,
            done: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes such a struct, which outlives the call. It puts
        // pages only into memory that was registered, where there are none.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero) };
        done(result, zero.done)
    }

    /// Has who waits for pages at these addresses look again.
    pub(crate) fn wake(&self, addresses: Range<u64>) -> io::Result<()> {
        // SAFETY: UFFDIO_WAKE reads such a struct, which outlives the call.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &span(addresses)) })
    }
}

/// Takes a userfaultfd that another process made, of its memory, if it is one.
impl TryFrom<OwnedFd> for Userfault {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() == LINK {
            return Ok(Self(fd.into()));
        }
        let why = format!("the descriptor is {}, not a userfaultfd", link.display());
        Err(io::Error::new(io::ErrorKind::InvalidData, why))
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Reads a `struct uffd_msg`. None if it is an event that no VM asks for.
fn event(message: &[u8; MESSAGE_BYTES]) -> Option<Event> {
    let address = |at: Range<usize>| {
        let bytes = message[at].try_into().expect("it is eight bytes");
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        UFFD_EVENT_PAGEFAULT => Some(Event::Fault(address(ADDRESS) & !(PAGE_BYTES - 1))),
        UFFD_EVENT_REMOVE => Some(Event::Removed(address(START)..address(END))),
        _ => None,
    }
}

fn span(addresses: Range<u64>) -> Span {
    Span {
        start: addresses.start,
        len: addresses.end - addresses.start,
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What was done of something long, which fails with EAGAIN where it is not all.
fn done(result: libc::c_int, done: i64) -> io::Result<u64> {
    match u64::try_from(done) {
        Ok(done) if done > 0 => Ok(done),
        _ => check(result).map(|()| 0),
    }
}
