//! A process of a container and the agent's ends of its streams.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Error;
use super::launch::{self, Word};
use crate::reaper::End;
use crate::sys::{self, pid_t};

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: pid_t,
    /// A pidfd of it: its number may be another's once it has ended.
    handle: OwnedFd,
    pub(crate) end: Arc<End>,
    /// The agent's end of the channel by which the process is told to go on; none once it is.
    waiting: Mutex<Option<OwnedFd>>,
    streams: Streams,
}

/// The agent's ends of the streams. None of them blocks: a thread that waits for one waits for the
/// process's end, too.
#[derive(Debug)]
pub(super) struct Streams {
    /// The end of standard input; none once it is closed.
    stdin: Mutex<Option<Arc<File>>>,
    /// A lock that is held while something is written.
    writing: Mutex<()>,
    stdout: File,
    /// The end of standard error; none where a terminal carries both.
    stderr: Option<File>,
}

impl Streams {
    pub(super) fn pipes(
        stdin: PipeWriter,
        stdout: PipeReader,
        stderr: PipeReader,
    ) -> io::Result<Self> {
        let stdin = File::from(OwnedFd::from(stdin));
        let [stdout, stderr] = [stdout, stderr].map(|pipe| File::from(OwnedFd::from(pipe)));
        Self::new(stdin, stdout, Some(stderr))
    }

    pub(super) fn terminal(master: OwnedFd) -> io::Result<Self> {
        let master = File::from(master);
        Self::new(master.try_clone()?, master, None)
    }

    fn new(stdin: File, stdout: File, stderr: Option<File>) -> io::Result<Self> {
        for stream in [Some(&stdin), Some(&stdout), stderr.as_ref()]
            .into_iter()
            .flatten()
        {
            sys::set_nonblocking(stream.as_fd())?;
        }
        Ok(Self {
            stdin: Mutex::new(Some(Arc::new(stdin))),
            writing: Mutex::default(),
            stdout,
            stderr,
        })
    }

    fn stdin(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.stdin.lock().expect("a panic ends the process")
    }
}

impl Process {
    pub(super) fn new(
        (pid, handle): (pid_t, OwnedFd),
        end: Arc<End>,
        channel: OwnedFd,
        streams: Streams,
    ) -> Self {
        Self {
            pid,
            handle,
            end,
            waiting: Mutex::new(Some(channel)),
            streams,
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.waiting.lock().expect("a panic ends the process")
    }

    /// Lets the process become its program.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        let channel = self.waiting().take();
        let Some(channel) = channel else {
            return Err(Error::Process("it has been started already".into()));
        };
        launch::say(channel.as_fd(), &Word::Ready)?;
        // Silence is success: it has become its program.
        match launch::hear(channel.as_fd())? {
            Some(Word::Failed(why)) => Err(Error::Process(why)),
            _ => Ok(()),
        }
    }

    /// Whether the process still waits to be told to go on.
    pub(crate) fn waits(&self) -> bool {
        self.waiting().is_some()
    }

    pub(super) fn handle(&self) -> &OwnedFd {
        &self.handle
    }

