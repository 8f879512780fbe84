//! A guest that does what it is told: an interpreter of a few hundred bytes. Scripts are written into its
//! RAM from outside, as are rings and buffers, and what came of each step is read from there.
//!
//! It runs in long mode with the first 5 GiB mapped onto themselves. An exception ends the step that it
//! happens in and is recorded; an interrupt is counted.

use std::fmt::{self, Debug};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use tests::payload::START;

use crate::guest;
use crate::rig::{PATIENCE, has_ended};

/// What each CPU is told through; the second CPU's comes after the first's.
const MAILBOX: u64 = 0x21_0000;
const MAILBOX_BYTES: u64 = 0x1000;
/// The scripts, one for each CPU.
const SCRIPTS: u64 = 0x22_0000;
const SCRIPT_BYTES: u64 = 0x8_0000;
const STEP_BYTES: usize = 64;
/// Where code is put that a step calls.
pub(crate) const SCRATCH_CODE: u64 = 0x20_9000;
/// Where the second CPU starts, in real mode.
const TRAMPOLINE: u64 = 0x8000;

// Fields of a mailbox: go, done, the script, cancel, interrupts so far, whether the CPU is there.
const DONE: u64 = 4;
const SCRIPT: u64 = 8;
const CANCEL: u64 = 16;
const INTERRUPTS: u64 = 24;
const PRESENT: u64 = 32;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    End,
    Read,
    Write,
    In,
    Out,
    ReadMsr,
    WriteMsr,
    Cpuid,
    /// Until 16 bits at the address are the value, or the device whose status is at `extra`, and of this width,
    /// asks for a reset.
    AwaitUsed,
    AwaitInterrupts,
    Call,
}

/// One step of a script.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    op: Op,
    width: u32,
    address: u64,
    value: u64,
    count: u32,
    stride: u32,
    extra: u64,
}

impl Step {
    pub(crate) fn new(op: Op, address: u64) -> Self {
        Self {
            op,
            width: 4,
            address,
            value: 0,
            count: 1,
            stride: 0,
            extra: 0,
        }
    }

    pub(crate) fn read(address: u64, width: u32) -> Self {
        Self::new(Op::Read, address).width(width)
    }

    pub(crate) fn write(address: u64, width: u32, value: u64) -> Self {
        Self::new(Op::Write, address).width(width).value(value)
    }

    pub(crate) fn input(port: u16, width: u32) -> Self {
        Self::new(Op::In, port.into()).width(width)
    }

    pub(crate) fn output(port: u16, width: u32, value: u64) -> Self {
        Self::new(Op::Out, port.into()).width(width).value(value)
    }

    pub(crate) fn width(self, width: u32) -> Self {
        Self { width, ..self }
    }

    pub(crate) fn value(self, value: u64) -> Self {
        Self { value, ..self }
    }

    pub(crate) fn extra(self, extra: u64) -> Self {
        Self { extra, ..self }
    }

    /// So many times, the address moving by `stride`.
    pub(crate) fn times(self, count: u32, stride: u32) -> Self {
        Self {
            count,
            stride,
            ..self
        }
    }

    fn bytes(self) -> [u8; STEP_BYTES] {
        let mut bytes = [0; STEP_BYTES];
        bytes[..4].copy_from_slice(&(self.op as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.width.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.address.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.value.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.count.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.stride.to_le_bytes());
        bytes[56..].copy_from_slice(&self.extra.to_le_bytes());
        bytes
    }
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The last exception's vector.
    pub(crate) vector: Option<u8>,
    /// Exceptions in all rounds.
    pub(crate) faults: u64,
    /// What the last round read.
    pub(crate) value: u64,
    pub(crate) more: u64,
}

impl Outcome {
    fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let word = bytes[at..at + 8].try_into().expect("it has 8 bytes");
            u64::from_le_bytes(word)
        };
        let vector = word(32);
        Self {
            vector: (vector != 0).then_some(vector.to_le_bytes()[0]),
            faults: word(48),
            value: word(40),
            more: word(56),
        }
    }
}

/// The guest's RAM, as its podvmm has it.
pub(crate) struct Ram {
    file: File,
    base: u64,
}

