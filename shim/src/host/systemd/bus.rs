//! A connection to systemd's manager: over the system's bus, or where none runs over systemd's own
//! socket, which speaks the same. All that is asked over one connection has one deadline together.
//!
//! This is not a crate's work since a few calls are all there is: zbus made the shim 0.67 MiB larger
//! and needs a thread to run in, and rustbus waits without end while it is greeted.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::wire::{Argument, Call, ERROR, FIXED_LEN, Malformed, Message, REPLY, SIGNAL, rest_len};

const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
const SYSTEMD: &str = "/run/systemd/private";
/// Longest answer to the greeting, in bytes.
const MAX_GREETING_LEN: usize = 1024;

const BUS: Peer = Peer {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
};
const MANAGER: Peer = Peer {
    destination: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
};
const JOB_REMOVED: &str = "JobRemoved";

/// Why systemd did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("connect to systemd by {}", .path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("systemd by {}: it does not know this process: {answer:?}", .path.display())]
    Greeting { path: PathBuf, answer: String },
    #[error("systemd: {act}")]
    Io { act: String, source: io::Error },
    #[error("systemd: {act}")]
    Malformed { act: String, source: Malformed },
    #[error("systemd refuses {act}: {why} ({name})")]
    Refused {
        act: String,
        name: String,
        why: String,
    },
    #[error("systemd: {act} ends with {result:?}")]
    Job { act: String, result: String },
}

impl Error {
    /// Whether systemd refused with the error `name`, of systemd's own.
    pub(super) fn is(&self, name: &str) -> bool {
        let Self::Refused { name: given, .. } = self else {
            return false;
        };
        given.strip_prefix("org.freedesktop.systemd1.") == Some(name)
    }
}

/// Who is called.
#[derive(Clone, Copy)]
struct Peer {
    destination: &'static str,
    path: &'static str,
    interface: &'static str,
}

/// A job of systemd's, by its path.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Job(String);

/// The connection.
#[derive(Debug)]
pub(super) struct Manager {
    stream: UnixStream,
    deadline: Instant,
    serial: u32,
    /// Jobs that have ended, each with its result. Their end may be told before they are asked for.
    ended: Vec<(Job, String)>,
}

impl Manager {
    /// Connects to it. All that is asked over the connection has to be done after `patience`.
    pub(super) fn connect(patience: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + patience;
        match Self::open(Path::new(SYSTEM_BUS), deadline) {
            Ok(mut bus) => {
                bus.call_peer(BUS, "Hello", &[])?;
                let rule = format!("type='signal',sender='{}'", MANAGER.destination);
                let rule = format!(
                    "{rule},interface='{}',member='{JOB_REMOVED}'",
                    MANAGER.interface
                );
                bus.call_peer(BUS, "AddMatch", &[Argument::Text(&rule)])?;
                bus.subscribed()
            }
            Err(Error::Connect { .. }) => Self::open(Path::new(SYSTEMD), deadline)?.subscribed(),
            Err(error) => Err(error),
        }
    }

    /// Has systemd tell of jobs that end.
    fn subscribed(mut self) -> Result<Self, Error> {
        self.call("Subscribe", &[])?;
        Ok(self)
    }

    fn open(path: &Path, deadline: Instant) -> Result<Self, Error> {
        let stream = connected(path, deadline).map_err(|source| Error::Connect {
            path: path.into(),
            source,
        })?;
        let mut manager = Self {
            stream,
            deadline,
            serial: 0,
            ended: Vec::new(),
        };
        let answer = manager.greet().map_err(|source| Error::Io {
            act: "greet it".into(),
            source,
        })?;
        if answer.starts_with("OK ") {
            return Ok(manager);
        }
        Err(Error::Greeting {
            path: path.into(),
            answer,
        })
    }

