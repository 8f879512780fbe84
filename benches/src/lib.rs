//! Measuring a VMM from outside: the time from the start of its process to what
//! its guest does first, and the memory it takes.

pub mod process;
pub mod report;
pub mod walls;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::payload::{Protocol, image};
use tests::{Payload, code};

/// Size of the kernel that is loaded, as the goal for the start is written.
pub const KERNEL_BYTES: usize = 15 << 20;

code!(
    say_hello_and_reset,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, '!'",
    "out dx, al",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: hlt",
    "jmp 1b",
);

/// A 15 MiB kernel whose first instructions write a byte to the serial port.
pub fn hello_kernel() -> Payload {
    let mut code = say_hello_and_reset().to_vec();
    code.resize(KERNEL_BYTES, 0x5a);
    Payload::from_bytes(&image(&code, Protocol::Pvh))
}

/// podvmm with that kernel.
pub fn podvmm(kernel: &Payload) -> Command {
    let mut command = Command::new(tests::podvmm::binary());
    command
        .args(kernel.arguments())
        .args(["--memory", "size=128M"]);
    command
}

/// Another VMM, as its user would write its command line; `{kernel}` stands for
/// the kernel. Its guest's serial port must be its standard output.
pub fn peer(kernel: &Payload) -> Option<Command> {
    let line = std::env::var("PODVMM_PEER").ok()?;
    let line = line.replace("{kernel}", &kernel.path().display().to_string());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]);
    Some(command)
}

/// Time from before the process is made until its guest's first byte is here,
/// and until the process is gone.
pub fn time_to_first_byte(mut command: Command) -> (Duration, Duration) {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the VMM starts");
    let mut stdout = child.stdout.take().expect("it was piped");
    let mut byte = [0];
    // A VMM may print a banner; the guest's byte is the one we know.
    while byte != *b"!" {
        stdout
            .read_exact(&mut byte)
            .expect("the guest prints before the VMM ends");
    }
    let first = started.elapsed();
    child.wait().expect("the VMM is a child of ours");
    (first, started.elapsed())
}

/// A Linux guest that has been told to run a command.
#[derive(Debug)]
pub struct LinuxGuest {
    child: Child,
    /// From before the process was made until the agent starts the command.
    pub ready: Duration,
    /// Host addresses of guest RAM.
    ram: Vec<std::ops::Range<u64>>,
}

impl LinuxGuest {
    /// Boots the guest that the set-up built, with one vCPU and 128 MiB.
    pub fn boot(command: &[&str]) -> Self {
        let started = Instant::now();
        let mut child = Command::new(tests::podvmm::binary())
            .args(["-vv", "--memory", "size=128M", "--"])
            .args(command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("podvmm starts");
        let log = BufReader::new(child.stderr.take().expect("it was piped"));
        let mut guest = Self {
            child,
            ready: Duration::ZERO,
            ram: Vec::new(),
        };
        for line in log.lines() {
            let line = line.expect("the log is text");
            guest.ram.extend(ram_range(&line));
            if line.contains("the agent starts the command") {
                guest.ready = started.elapsed();
                return guest;
            }
        }
        panic!("podvmm ended before its agent was ready");
    }

    /// Resident memory of the VMM without guest RAM, in bytes.
    pub fn overhead_bytes(&self) -> u64 {
        process::resident_without(self.child.id(), &self.ram)
    }
}

impl Drop for LinuxGuest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Host addresses from podvmm's log line about guest RAM.
fn ram_range(line: &str) -> Option<std::ops::Range<u64>> {
    let (_, rest) = line.split_once("guest RAM: ")?;
    let (len, rest) = rest.split_once(" bytes at ")?;
    let (_, host) = rest.split_once("host address 0x")?;
    let start = u64::from_str_radix(host.trim(), 16).ok()?;
    Some(start..start + len.parse::<u64>().ok()?)
}
