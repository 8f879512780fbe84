//! Taps (Linux, Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq`, as far as taps use it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tap with a name of at most 15 bytes. It goes when no process has it open any more.
pub(super) fn make(name: &str) -> io::Result<OwnedFd> {
    let tap = File::from(OwnedFd::from(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?,
    ));
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is and which outlives the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if made == 0 {
        Ok(tap.into())
    } else {
        Err(io::Error::last_os_error())
    }
}
