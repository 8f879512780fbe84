//! podvmm's threads, by what they do, and which system calls each may make.
//!
//! A guest that has taken a thread over can ask the host's kernel for no more than that thread's work needs
//! (seccomp(2)). `thread/filters.txt` lists the calls, with who makes each; the build compiles it.
//!
//! The filter of the first thread holds for the whole process, as each thread is started by one that has it;
//! another kind of thread adds its own, which allows less. Filters cannot be taken off again.

pub(crate) mod paths;
#[cfg(test)]
mod tests;
mod violation;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{Builder, JoinHandle};

use devices::virtio::Work;
use seccompiler::{BpfProgramRef, sock_filter};
use thiserror::Error;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Owns the VM. It is the process's first thread, and starts the others.
    Control,
    /// Serves clients of the API.
    Api,
    /// Writes the files of a snapshot.
    Snapshot,
    /// Runs the guest.
    Vcpu,
    /// Serves the devices whose work never blocks.
    Io,
    /// Reads and writes the image of a disk.
    Disk,
    /// Serves the files of a share.
    Files,
    /// Gives guest RAM back to the host.
    Memory,
    /// Waits for the process that gives the guest its RAM.
    Pages,
    /// Brings what is typed to the guest, and what the guest prints to a client.
    Console,
    /// Waits for signals.
    Signals,
    /// Gives VMs the RAM of a snapshot: the first thread of `podvmm pages`, and one for each VM.
    PageServer,
}

impl From<Work> for Kind {
    fn from(work: Work) -> Self {
        match work {
            Work::Disk => Self::Disk,
            Work::Files => Self::Files,
            Work::Memory => Self::Memory,
        }
    }
}

impl Kind {
    /// Starts a thread that has its filter before it does anything else.
    pub(crate) fn spawn<T: Send + 'static>(
        self,
        builder: Builder,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        builder.spawn(move || {
            // It is the host's memory that is short, then. No thread runs without its rules and filter.
            self.restrict().expect("the host takes the thread's rules");
            self.enter().expect("the host takes the thread's filter");
            work()
        })
    }

    /// Applies the filter of this kind to the calling thread.
    fn enter(self) -> Result<(), seccompiler::Error> {
        let program = match Enforcement::of_this_process() {
            Enforcement::Off => return Ok(()),
            Enforcement::Log => &logged(self.program())[..],
            Enforcement::On => self.program(),
        };
        violation::name_thread();
        seccompiler::apply_filter(program)
    }

    fn program(self) -> BpfProgramRef<'static> {
        match self {
            Self::Control => &CONTROL,
            Self::Api => &API,
            Self::Snapshot => &SNAPSHOT,
            Self::Vcpu => &VCPU,
            Self::Io => &IO,
            Self::Disk => &DISK,
            Self::Files => &FILES,
            Self::Memory => &MEMORY,
            Self::Pages => &PAGES,
            Self::Console => &CONSOLE,
            Self::Signals => &SIGNALS,
            Self::PageServer => &PAGE_SERVER,
        }
    }
}

/// What a call means that a thread's filter does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Enforcement {
    /// It is made: there are no filters.
    Off,
    /// It is made, and the kernel's log tells of it.
    Log,
    /// podvmm ends at once, and says which call it was.
    #[default]
    On,
}

/// The process's [`Enforcement`], by its number. A library leaves its process as it is.
static ENFORCEMENT: AtomicU8 = AtomicU8::new(Enforcement::Off as u8);

impl Enforcement {
    /// The value of the option `--seccomp`.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        match value {
            "true" => Some(Self::On),
            "log" => Some(Self::Log),
            "false" => Some(Self::Off),
            _ => None,
        }
    }

    fn of_this_process() -> Self {
        let all = [Self::Off, Self::Log, Self::On];
        let is_so = |it: &Self| *it as u8 == ENFORCEMENT.load(Ordering::Relaxed);
        all.into_iter().find(is_so).unwrap_or_default()
    }
}

/// The process could not give up what it does not need.
#[derive(Debug, Error)]
pub(crate) enum FilterError {
    #[error("watch for system calls that a filter does not allow")]
    Watch(#[source] io::Error),
    #[error("give the process its filter of system calls; --seccomp false runs without")]
    Apply(#[source] seccompiler::Error),
}

/// Gives the process its filters, once and for good: this thread is of the kind `first`, and starts the
/// others from here on. A call that is not allowed is told of in `log`, or else on standard error.
pub(crate) fn filter(
    first: Kind,
    enforcement: Enforcement,
    log: Option<&File>,
) -> Result<(), FilterError> {
    ENFORCEMENT.store(enforcement as u8, Ordering::Relaxed);
    match enforcement {
        Enforcement::Off => return Ok(()),
        Enforcement::Log => {}
        Enforcement::On => violation::watch(log).map_err(FilterError::Watch)?,
    }
    allocate_in_one_arena();
    // Finds the kernel's clock in memory, once: threads that read it could not.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    seccompiler::apply_filter(&ABSENT).map_err(FilterError::Apply)?;
    first.enter().map_err(FilterError::Apply)
}

/// Has all threads allocate from the C library's first arena (mallopt(3)). Before it makes others smaller, it
/// reads a setting of the kernel's from a file, in whatever thread that is; and most threads open no file.
fn allocate_in_one_arena() {
    // SAFETY: it changes a number of the allocator, before there are other threads.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // It fails for a parameter that the C library does not know.
    debug_assert_eq!(set, 1);
}

/// The program that allows all calls, and has the kernel log those that `program` refuses.
fn logged(program: BpfProgramRef<'_>) -> Vec<sock_filter> {
    let mut program = program.to_vec();
    for instruction in &mut program {
        if instruction.code == RETURN && instruction.k == libc::SECCOMP_RET_TRAP {
            instruction.k = libc::SECCOMP_RET_LOG;
        }
    }
    program
}

/// BPF_RET | BPF_K (linux/bpf_common.h): an instruction that says what becomes of the call.
const RETURN: u16 = 0x06;
