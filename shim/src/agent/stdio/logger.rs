//! A program that takes a process's output (containerd, core/runtime/v2/README.md, "Logging"): it has
//! standard output as descriptor 3, standard error as 4, and closes 5 when it is ready.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

use crate::host::process::Process;

/// The program's descriptors.
const DESCRIPTORS: [RawFd; 3] = [3, 4, 5];
/// How long it may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to end when all output is told.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// The process whose output a program takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    /// The namespace of containerd's that the process is in.
    pub(crate) namespace: &'a str,
    /// The process's identifier: the container's, or the one of an exec.
    pub(crate) id: &'a str,
}

/// The program, which runs.
#[derive(Debug)]
pub(crate) struct Logger(Child);

/// It, and where the process's output goes in.
pub(super) struct Started {
    pub(super) logger: Logger,
    pub(super) stdout: File,
    pub(super) stderr: File,
}

impl Logger {
    /// Starts it, and waits until it is ready.
    pub(super) fn start(
        program: &Path,
        arguments: &[OsString],
        owner: Owner<'_>,
    ) -> io::Result<Started> {
        let (stdout, to_stdout) = io::pipe()?;
        let (stderr, to_stderr) = io::pipe()?;
        let (ready, tells_ready) = io::pipe()?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        give(
            &mut command,
            [stdout.into(), stderr.into(), tells_ready.into()],
        )?;
        let logger = Self(command.spawn()?);
        // With it goes this process's copy of what the program was given.
        drop(command);
        await_ready(ready)?;
        Ok(Started {
            logger,
            stdout: input(to_stdout)?,
            stderr: input(to_stderr)?,
        })
    }

    /// Waits for its end, since there is no more output. One that does not end is killed.
    pub(crate) fn end(mut self) {
        let ended = Process::open(self.0.id()).and_then(|it| it.await_end(END_PATIENCE));
        if let Err(error) = ended {
            log::warn!("a program for output, {}, is killed: {error}", self.0.id());
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

impl Drop for Logger {
    /// One that was to be ended has ended, and is not killed twice.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sees to it that the numbers which programs are given descriptors by are never this process's own for
/// a moment only, such as that by which std learns whether a program could be started. To be called
/// while there is one thread.
pub(crate) fn reserve() -> io::Result<()> {
    loop {
        let spare = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        if spare.as_raw_fd() > DESCRIPTORS[2] {
            return Ok(());
        }
        // It stays open.
        let _ = spare.into_raw_fd();
    }
}

/// Has the program find these by [`DESCRIPTORS`].
fn give(command: &mut Command, descriptors: [OwnedFd; 3]) -> io::Result<()> {
    use std::os::unix::process::CommandExt;
    let mut given = Vec::with_capacity(DESCRIPTORS.len());
    for descriptor in &descriptors {
        // Beyond where they go, so that none is written over.
        given.push(rustix::io::fcntl_dupfd_cloexec(
            descriptor,
            DESCRIPTORS[2] + 1,
        )?);
    }
    let put = move || {
        for (from, to) in given.iter().zip(DESCRIPTORS) {
            // SAFETY: plain integers in; the child's table of descriptors is its own.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls alone and allocates nothing.
    unsafe { command.pre_exec(put) };
    Ok(())
}

/// A byte says so, or the end.
fn await_ready(mut ready: PipeReader) -> io::Result<()> {
    let patience = Timespec {
        tv_sec: READY_PATIENCE.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut wait = [PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)];
    let told = rustix::io::retry_on_intr(|| rustix::event::poll(&mut wait, Some(&patience)))?;
    if told == 0 {
        let why = format!("it is not ready within {READY_PATIENCE:?}");
        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
    }
    ready.read(&mut [0]).map(drop)
}

/// A pipe that is written to without waiting: who waits can give up.
fn input(pipe: PipeWriter) -> io::Result<File> {
    let pipe = OwnedFd::from(pipe);
    let flags = rustix::fs::fcntl_getfl(&pipe)?;
    rustix::fs::fcntl_setfl(&pipe, flags | OFlags::NONBLOCK)?;
    Ok(pipe.into())
}
