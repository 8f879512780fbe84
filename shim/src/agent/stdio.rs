//! A process's streams: FIFOs of containerd's on one side, or files, or a program for output; the guest's
//! agent on the other. A thread carries each.

mod logger;
mod uri;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec};

pub(crate) use self::logger::{Logger, Owner, reserve};
use self::uri::Output;
use crate::agent::{Agent, Stream, Target};

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
    #[error("open stream {}", .path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("stream {uri}: {why}")]
    Uri { uri: String, why: &'static str },
    #[error("start {} for output", .program.display())]
    Logger { program: PathBuf, source: io::Error },
    #[error("make what ends a process's input")]
    Event(#[source] io::Error),
    #[error("start a stream's thread")]
    Thread(#[source] io::Error),
}

/// The open streams of a process.
#[derive(Debug)]
pub(crate) struct Stdio {
    stdin: Option<File>,
    outputs: Outlets,
    close: Arc<Close>,
}

/// Where output goes.
#[derive(Debug, Default)]
struct Outlets {
    stdout: Option<File>,
    stderr: Option<File>,
    /// The program that takes output. It is dropped after the others, whose end it is to see first.
    logger: Option<Logger>,
}

impl Outlets {
    fn open(paths: &Paths, owner: Owner<'_>) -> Result<Self, Error> {
        let parse = |path: &str| {
            let is_given = !path.is_empty();
            is_given.then(|| Output::parse(path)).transpose()
        };
        let stderr = if paths.terminal { "" } else { &paths.stderr };
        match (parse(&paths.stdout)?, parse(stderr)?) {
            // As with runc it takes both.
            (Some(Output::Binary { program, arguments }), stderr) => {
                let started = Logger::start(&program, &arguments, owner);
                let started = started.map_err(|source| Error::Logger { program, source })?;
                Ok(Self {
                    stdout: Some(started.stdout),
                    stderr: stderr.map(|_| started.stderr),
                    logger: Some(started.logger),
                })
            }
            (_, Some(Output::Binary { .. })) => Err(Error::Uri {
                uri: stderr.into(),
                why: "a program that takes standard error takes standard output too",
            }),
            (stdout, stderr) => Ok(Self {
                stdout: stdout.as_ref().map(file).transpose()?,
                stderr: stderr.as_ref().map(file).transpose()?,
                logger: None,
            }),
        }
    }
}

impl Stdio {
    /// Opens them. This waits for no other process, except for a program that takes the output.
    pub(crate) fn open(paths: &Paths, owner: Owner<'_>) -> Result<Self, Error> {
        let input = |path: &str| {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            open(Path::new(path), &options)
        };
        let given = |path: &String| (!path.is_empty()).then(|| path.clone());
        let stdin = given(&paths.stdin);
        Ok(Self {
            stdin: stdin.as_deref().map(input).transpose()?,
            close: Arc::new(Close::new().map_err(Error::Event)?),
            outputs: Outlets::open(paths, owner)?,
        })
    }

    /// Starts to carry them. The threads of the outputs are returned: they end when all is told. The process's end
    /// ends its input, whatever its guest says.
    pub(crate) fn carry(
        self,
        agent: &Arc<Agent>,
        target: &Target,
        terminal: bool,
        given_up: &Arc<dyn Fn() -> bool + Send + Sync>,
        has_ended: impl Fn() -> bool + Send + 'static,
    ) -> Result<Outputs, Error> {
        let Outlets {
            stdout,
            stderr,
            logger,
        } = self.outputs;
        let mut threads = Vec::new();
        for (stream, file) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
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
                let carry = move || carry_input(&agent, &target, &stdin, &close, &|| !has_ended());
                drop(spawn("input", carry)?);
            }
            // Who reads a terminal waits for its user; who reads nothing learns that at once.
            None if terminal => {}
            None => drop(spawn("input", move || {
                drop(agent.write(&target, &[], &|| true))
            })?),
        }
        Ok(Outputs {
            threads,
            close: self.close,
            logger,
        })
    }
}

