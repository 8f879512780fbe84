//! The host's end of a tap: a packet socket that sees the guest's frames and sends it others.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use crate::rig::PATIENCE;

/// For experiments (IEEE 802, "Local Experimental Ethertype 1").
const ETHERTYPE: u16 = 0x88b5;

/// A packet socket on one interface.
#[derive(Debug)]
pub(crate) struct Wire {
    /// Its calls are read(2) and write(2).
    socket: fs::File,
}

impl Wire {
    pub(crate) fn open(interface: &str) -> Self {
        let name = CString::new(interface).expect("it has no NUL");
        // SAFETY: the name lives until the call returns.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let index = i32::try_from(index).expect("it is a small number");
        assert!(index > 0, "there is no {interface}");
        let protocol = ETHERTYPE.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
        assert!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
        // SAFETY: the descriptor was just opened, and nothing else owns it.
        let socket = unsafe { UnixDatagram::from_raw_fd(fd) };
        let timeout = Some(Duration::from_millis(200));
        socket.set_read_timeout(timeout).expect("it is a socket");
        // SAFETY: zeros are an address of no family.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("it is 17");
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        let len = u32::try_from(size_of_val(&address)).expect("it is short");
        // SAFETY: the address lives until the call returns, and is as long as it says.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        Self {
            socket: fs::File::from(std::os::fd::OwnedFd::from(socket)),
        }
    }

    /// Sends the guest a frame.
    pub(crate) fn send(&self, frame: &[u8]) {
        (&self.socket).write_all(frame).expect("the link is up");
    }

    /// Waits for a frame of the guest's.
    pub(crate) fn expect(&self, frame: &[u8], after: &str) {
        let start = Instant::now();
        let mut bytes = [0; 2048];
        loop {
            let count = (&self.socket).read(&mut bytes).unwrap_or(0);
            if bytes[..count].starts_with(frame) {
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{after}: the frame does not come"
            );
        }
    }
}

/// A frame that is told from others by its number.
pub(crate) fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend(number.to_le_bytes());
    frame.resize(60, 0x42);
    frame
}
