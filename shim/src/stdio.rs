//! A process's streams: FIFOs of containerd's on one side, the guest's agent on the other. A thread
//! carries each.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::agent::{Agent, Stream};

/// What is asked of the agent at once: no more than a FIFO holds.
const CHUNK: u32 = 32 << 10;
const STACK: usize = 128 << 10;

/// Where containerd wants a process's streams. Empty is none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Paths {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("open stream {path}")]
    Open { path: String, source: io::Error },
    #[error("stream {0}: only FIFOs and files are possible")]
    Scheme(String),
    #[error("make what ends a process's input")]
    Event(#[source] io::Error),
    #[error("start a stream's thread")]
    Thread(#[source] io::Error),
}

/// A process in the guest.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) container: String,
    pub(crate) exec: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.exec.as_str() {
            "" => write!(f, "the first process of {}", self.container),
            exec => write!(f, "process {exec} of {}", self.container),
        }
    }
}

/// The open streams of a process.
#[derive(Debug)]
pub(crate) struct Stdio {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    close: Arc<Close>,
}

impl Stdio {
    /// Opens them, which waits for nobody.
    pub(crate) fn open(paths: &Paths) -> Result<Self, Error> {
        let input = |path: &str| {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            open(path, &options)
        };
        let given = |path: &String| (!path.is_empty()).then(|| path.clone());
        let stdin = given(&paths.stdin);
        let stderr = given(&paths.stderr).filter(|_| !paths.terminal);
        Ok(Self {
            stdin: stdin.as_deref().map(input).transpose()?,
            close: Arc::new(Close::new().map_err(Error::Event)?),
            stdout: given(&paths.stdout).as_deref().map(output).transpose()?,
            stderr: stderr.as_deref().map(output).transpose()?,
        })
    }

    /// Starts to carry them. The threads of the outputs are returned: they end when all is told.
    pub(crate) fn carry(
        self,
        agent: &Arc<Agent>,
        target: &Target,
        terminal: bool,
        given_up: &Arc<dyn Fn() -> bool + Send + Sync>,
    ) -> Result<Outputs, Error> {
        let mut threads = Vec::new();
        for (stream, file) in [(Stream::Stdout, self.stdout), (Stream::Stderr, self.stderr)] {
            if terminal && stream == Stream::Stderr {
                continue;
            }
            let (agent, target) = (Arc::clone(agent), target.clone());
            let given_up = Arc::clone(given_up);
            let carry = move || carry_output(&agent, &target, stream, file, &*given_up);
            threads.push(spawn("output", carry)?);
        }
        let (agent, target) = (Arc::clone(agent), target.clone());
        match self.stdin {
            Some(stdin) => {
                let close = Arc::clone(&self.close);
                let carry = move || carry_input(&agent, &target, &stdin, &close);
                drop(spawn("input", carry)?);
            }
            // Who reads a terminal waits for its user; who reads nothing learns that at once.
            None if terminal => {}
            None => drop(spawn("input", move || drop(agent.write(&target, &[])))?),
        }
        Ok(Outputs {
            threads,
            close: self.close,
        })
    }
}

/// The threads that carry a process's output, and what ends its input.
#[derive(Debug)]
pub(crate) struct Outputs {
    threads: Vec<JoinHandle<()>>,
    pub(crate) close: Arc<Close>,
}

impl Outputs {
    /// Waits for all output to be told.
    pub(crate) fn drain(self) {
        for thread in self.threads {
            // It has not panicked: that would have ended the process.
            let _ = thread.join();
        }
    }
}

/// Ends a process's input, though a client may still hold it open.
#[derive(Debug)]
pub(crate) struct Close(OwnedFd);

impl Close {
    fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// The input ends with what is in it now.
    pub(crate) fn close(&self) {
        // It is to be done at most once.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

fn spawn(name: &str, carry: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(carry).map_err(Error::Thread)
}

fn open(path: &str, options: &OpenOptions) -> Result<File, Error> {
    options.open(path).map_err(|source| Error::Open {
        path: path.into(),
        source,
    })
}

/// A FIFO is held open for reading too: output is kept, not lost, while containerd restarts.
fn output(path: &str) -> Result<File, Error> {
    let plain = path.strip_prefix("file://").unwrap_or(path);
    if plain.contains("://") {
        return Err(Error::Scheme(path.into()));
    }
    let is_fifo = std::fs::metadata(plain).is_ok_and(|file| file.file_type().is_fifo());
    let mut options = OpenOptions::new();
    if is_fifo {
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
    } else {
        options.append(true).create(true);
    }
    open(plain, &options)
}

fn carry_output(
    agent: &Agent,
    target: &Target,
    stream: Stream,
    mut file: Option<File>,
    given_up: &dyn Fn() -> bool,
) {
    loop {
        let data = match agent.read(target, stream, CHUNK) {
            Ok(data) if !data.is_empty() => data,
            Ok(_) => return,
            Err(error) => {
                log::info!("{target:?}: {stream:?} ends: {error}");
                return;
            }
        };
        // Output that nobody wants is taken all the same, or the process would wait.
        if let Some(open) = &mut file
            && let Err(error) = write_all(open, &data, given_up)
        {
            log::info!("{}: its output is dropped: {error}", target.container);
            file = None;
        }
    }
}

/// Writes all, waiting for room as long as that makes sense.
fn write_all(mut file: &File, mut data: &[u8], given_up: &dyn Fn() -> bool) -> io::Result<()> {
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: 500_000_000,
    };
    while !data.is_empty() {
        match file.write(data) {
            Ok(count) => data = &data[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut wait = [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::OUT)];
                let ready = rustix::event::poll(&mut wait, Some(&pause)).unwrap_or(0);
                if ready == 0 && given_up() {
                    return Err(io::Error::other("nobody reads it"));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Until a client has come there is no end either (Linux, fs/pipe.c: a FIFO hangs up once).
fn carry_input(agent: &Agent, target: &Target, mut stdin: &File, close: &Close) {
    let mut data = vec![0; CHUNK as usize];
    loop {
        let mut wait = [
            PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(close.0.as_fd(), PollFlags::IN),
        ];
        if rustix::event::poll(&mut wait, None).is_err() {
            continue;
        }
        let is_closed = !wait[1].revents().is_empty();
        let count = match stdin.read(&mut data) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_closed => continue,
            Err(_) => 0,
        };
        // Without data it is the end. A process that has ended takes none.
        if agent.write(target, &data[..count]).is_err() || count == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fifos_and_files_are_streams() {
        let paths = Paths {
            stdout: "binary:///bin/logger?id=x".into(),
            ..Paths::default()
        };
        let error = Stdio::open(&paths).unwrap_err().to_string();
        assert_eq!(
            error,
            "stream binary:///bin/logger?id=x: only FIFOs and files are possible"
        );
    }

    #[test]
    fn output_nobody_reads_is_given_up_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let file = output(path.to_str().unwrap()).unwrap();
        let much = vec![0; 1 << 20];
        let error = write_all(&file, &much, &|| true).unwrap_err();
        assert_eq!(error.to_string(), "nobody reads it");
    }
}