    /// Says who this process is, which the socket says as well ("Authentication Protocol"). All of it is
    /// sent at once, as systemd's own clients do: a first call that comes together with BEGIN lies in
    /// systemd's buffer until something else comes.
    fn greet(&mut self) -> io::Result<String> {
        let user = rustix::process::geteuid().as_raw().to_string();
        let hex: String = user.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.write(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            if answer.len() == MAX_GREETING_LEN {
                return Err(io::Error::other("its answer does not end"));
            }
            // What follows is a message's, so no byte more may be read.
            let mut byte = [0];
            self.read(&mut byte)?;
            answer.extend(byte);
        }
        Ok(String::from_utf8_lossy(answer.trim_ascii_end()).into_owned())
    }

    /// Calls a method of the manager's.
    pub(super) fn call(
        &mut self,
        method: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Message, Error> {
        self.call_peer(MANAGER, method, arguments)
    }

    /// Calls a method of the manager's that is answered with a job.
    pub(super) fn job(&mut self, method: &str, arguments: &[Argument<'_>]) -> Result<Job, Error> {
        let answer = self.call(method, arguments)?;
        let [path] = answer.texts().map_err(|source| Error::Malformed {
            act: method.into(),
            source,
        })?;
        Ok(Job(path))
    }

    fn call_peer(
        &mut self,
        peer: Peer,
        method: &str,
        arguments: &[Argument<'_>],
    ) -> Result<Message, Error> {
        self.serial += 1;
        let serial = self.serial;
        let call = Call {
            destination: peer.destination,
            path: peer.path,
            interface: peer.interface,
            method,
            arguments,
        };
        let act = || method.to_owned();
        self.write(&call.encode(serial))
            .map_err(|source| Error::Io { act: act(), source })?;
        loop {
            let message = self.next(method)?;
            if message.reply_serial != serial {
                continue;
            }
            match message.kind {
                REPLY => return Ok(message),
                ERROR => {
                    let [why] = message.texts().unwrap_or_default();
                    let (act, name) = (act(), message.error_name);
                    return Err(Error::Refused { act, name, why });
                }
                _ => {}
            }
        }
    }

    /// Waits for the end of a job, which has to be what was asked for.
    pub(super) fn finish(&mut self, act: &str, job: &Job) -> Result<(), Error> {
        loop {
            if let Some(at) = self.ended.iter().position(|(ended, _)| ended == job) {
                let (_, result) = self.ended.swap_remove(at);
                if result == "done" {
                    return Ok(());
                }
                let act = act.into();
                return Err(Error::Job { act, result });
            }
            self.next(act)?;
        }
    }

    /// The next message. What it says of a job's end is kept.
    fn next(&mut self, act: &str) -> Result<Message, Error> {
        let bytes = self.next_bytes();
        let bytes = bytes.map_err(|source| Error::Io {
            act: act.into(),
            source,
        })?;
        let malformed = |source| Error::Malformed {
            act: act.into(),
            source,
        };
        let message = Message::decode(&bytes).map_err(malformed)?;
        if message.kind == SIGNAL && message.member == JOB_REMOVED {
            let [_, job, _, result] = message.texts().map_err(malformed)?;
            self.ended.push((Job(job), result));
        }
        Ok(message)
    }

    fn next_bytes(&mut self) -> io::Result<Vec<u8>> {
        let mut fixed = [0; FIXED_LEN];
        self.read(&mut fixed)?;
        let rest = rest_len(&fixed).map_err(io::Error::other)?;
        let mut bytes = fixed.to_vec();
        bytes.resize(FIXED_LEN + rest, 0);
        self.read(&mut bytes[FIXED_LEN..])?;
        Ok(bytes)
    }

    fn read(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(left(self.deadline)?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::Error::other("the connection was closed")),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) => retry(error)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(left(self.deadline)?))?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) => retry(error)?,
            }
        }
        Ok(())
    }
}

/// What an interrupted or late call leads to: another look at the deadline.
fn retry(error: io::Error) -> io::Result<()> {
    use io::ErrorKind::{Interrupted, WouldBlock};
    match error.kind() {
        Interrupted | WouldBlock => Ok(()),
        _ => Err(error),
    }
}