/// The threads that carry a process's output, and what ends its input.
#[derive(Debug)]
pub(crate) struct Outputs {
    threads: Vec<JoinHandle<()>>,
    pub(crate) close: Arc<Close>,
    pub(crate) logger: Option<Logger>,
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

fn open(path: &Path, options: &OpenOptions) -> Result<File, Error> {
    options.open(path).map_err(|source| Error::Open {
        path: path.into(),
        source,
    })
}

fn file(output: &Output) -> Result<File, Error> {
    match output {
        Output::Path(path) => existing(path),
        Output::File(path) => appended(path),
        Output::Binary { .. } => unreachable!("programs are started"),
    }
}

/// A FIFO is held open for reading too: output is kept, not lost, while containerd restarts.
fn existing(path: &Path) -> Result<File, Error> {
    if !std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo()) {
        return appended(path);
    }
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    open(path, &options)
}

/// A file is for root to write and for all to read, as runc's shim makes it.
fn appended(path: &Path) -> Result<File, Error> {
    if let Some(folder) = path.parent() {
        // What is wrong with it the file's own error says.
        let _ = std::fs::create_dir_all(folder);
    }
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o644);
    open(path, &options)
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
        // Output that the client does not want is taken all the same, or the container's process
        // would wait.
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
                    return Err(io::Error::other("no process reads it"));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Until a client has come there is no end either (Linux, fs/pipe.c: a FIFO hangs up once).
fn carry_input(
    agent: &Agent,
    target: &Target,
    mut stdin: &File,
    close: &Close,
    is_wanted: &dyn Fn() -> bool,
) {
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
        if agent.write(target, &data[..count], is_wanted).is_err() || count == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    const OWNER: Owner<'_> = Owner {
        namespace: "a namespace",
        id: "c",
    };

    fn outlets(stdout: &str, stderr: &str, terminal: bool) -> Result<Outlets, Error> {
        let paths = Paths {
            stdin: String::new(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal,
        };
        Outlets::open(&paths, OWNER)
    }

    /// A program of this script, which says where its output goes, and its URI with that.
    fn program(folder: &Path, script: &str) -> (PathBuf, String) {
        reserve().unwrap();
        let (program, said) = (folder.join("logger"), folder.join("said"));
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        let uri = format!("binary://{}?to={}", program.display(), said.display());
        (said, uri)
    }

    #[test]
    fn a_program_is_given_both_outputs_and_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"exec 5>&-; env | grep ^C | sort >$2; cat <&3 >>$2; cat <&4 >>$2"#;
        let (said, uri) = program(folder.path(), script);
        let Outlets {
            stdout,
            stderr,
            logger,
        } = outlets(&uri, &uri, false).unwrap();
        stdout.unwrap().write_all(b"out\n").unwrap();
        stderr.unwrap().write_all(b"err\n").unwrap();
        logger.unwrap().end();
        let expected = "CONTAINER_ID=c\nCONTAINER_NAMESPACE=a namespace\nout\nerr\n";
        assert_eq!(std::fs::read_to_string(said).unwrap(), expected);
    }

    #[test]
    fn a_program_for_a_terminal_sees_the_end_of_its_other_input() {
        let folder = tempfile::tempdir().unwrap();
        let (said, uri) = program(folder.path(), "exec 5>&-; cat <&4 >$2; cat <&3 >>$2");
        let outlets = outlets(&uri, &uri, true).unwrap();
        assert!(outlets.stderr.is_none());
        outlets.stdout.unwrap().write_all(b"all of it").unwrap();
        outlets.logger.unwrap().end();
        assert_eq!(std::fs::read_to_string(said).unwrap(), "all of it");
    }

    #[test]
    fn a_program_that_cannot_be_started_is_named() {
        let error = outlets("binary:///no/logger?a=b", "", false).unwrap_err();
        assert_eq!(error.to_string(), "start /no/logger for output");
        let error = outlets("", "binary:///no/logger", false).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("stream binary:///no/logger: ")
        );
    }

    #[test]
    fn a_file_is_made_with_its_folders_and_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("far/away/log");
        let uri = format!("file://{}", path.display());
        let outlets = outlets(&uri, &uri, false).unwrap();
        outlets.stdout.unwrap().write_all(b"out\n").unwrap();
        outlets.stderr.unwrap().write_all(b"err\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "out\nerr\n");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    }

    #[test]
    fn output_that_no_process_reads_is_given_up_when_told() {
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
        let file = existing(&path).unwrap();
        let much = vec![0; 1 << 20];
        let error = write_all(&file, &much, &|| true).unwrap_err();
        assert_eq!(error.to_string(), "no process reads it");
    }
}