    /// Opens a file of its own below /proc.
    pub(super) fn open(&self, name: &str) -> io::Result<File> {
        let file = File::open(format!("/proc/{}/{name}", self.pid))?;
        // It was its own if its number still is.
        match sys::signal(self.handle.as_fd(), 0)? {
            true => Ok(file),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Sends it a signal, which one that has ended does not mind.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        sys::signal(self.handle.as_fd(), signal).map(drop)
    }

    /// Whether it catches or ignores this signal of its own will. Of one that has ended nothing is
    /// known.
    pub(crate) fn minds(&self, signal: i32) -> bool {
        let status = self.open("status").and_then(io::read_to_string);
        status.is_ok_and(|status| minded(&status, signal))
    }

    /// Waits for output, of standard error if `error`. An empty answer is the end: no process can
    /// write any more, or this process has ended and what it wrote has been read. Its children may
    /// live on with its streams. Nothing is taken once `caller` hangs up: the next caller is to
    /// have it.
    pub(crate) fn read(&self, error: bool, len: usize, caller: BorrowedFd<'_>) -> Vec<u8> {
        let mut data = Vec::new();
        let stream = match error {
            true => self.streams.stderr.as_ref(),
            false => Some(&self.streams.stdout),
        };
        let Some(stream) = stream else {
            return data;
        };
        loop {
            // Asked first: what it wrote before it ended is there once its end is known.
            let ended = self.end.is_known();
            match sys::read(stream.as_fd(), &mut data, len.max(1)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ended => {
                    if self.wait_for(stream.as_fd(), sys::POLLIN, Some(caller)) {
                        return data;
                    }
                }
                // A terminal that no process has open says EIO, which is an end like others.
                _ => return data,
            }
        }
    }

    /// Gives it input; nothing ends that.
    pub(crate) fn write(&self, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            *self.streams.stdin() = None;
            return Ok(());
        }
        let stdin = self.streams.stdin().clone();
        let stdin = stdin.ok_or(io::ErrorKind::BrokenPipe)?;
        let _turn = self
            .streams
            .writing
            .lock()
            .expect("a panic ends the process");
        let mut rest = data;
        while !rest.is_empty() {
            match (&*stdin).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.end.is_known() {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                    self.wait_for(stdin.as_fd(), sys::POLLOUT, None);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until `stream` is ready or the process has ended, or `caller` hangs up, which it tells.
    fn wait_for(
        &self,
        stream: BorrowedFd<'_>,
        events: libc::c_short,
        caller: Option<BorrowedFd<'_>>,
    ) -> bool {
        let fd = |fd: Option<BorrowedFd<'_>>, events| sys::pollfd {
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
            events,
            revents: 0,
        };
        let mut fds = [
            fd(Some(stream), events),
            fd(Some(self.end.event()), sys::POLLIN),
            fd(caller, 0),
        ];
        // If it cannot wait it looks again.
        let _ = sys::poll(&mut fds, None);
        fds[2].revents != 0
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        match self.streams.stderr {
            None => Ok(rustix::termios::tcsetwinsize(&self.streams.stdout, size)?),
            Some(_) => Err(io::Error::other("it has no terminal")),
        }
    }
}

/// Whether the text of /proc/PID/status says that the signal is caught or ignored.
fn minded(status: &str, signal: i32) -> bool {
    let bit = u32::try_from(signal)
        .ok()
        .and_then(|signal| signal.checked_sub(1));
    let bit = bit.and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0);
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let masks = lines.filter(|(key, _)| matches!(*key, "SigCgt" | "SigIgn"));
    let mut masks = masks.filter_map(|(_, mask)| u64::from_str_radix(mask.trim(), 16).ok());
    masks.any(|mask| mask & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    /// A process with the other ends of its streams.
    fn process() -> (Process, PipeReader, PipeWriter, PipeWriter) {
        let (stdin, ours) = io::pipe().unwrap();
        let (out, stdout) = io::pipe().unwrap();
        let (err, stderr) = io::pipe().unwrap();
        let streams = Streams::pipes(ours, out, err).unwrap();
        let (channel, _) = io::pipe().unwrap();
        let end = Arc::new(End::new().unwrap());
        let (handle, _) = io::pipe().unwrap();
        let process = Process::new((1, handle.into()), end, channel.into(), streams);
        (process, stdin, stdout, stderr)
    }

    #[test]
    fn a_caller_that_is_gone_takes_no_output() {
        let (process, _stdin, mut stdout, _stderr) = process();
        let (caller, presence) = io::pipe().unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| process.read(false, 9, caller.as_fd()));
            thread::sleep(Duration::from_millis(20));
            drop(presence);
            assert_eq!(reader.join().unwrap(), b"");
        });
        stdout.write_all(b"for others").unwrap();
        let (caller, _presence) = io::pipe().unwrap();
        assert_eq!(process.read(false, 99, caller.as_fd()), b"for others");
    }

    #[test]
    fn output_ends_with_the_process_though_others_hold_the_pipe() {
        let (process, _stdin, mut stdout, _stderr) = process();
        let (caller, _presence) = io::pipe().unwrap();
        let caller = caller.as_fd();
        stdout.write_all(b"last words").unwrap();
        thread::scope(|scope| {
            // Two wait where nothing comes.
            let waiting = [(); 2].map(|()| scope.spawn(|| process.read(true, 9, caller)));
            thread::sleep(Duration::from_millis(20));
            process.end.tell(3);
            for reader in waiting {
                assert_eq!(reader.join().unwrap(), b"");
            }
        });
        assert_eq!(process.read(false, 4, caller), b"last");
        assert_eq!(process.read(false, 99, caller), b" words");
        assert_eq!(process.read(false, 99, caller), b"");
        assert_eq!([process.end.wait(), process.end.wait()], [3, 3]);
    }

    #[test]
    fn input_that_is_not_read_holds_up_no_other_caller() {
        let (process, _stdin, _stdout, _stderr) = process();
        let process = Arc::new(process);
        let (done, written) = channel();
        let writer = Arc::clone(&process);
        thread::spawn(move || done.send(writer.write(&vec![0; 1 << 20])));
        assert!(written.recv_timeout(Duration::from_millis(50)).is_err());
        process.write(b"").unwrap();
        process.write(b"more").unwrap_err();
        process.end.tell(0);
        let outcome = written.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_is_minded_is_told_by_a_signals_bit() {
        let status = "SigBlk:\tffffffffffffffff\nSigIgn:\t0000000000000002\n\
             SigCgt:\t8000000000004001\nSeccomp:\t0\n";
        let minded = [1, 2, 3, 15, 64, 65, 0, -1, i32::MIN].map(|signal| minded(status, signal));
        assert_eq!(
            minded,
            [true, true, false, true, true, false, false, false, false]
        );
    }

    proptest! {
        #[test]
        fn any_text_tells_or_does_not(text in "(SigCgt:|\\PC|\t|\n){0,9}", signal: i32) {
            let _ = minded(&text, signal);
        }
    }
}