/// How much time there is until `deadline`.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // No time is no timeout to the kernel.
    if left < Duration::from_millis(1) {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "no answer in the time there is",
        ));
    }
    Ok(left)
}

/// A connection, for which a listener with a full queue is not waited for longer than that.
fn connected(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let kind = SocketType::STREAM;
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(left(deadline)?))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    use tempfile::TempDir;

    use super::super::wire::answer;
    use super::*;

    const MEMBER: u8 = 3;
    const ERROR_NAME: u8 = 4;

    /// A systemd that greets, and answers the first call with these messages.
    fn systemd(
        greeting: &'static [u8],
        answers: Vec<Vec<u8>>,
    ) -> (TempDir, PathBuf, JoinHandle<()>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert!(line.starts_with("\0AUTH EXTERNAL 3"), "{line:?}");
            // Before it is answered, so that no call can come together with it.
            line.clear();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "BEGIN\r\n");
            stream.write_all(greeting).unwrap();
            answers.iter().for_each(|it| stream.write_all(it).unwrap());
            // Until the other end is closed.
            let _ = io::copy(&mut reader, &mut io::sink());
        };
        (folder, path, thread::spawn(serve))
    }

    fn open(path: &Path, patience: Duration) -> Result<Manager, Error> {
        Manager::open(path, Instant::now() + patience)
    }

    #[test]
    fn a_job_is_waited_for_though_its_end_comes_before_the_answer() {
        let removed = ["1", "/job/1", "a.scope", "done"];
        let other = ["1", "/job/2", "a.scope", "failed"];
        let answers = vec![
            answer(SIGNAL, 0, (MEMBER, JOB_REMOVED), &removed),
            answer(SIGNAL, 0, (MEMBER, JOB_REMOVED), &other),
            answer(REPLY, 1, (MEMBER, ""), &["/job/1"]),
        ];
        let (_folder, path, server) = systemd(b"OK 1234\r\n", answers);
        let mut manager = open(&path, Duration::from_secs(10)).unwrap();
        let job = manager
            .job("StopUnit", &[Argument::Text("a.scope")])
            .unwrap();
        manager.finish("stop a.scope", &job).unwrap();
        let failed = manager.finish("stop a.scope", &Job("/job/2".into()));
        assert_eq!(
            failed.unwrap_err().to_string(),
            "systemd: stop a.scope ends with \"failed\""
        );
        drop(manager);
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_says_what_and_why() {
        let name = "org.freedesktop.systemd1.NoSuchUnit";
        let answers = vec![answer(ERROR, 1, (ERROR_NAME, name), &["not loaded"])];
        let (_folder, path, server) = systemd(b"OK 1234\r\n", answers);
        let mut manager = open(&path, Duration::from_secs(10)).unwrap();
        let error = manager.call("StopUnit", &[]).unwrap_err();
        assert!(error.is("NoSuchUnit") && !error.is("UnitExists"));
        assert_eq!(
            error.to_string(),
            format!("systemd refuses StopUnit: not loaded ({name})")
        );
        drop(manager);
        server.join().unwrap();
    }

    #[test]
    fn a_systemd_that_says_nothing_is_not_waited_for_for_ever() {
        let (_folder, path, server) = systemd(b"OK 1234\r\n", Vec::new());
        let mut manager = open(&path, Duration::from_millis(200)).unwrap();
        let since = Instant::now();
        let error = manager.call("Subscribe", &[]).unwrap_err();
        assert!(since.elapsed() < Duration::from_secs(5));
        assert_eq!(
            api::chain(&error).join(": "),
            "systemd: Subscribe: no answer in the time there is"
        );
        drop(manager);
        server.join().unwrap();
    }

    #[test]
    fn a_stranger_is_not_asked() {
        let (_folder, path, server) = systemd(b"REJECTED EXTERNAL\r\n", Vec::new());
        let error = open(&path, Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("REJECTED EXTERNAL"), "{error}");
        server.join().unwrap();
        let error = open(&path.with_file_name("other"), Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error}");
    }
}