impl Ram {
    /// Finds the RAM that begins at the guest's address 0 in process `pid`, by the payload in it.
    fn find(pid: u32) -> io::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let starts = maps.lines().filter_map(|line| line.split_once('-'));
        let starts = starts.filter_map(|(start, _)| u64::from_str_radix(start, 16).ok());
        for base in starts {
            let mut found = vec![0; guest::image().len()];
            if file.read_exact_at(&mut found, base + START).is_ok() && found == guest::image() {
                return Ok(Self { file, base });
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Where its first byte is in podvmm's address space.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let written = self.file.write_all_at(bytes, self.base + address);
        written.unwrap_or_else(|error| panic!("write guest RAM at {address:#x}: {error}"));
    }

    fn try_read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.base + address)
    }

    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) {
        self.try_read(address, bytes)
            .unwrap_or_else(|error| panic!("read guest RAM at {address:#x}: {error}"));
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes);
        bytes
    }

    pub(crate) fn u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(address, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn u32(&self, address: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn u64(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ram at {:#x}", self.base)
    }
}

/// The guest's CPUs, which wait to be told something.
#[derive(Debug)]
pub(crate) struct Puppet {
    pub(crate) ram: Ram,
}

impl Puppet {
    /// Waits until the guest of process `pid` is there. None if the process ends first.
    pub(crate) fn attach(pid: u32) -> Option<Self> {
        let start = Instant::now();
        let ram = loop {
            match Ram::find(pid) {
                Ok(ram) => break ram,
                Err(error) => assert!(start.elapsed() < PATIENCE, "no guest in {pid}: {error}"),
            }
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            if has_ended(&status) {
                return None;
            }
            thread::sleep(Duration::from_millis(1));
        };
        let puppet = Self { ram };
        puppet.await_cpu(0);
        Some(puppet)
    }

    fn await_cpu(&self, cpu: u64) {
        let start = Instant::now();
        while self.ram.u32(mailbox(cpu) + PRESENT) == 0 {
            assert!(start.elapsed() < PATIENCE, "CPU {cpu} does not come");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Starts the second CPU, which is then busy until it is [stopped](Self::stop_second).
    pub(crate) fn start_second(&self) {
        let table: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        let table: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
        let [real_mode, long_mode] = guest::start_up();
        self.ram.write(TRAMPOLINE, real_mode);
        self.ram.write(TRAMPOLINE + 0x60, long_mode);
        self.ram
            .write(TRAMPOLINE + 0x80, &[31, 0, 0xa0, 0x80, 0, 0]);
        self.ram.write(TRAMPOLINE + 0xa0, &table);
        self.stop_second();
        self.send_second(0x4600 | TRAMPOLINE >> 12);
        self.await_cpu(1);
    }

    /// Puts the second CPU back to where it waits to be started.
    pub(crate) fn stop_second(&self) {
        self.send_second(0x4500);
        self.ram.write(mailbox(1) + PRESENT, &[0; 4]);
    }

    /// Sends the second CPU what the interrupt command register says.
    fn send_second(&self, command: u64) {
        self.run(&[
            Step::write(0xfee0_00f0, 4, 0x1ff),
            Step::write(0xfee0_0310, 4, 1 << 24),
            Step::write(0xfee0_0300, 4, command),
        ]);
    }

    /// Runs a script on the first CPU.
    pub(crate) fn run(&self, steps: &[Step]) -> Vec<Outcome> {
        self.begin(0, steps);
        self.finish(0, steps.len())
            .unwrap_or_else(|| panic!("the guest hangs in {steps:?}"))
    }

    pub(crate) fn run_one(&self, step: Step) -> Outcome {
        self.run(&[step])[0]
    }

    /// Has a CPU begin with a script.
    pub(crate) fn begin(&self, cpu: u64, steps: &[Step]) {
        let mut bytes: Vec<u8> = steps.iter().flat_map(|step| step.bytes()).collect();
        bytes.extend(Step::new(Op::End, 0).bytes());
        assert!(bytes.len() as u64 <= SCRIPT_BYTES, "a long script");
        let script = SCRIPTS + cpu * SCRIPT_BYTES;
        let mailbox = mailbox(cpu);
        self.ram.write(script, &bytes);
        self.ram.write(mailbox + SCRIPT, &script.to_le_bytes());
        self.ram.write(mailbox + CANCEL, &[0; 4]);
        self.ram.write(mailbox, &[1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Waits for the end of what a CPU has begun. None if it does not come.
    pub(crate) fn finish(&self, cpu: u64, steps: usize) -> Option<Vec<Outcome>> {
        let start = Instant::now();
        while !self.is_done(cpu) {
            // Fails if podvmm has ended.
            self.ram.u32(mailbox(cpu));
            if start.elapsed() > PATIENCE {
                self.cancel(cpu);
                return None;
            }
            thread::sleep(Duration::from_micros(50));
        }
        let bytes = self
            .ram
            .bytes(SCRIPTS + cpu * SCRIPT_BYTES, steps * STEP_BYTES);
        Some(bytes.chunks(STEP_BYTES).map(Outcome::parse).collect())
    }

    /// Whether a CPU has come to the end of its script. Not if podvmm has ended.
    pub(crate) fn is_done(&self, cpu: u64) -> bool {
        let mut done = [0; 4];
        self.ram.try_read(mailbox(cpu) + DONE, &mut done).is_ok() && done != [0; 4]
    }

    /// Has a CPU leave what it is at.
    pub(crate) fn cancel(&self, cpu: u64) {
        self.ram.write(mailbox(cpu) + CANCEL, &[1]);
    }

    /// Interrupts that the first CPU has had.
    pub(crate) fn interrupts(&self) -> u64 {
        self.ram.u64(mailbox(0) + INTERRUPTS)
    }
}

fn mailbox(cpu: u64) -> u64 {
    MAILBOX + cpu * MAILBOX_BYTES
}
