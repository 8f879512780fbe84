//! A container: its cgroup, its processes and what they read and write.

pub(crate) mod cgroup;
mod identity;
pub(crate) mod launch;
mod rootfs;
pub(crate) mod stage;

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use agent::protocol::oci;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::reaper::{End, Reaper};
use crate::sys::{self, pid_t};
use cgroup::Cgroup;
use launch::{Launch, Word};

/// Why a container or process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error("start a process")]
    Start(#[from] io::Error),
    /// What the process itself said.
    #[error("{0}")]
    Process(String),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("a {0} namespace is not possible in a pod's VM")]
    Namespace(String),
}

/// A container, whose first process may still wait to be started.
#[derive(Debug)]
pub(crate) struct Container {
    cgroup: Cgroup,
    /// By `exec_id`; the first process by the container's own.
    processes: Mutex<HashMap<String, Arc<Process>>>,
    first: Arc<Process>,
    /// Kills for want of memory that were told of.
    pub(crate) oom_kills: Mutex<u64>,
}

/// A process and the agent's ends of its streams.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: pid_t,
    pub(crate) end: Arc<End>,
    /// Until it is told to go on.
    waiting: Mutex<Option<OwnedFd>>,
    stdin: Mutex<Option<File>>,
    stdout: Option<File>,
    stderr: Option<File>,
    pub(crate) terminal: bool,
}

impl Container {
    /// Makes a container whose first process waits.
    pub(crate) fn create(id: &str, spec: oci::Spec, reaper: &Reaper) -> Result<Self, Error> {
        let linux = spec.linux.as_ref().ok_or(Error::Missing("linux"))?;
        let process = spec.process.as_ref().ok_or(Error::Missing("process"))?;
        let user =
            |namespace: &&oci::LinuxNamespace| matches!(namespace.r#type.as_str(), "user" | "time");
        if let Some(namespace) = linux.namespaces.iter().find(user) {
            return Err(Error::Namespace(namespace.r#type.clone()));
        }
        let cgroup = Cgroup::new(&linux.cgroups_path, id)?;
        if let Some(resources) = &linux.resources {
            cgroup.limit(resources)?;
        }
        let terminal = process.terminal;
        let launch = Launch {
            spec: Some(spec),
            ..Launch::default()
        };
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        let first = Arc::new(start(&launch, terminal, namespaces, &cgroup, reaper)?);
        Ok(Self {
            cgroup,
            processes: Mutex::new(HashMap::from([(id.to_owned(), Arc::clone(&first))])),
            first,
            oom_kills: Mutex::default(),
        })
    }

    /// Starts one more process.
    pub(crate) fn exec(
        &self,
        exec_id: &str,
        process: oci::Process,
        reaper: &Reaper,
    ) -> Result<(), Error> {
        let terminal = process.terminal;
        let launch = Launch {
            spec: None,
            process: Some(process),
            join: self.first.pid,
        };
        let process = start(&launch, terminal, 0, &self.cgroup, reaper)?;
        process.go_on()?;
        self.processes()
            .insert(exec_id.to_owned(), Arc::new(process));
        Ok(())
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes.lock().expect("a panic ends the process")
    }

    /// The process of this number; without one the first.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return Some(Arc::clone(&self.first));
        }
        self.processes().get(exec_id).cloned()
    }

    pub(crate) fn forget(&self, exec_id: &str) {
        self.processes().remove(exec_id);
    }

    pub(crate) fn first(&self) -> &Process {
        &self.first
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }
}

impl Process {
    /// Lets it become its program.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        let mut waiting = self.waiting.lock().expect("a panic ends the process");
        let Some(channel) = waiting.take() else {
            return Err(Error::Process("it has been started already".into()));
        };
        launch::say(channel.as_fd(), &Word::Ready)?;
        // Silence is success: it has become its program.
        match launch::hear(channel.as_fd())? {
            Some(Word::Failed(why)) => Err(Error::Process(why)),
            _ => Ok(()),
        }
    }

