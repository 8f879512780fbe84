//! Networks that only a test sees. Needs root.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Runs `test` on a thread that sees a network of its own, as do the programs it starts.
pub fn alone(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // SAFETY: it changes nothing but which network this thread sees.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "networks of their own need root");
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs ip(8).
pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(
        status.expect("iproute2 is installed").success(),
        "ip {arguments}"
    );
}

/// Gives `link` an address and turns it on, once it is there.
pub fn set_up(link: &str, address: &str) {
    while !links().contains(link) {
        thread::sleep(Duration::from_millis(1));
    }
    ip(&format!("address add {address} dev {link}"));
    ip(&format!("link set {link} up"));
}

/// A network namespace with a name, as network plugins make it for a pod, and another where the other
/// ends of its interfaces are.
#[derive(Debug)]
pub struct PodNetwork {
    names: [String; 2],
    interfaces: usize,
}

impl PodNetwork {
    /// With interfaces `eth0` and so on, of the addresses 10.9.N.2, whose other ends are 10.9.N.1.
    pub fn new(interfaces: usize) -> Self {
        let of = |end: &str| format!("podvmm-test-{}-{end}", std::process::id());
        let network = Self {
            names: [of("pod"), of("far")],
            interfaces,
        };
        let [pod, far] = &network.names;
        ip(&format!("netns add {pod}"));
        ip(&format!("netns add {far}"));
        for number in 0..interfaces {
            let (near, other) = (format!("eth{number}"), format!("far{number}"));
            ip(&format!(
                "-n {pod} link add {near} address {} type veth peer {other} netns {far}",
                Self::hardware(number)
            ));
            for (namespace, link, last) in [(pod, near, 2), (far, other, 1)] {
                ip(&format!(
                    "-n {namespace} address add 10.9.{number}.{last}/24 dev {link}"
                ));
                ip(&format!("-n {namespace} link set {link} up"));
            }
        }
        network
    }

    /// The hardware address of an interface.
    pub fn hardware(number: usize) -> String {
        format!("02:00:00:00:07:0{number}")
    }

    pub fn interfaces(&self) -> usize {
        self.interfaces
    }

    /// Where it is.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.names[0])
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        for name in &self.names {
            // What stays is for a snapshot to find.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

/// Listens on an address of the host's for one caller, who says five letters and is thanked. Gives
/// the port, and what was said once the call has come.
pub fn one_caller(address: &str) -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind((address, 0)).expect("it is the host's own address");
    let port = listener.local_addr().expect("it listens").port();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the caller connects");
        let mut text = [0; 5];
        stream.read_exact(&mut text).expect("the caller speaks");
        let thanks = stream.write_all(b"well received\n");
        thanks.expect("the caller listens");
        String::from_utf8_lossy(&text).into_owned()
    });
    (port, server)
}

/// The links of this thread's network, as the kernel lists them.
pub fn links() -> String {
    std::fs::read_to_string("/proc/thread-self/net/dev").expect("/proc is mounted")
}

/// One queue of a new tap, as a runtime would hand it over.
pub fn tap(name: &str) -> File {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    const TAP_NO_PI_VNET_HDR: u16 = 0x0002 | 0x1000 | 0x4000;
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("taps are possible");
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&TAP_NO_PI_VNET_HDR.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes an ifreq of 40 bytes, which outlives the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    tap
}
