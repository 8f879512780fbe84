//! A tap: the host's side of the guest's network (Linux, Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::virtio_net_hdr_v1;

/// What precedes each frame on the tap and in the rings.
pub(super) const HEADER_LEN: usize = size_of::<virtio_net_hdr_v1>();

/// Names of interfaces are shorter than this.
const IFNAMSIZ: usize = 16;

// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;

/// What the guest can do with frames from the tap that are not finished (TUNSETOFFLOAD).
pub(super) mod offload {
    pub(crate) const CSUM: u32 = 0x01;
    pub(crate) const TSO4: u32 = 0x02;
    pub(crate) const TSO6: u32 = 0x04;
    pub(crate) const TSO_ECN: u32 = 0x08;
    pub(crate) const USO4: u32 = 0x20;
    pub(crate) const USO6: u32 = 0x40;
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("a tap's name is 1 to 15 bytes without slashes, unlike '{0}'")]
    Name(String),
    #[error("open /dev/net/tun")]
    Open(#[source] io::Error),
    #[error("tap {name}: create it or attach to it{}", hint(.source))]
    Attach { name: String, source: io::Error },
    #[error("file descriptor {0} is not a tap")]
    NotATap(RawFd),
    #[error("the tap has no header for offloads: make it with vnet_hdr")]
    NoHeader,
    #[error("set up the tap")]
    SetUp(#[source] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => ": may this user? (CAP_NET_ADMIN, or make it for this user)",
        Some(libc::EBUSY) => ": is another program attached to it?",
        Some(libc::EINVAL) => ": is it a tap, with as many queues as wanted?",
        _ => "",
    }
}

/// `struct ifreq`, as far as taps use it.
#[repr(C)]
struct Request {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    fn new(flags: u16) -> Self {
        Self {
            name: [0; IFNAMSIZ],
            flags,
            rest: [0; 22],
        }
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.name[..end.unwrap_or(IFNAMSIZ)]).into_owned()
    }
}

/// One queue of a tap. A tap that opening made goes when its last queue is closed.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens `queues` queues of the tap `name`, which is made if there is none.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        let well_formed = (1..IFNAMSIZ).contains(&name.len())
            && !name.contains(['/', '%', '\0'])
            && name != "."
            && name != "..";
        if !well_formed {
            return Err(TapError::Name(name.into()));
        }
        (0..queues)
            .map(|_| {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                    .open("/dev/net/tun")
                    .map_err(TapError::Open)?;
                let multi = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
                let mut request = Request::new(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | multi);
                request.name[..name.len()].copy_from_slice(name.as_bytes());
                request_of(&file, TUNSETIFF, &mut request).map_err(|source| TapError::Attach {
                    name: name.into(),
                    source,
                })?;
                Self { file }.set_up()
            })
            .collect()
    }

    /// Takes over one queue of a tap that another process opened.
    pub fn inherit(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = Request::new(0);
        request_of(&file, TUNGETIFF, &mut request)
            .map_err(|_| TapError::NotATap(file.as_raw_fd()))?;
        if request.flags & IFF_VNET_HDR == 0 {
            return Err(TapError::NoHeader);
        }
        Self { file }.set_up()
    }

    /// Something with a tap's manners, for tests.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn pretend(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
        }
    }

    fn set_up(self) -> Result<Self, TapError> {
        let mut nonblocking: libc::c_int = 1;
        // SAFETY: FIONBIO reads an int, which outlives the call.
        let set = unsafe { libc::ioctl(self.raw(), libc::FIONBIO, &raw mut nonblocking) };
        check(set).map_err(TapError::SetUp)?;
        let mut len = libc::c_int::try_from(HEADER_LEN).expect("it is 12");
        // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
        let set = unsafe { libc::ioctl(self.raw(), TUNSETVNETHDRSZ, &raw mut len) };
        check(set).map_err(TapError::SetUp)?;
        Ok(self)
    }

    /// The interface's name.
    pub fn name(&self) -> io::Result<String> {
        let mut request = Request::new(0);
        request_of(&self.file, TUNGETIFF, &mut request)?;
        Ok(request.name())
    }

    /// What the guest finishes itself: an or of [`offload`]'s bits.
    pub(super) fn set_offloads(&self, bits: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.raw(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }

    /// Whether the tap gives frames to this queue, of several.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = Request::new(match attached {
            true => IFF_ATTACH_QUEUE,
            false => IFF_DETACH_QUEUE,
        });
        match request_of(&self.file, TUNSETQUEUE, &mut request) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    #[cfg(test)]
    pub(super) fn is_attached(&self) -> bool {
        let mut request = Request::new(0);
        request_of(&self.file, TUNGETIFF, &mut request).expect("it is a tap");
        request.flags & IFF_DETACH_QUEUE == 0
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let file = self.file.try_clone()?;
        Ok(Self { file })
    }

    fn raw(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.file.into()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.raw()
    }
}

fn request_of(file: &File, call: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    // SAFETY: `Request` has the size and layout of the ifreq that each of these calls reads or
    // writes, and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), call, std::ptr::from_mut(request)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