    /// Whether it still waits to be told.
    pub(crate) fn waits(&self) -> bool {
        self.waiting
            .lock()
            .expect("a panic ends the process")
            .is_some()
    }

    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        // One that has ended and was not taken note of keeps its number.
        if self.end.is_known() {
            return Ok(());
        }
        sys::kill(self.pid, signal)
    }

    /// Waits for output, of standard error if `error`. Nothing is the end.
    pub(crate) fn read(&self, error: bool, len: usize) -> Vec<u8> {
        let stream = if error { &self.stderr } else { &self.stdout };
        let mut data = vec![0; len];
        // A terminal nobody is on says EIO, which is an end like others.
        let read = stream.as_ref().map_or(Ok(0), |mut stream| {
            loop {
                match stream.read(&mut data) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => return other,
                }
            }
        });
        data.truncate(read.unwrap_or_default());
        data
    }

    /// Gives it input; nothing ends that.
    pub(crate) fn write(&self, data: &[u8]) -> io::Result<()> {
        let mut stdin = self.stdin.lock().expect("a panic ends the process");
        if data.is_empty() {
            *stdin = None;
            return Ok(());
        }
        match stdin.as_mut() {
            Some(stdin) => stdin.write_all(data),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        match &self.stdout {
            Some(terminal) if self.terminal => Ok(rustix::termios::tcsetwinsize(terminal, size)?),
            _ => Err(io::Error::other("it has no terminal")),
        }
    }
}

/// Starts this program once more to become what `launch` says, up to where it waits.
fn start(
    launch: &Launch,
    terminal: bool,
    namespaces: i32,
    cgroup: &Cgroup,
    reaper: &Reaper,
) -> Result<Process, Error> {
    let flags = SocketFlags::CLOEXEC;
    let (channel, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(io::Error::from)?;
    let file = launch.to_file()?;
    let (their_stdin, stdin) = io::pipe()?;
    let (stdout, their_stdout) = io::pipe()?;
    let (stderr, their_stderr) = io::pipe()?;
    let argv = [
        c"podvmm-agent".to_owned(),
        CString::new(launch::STAGE).expect("has no NUL"),
    ];
    let program = sys::Program {
        paths: &[c"/proc/self/exe".to_owned()],
        argv: &argv,
        env: &[],
        descriptors: &[
            their_stdin.as_fd(),
            their_stdout.as_fd(),
            their_stderr.as_fd(),
            theirs.as_fd(),
            file.as_fd(),
        ],
        namespaces,
        terminal: false,
    };
    let (mut pid, mut end) = reaper.expect(|| {
        let sys::Spawned { pid, failure } = sys::spawn(&program)?;
        failure.map_or(Ok(pid), Err)
    })?;
    drop((theirs, their_stdin, their_stdout, their_stderr));
    let mut master = None;
    // It goes on only when it is where it may not use more than it should.
    cgroup
        .add(pid)
        .inspect_err(|_| drop(sys::kill(pid, libc::SIGKILL)))?;
    launch::say(channel.as_fd(), &Word::Ready)?;
    loop {
        match launch::hear(channel.as_fd())? {
            Some(Word::Pid(other)) => (pid, end) = reaper.expect(|| Ok(other))?,
            Some(Word::Terminal(terminal)) => master = Some(terminal),
            Some(Word::Ready) => break,
            Some(Word::Failed(why)) => return Err(Error::Process(why)),
            None => return Err(Error::Process("it ended before it was ready".into())),
        }
    }
    let (stdin, stdout, stderr) = match master {
        None => {
            let streams: [OwnedFd; 3] = [stdin.into(), stdout.into(), stderr.into()];
            let [stdin, stdout, stderr] = streams.map(File::from);
            (stdin, stdout, Some(stderr))
        }
        Some(master) => {
            let master = File::from(master);
            (master.try_clone()?, master, None)
        }
    };
    Ok(Process {
        pid,
        end,
        waiting: Mutex::new(Some(channel)),
        stdin: Mutex::new(Some(stdin)),
        stdout: Some(stdout),
        stderr,
        terminal,
    })
}
