//! Carries the command's streams between it and the host until it ends, and reaps every process
//! that becomes an orphan meanwhile.
//!
//! One thread, one poll. Each stream is read only when what was read before has gone out, so a
//! side that does not take its bytes stops only the side that sends them.
//!
//! Bytes are read and written rather than spliced: the console driver's splice takes bytes off the
//! pipe before it knows whether its ring has room for so many buffers, and drops them if not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use crate::clock::Follower;
use crate::sys::{self, POLLERR, POLLHUP, POLLIN, POLLOUT, Waited, pid_t, pollfd};

/// What the console driver sends at once at most.
const CHUNK: usize = 32 * 1024;

/// How long killed processes may take to be gone; one in a stuck system call never is.
const DEATH_DEADLINE: Duration = Duration::from_secs(2);

/// One direction of one stream.
#[derive(Debug)]
pub(crate) struct Pump {
    from: OwnedFd,
    to: OwnedFd,
    state: State,
    buffer: Vec<u8>,
    /// Sent after the last byte.
    farewell: &'static [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The buffer is empty.
    Receiving,
    /// The buffer's bytes from here on are still to go out.
    Sending { start: usize, last: bool },
    /// There is nothing more to carry: one side has ended.
    Ended,
}

impl Pump {
    /// Carries bytes from one to the other, which must not block.
    pub(crate) fn new(from: impl Into<OwnedFd>, to: impl Into<OwnedFd>) -> Self {
        Self {
            from: from.into(),
            to: to.into(),
            state: State::Receiving,
            buffer: Vec::new(),
            farewell: b"",
        }
    }

    /// Says goodbye in these bytes: a terminal does not end, but its reader may be told.
    pub(crate) fn with_farewell(self, farewell: &'static [u8]) -> Self {
        Self { farewell, ..self }
    }

    fn interest(&self) -> pollfd {
        let (fd, events): (RawFd, _) = match self.state {
            State::Receiving => (self.from.as_raw_fd(), POLLIN),
            State::Sending { .. } => (self.to.as_raw_fd(), POLLOUT),
            State::Ended => (-1, 0),
        };
        pollfd {
            fd,
            events,
            revents: 0,
        }
    }

    /// Does what can be done after poll has told this of [`interest`](Self::interest).
    fn advance(&mut self, revents: i16) {
        match self.state {
            State::Receiving if revents & POLLIN != 0 => self.receive(),
            State::Receiving if revents & (POLLHUP | POLLERR) != 0 => self.say_goodbye(),
            State::Sending { .. } if revents & POLLOUT != 0 => self.send(),
            State::Sending { .. } if revents & (POLLHUP | POLLERR) != 0 => {
                self.state = State::Ended;
            }
            State::Receiving | State::Sending { .. } | State::Ended => (),
        }
    }

    fn receive(&mut self) {
        self.buffer.clear();
        match sys::read(self.from.as_fd(), &mut self.buffer, CHUNK) {
            Ok(0) => self.say_goodbye(),
            Ok(_) => {
                self.state = State::Sending {
                    start: 0,
                    last: false,
                };
                self.send();
            }
            Err(error) if is_for_later(&error) => (),
            // Reading a terminal that no process has open any more gives an error.
            Err(_) => self.say_goodbye(),
        }
    }

    fn say_goodbye(&mut self) {
        self.buffer.clear();
        self.buffer.extend(self.farewell);
        self.state = State::Sending {
            start: 0,
            last: true,
        };
        self.send();
    }

    fn send(&mut self) {
        let State::Sending { mut start, last } = self.state else {
            return;
        };
        while start < self.buffer.len() {
            match sys::write(self.to.as_fd(), &self.buffer[start..]) {
                Ok(count) => start += count,
                Err(error) if is_for_later(&error) => {
                    self.state = State::Sending { start, last };
                    return;
                }
                Err(_) => {
                    self.state = State::Ended;
                    return;
                }
            }
        }
        self.state = if last { State::Ended } else { State::Receiving };
    }

    /// Carries what is there already, and does not wait for more; waits for the receiver.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            let timeout = match self.state {
                State::Receiving => Some(Duration::ZERO),
                State::Sending { .. } => None,
                State::Ended => return Ok(()),
            };
            let mut fds = [self.interest()];
            if sys::poll(&mut fds, timeout)? == 0 {
                return Ok(());
            }
            self.advance(fds[0].revents);
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// All processes below this one. Makes SIGCHLD readable, so to be made before the first child.
#[derive(Debug)]
pub(crate) struct Children {
    signals: OwnedFd,
}

/// How the main process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ending {
    status: u8,
    /// Whether other processes outlive the main one.
    survivors: bool,
}

impl Children {
    pub(crate) fn watch() -> io::Result<Self> {
        Ok(Self {
            signals: sys::child_signals()?,
        })
    }

    /// Carries all streams until the process `main` ends; then kills what it left behind, as the
    /// end of PID 1 does in a container, and carries what of the output is still under way.
    ///
    /// When `button` has something to read, `main` is asked to end, by SIGTERM.
    pub(crate) fn relay(
        &self,
        main: pid_t,
        button: Option<BorrowedFd<'_>>,
        input: Option<Pump>,
        mut output: Vec<Pump>,
    ) -> io::Result<u8> {
        let ending = self.relay_until_exit(main, button, input, &mut output)?;
        if ending.survivors && sys::kill_all() {
            self.bury()?;
        }
        output.iter_mut().try_for_each(Pump::drain)?;
        Ok(ending.status)
    }

    fn relay_until_exit(
        &self,
        main: pid_t,
        mut button: Option<BorrowedFd<'_>>,
        mut input: Option<Pump>,
        output: &mut Vec<Pump>,
    ) -> io::Result<Ending> {
        let mut fds = Vec::with_capacity(5);
        let mut clock = Follower::new();
        loop {
            let readable = |fd| pollfd {
                fd,
                events: POLLIN,
                revents: 0,
            };
            fds.clear();
            fds.push(readable(self.signals.as_raw_fd()));
            // Descriptor -1 is passed over.
            fds.push(readable(button.map_or(-1, |button| button.as_raw_fd())));
            fds.extend(output.iter().chain(&input).map(Pump::interest));
            sys::poll(&mut fds, clock.turn())?;
            if let (Some(fd), true) = (button, fds[1].revents != 0) {
                match sys::read(fd, &mut Vec::new(), CHUNK) {
                    Ok(0) => button = None,
                    Ok(_) => sys::terminate(main),
                    Err(error) if is_for_later(&error) => (),
                    Err(_) => button = None,
                }
            }
            for (pump, fd) in output.iter_mut().chain(&mut input).zip(&fds[2..]) {
                pump.advance(fd.revents);
            }
            // An ended stream is closed at once: that is how the other side learns of it.
            input = input.filter(|pump| pump.state != State::Ended);
            output.retain(|pump| pump.state != State::Ended);
            if fds[0].revents != 0
                && let Some(ending) = self.reap(main)?
            {
                return Ok(ending);
            }
        }
    }

    /// Reaps every process that has ended, and tells when `main` is among them.
    fn reap(&self, main: pid_t) -> io::Result<Option<Ending>> {
        self.forget_signals()?;
        let mut main_status = None;
        loop {
            let survivors = match sys::wait_any()? {
                Waited::Ended(pid, status) => {
                    if pid == main {
                        main_status = Some(status);
                    }
                    continue;
                }
                Waited::Alive => true,
                Waited::Childless => false,
            };
            return Ok(main_status.map(|status| Ending { status, survivors }));
        }
    }

    /// Reaps what has been killed, until nothing is left or the deadline has passed.
    fn bury(&self) -> io::Result<()> {
        let start = Instant::now();
        loop {
            self.forget_signals()?;
            match sys::wait_any()? {
                Waited::Ended(..) => (),
                Waited::Childless => return Ok(()),
                Waited::Alive => {
                    let left = DEATH_DEADLINE.saturating_sub(start.elapsed());
                    let fd = self.signals.as_raw_fd();
                    let mut fds = [pollfd {
                        fd,
                        events: POLLIN,
                        revents: 0,
                    }];
                    if sys::poll(&mut fds, Some(left))? == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Takes what is pending, so that poll tells of the next one.
    fn forget_signals(&self) -> io::Result<()> {
        match sys::read(self.signals.as_fd(), &mut Vec::new(), 128) {
            Err(error) if !is_for_later(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::sync::MutexGuard;
    use std::thread;

    use super::*;
    use crate::command::{Command, Size, Streams};

    /// SIGCHLD goes to any thread that does not block it, so it is blocked before there are any.
    #[used]
    #[unsafe(link_section = ".init_array")]
    static BLOCK_SIGNALS: extern "C" fn() = {
        extern "C" fn block() {
            drop(sys::child_signals());
        }
        block
    };

    fn children() -> (Children, MutexGuard<'static, ()>) {
        let turn = sys::turn_with_children();
        (Children::watch().unwrap(), turn)
    }

    fn command(arguments: &[&str]) -> Command {
        let argv = arguments
            .iter()
            .map(|argument| CString::new(*argument).unwrap());
        Command::new(argv.collect())
    }

    fn shell(script: &str) -> Command {
        command(&["/bin/sh", "-c", script])
    }

    /// A port to the host, which reads it, and which does not block.
    fn port_to_host() -> (PipeReader, PipeWriter) {
        let (host, guest) = io::pipe().unwrap();
        sys::set_nonblocking(guest.as_fd()).unwrap();
        (host, guest)
    }

    /// What the host has of the command in the end.
    #[derive(Debug, PartialEq, Eq)]
    struct Outcome {
        status: u8,
        stdout: String,
        stderr: String,
    }

    fn outcome(status: u8, stdout: &str, stderr: &str) -> Outcome {
        Outcome {
            status,
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
        }
    }

    fn read_all(mut port: PipeReader) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            port.read_to_string(&mut text).unwrap();
            text
        })
    }

    /// Runs it with pipes, and the bytes as its whole input.
    fn run(command: &Command, input: &'static [u8]) -> Outcome {
        let (children, _turn) = children();
        let (guest_stdin, mut host_stdin) = io::pipe().unwrap();
        let (host_stdout, guest_stdout) = port_to_host();
        let (host_stderr, guest_stderr) = port_to_host();
        // A command that does not read makes this fail, as it should.
        let writer = thread::spawn(move || drop(host_stdin.write_all(input)));
        let (stdout, stderr) = (read_all(host_stdout), read_all(host_stderr));
        let (pid, streams) = command.start(None).unwrap();
        let Streams::Pipes {
            stdin,
            stdout: from,
            stderr: from_stderr,
        } = streams
        else {
            panic!("no terminal was asked for");
        };
        let output = vec![
            Pump::new(from, guest_stdout),
            Pump::new(from_stderr, guest_stderr),
        ];
        let status = children
            .relay(pid, None, Some(Pump::new(guest_stdin, stdin)), output)
            .unwrap();
        writer.join().unwrap();
        Outcome {
            status,
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
        }
    }

    #[test]
    fn output_and_status_arrive_apart() {
        let outcome_of = run(&shell("echo out; echo err >&2; exit 7"), b"");
        assert_eq!(outcome_of, outcome(7, "out\n", "err\n"));
    }

    #[test]
    fn the_end_of_the_input_arrives() {
        assert_eq!(
            run(&command(&["cat"]), b"first\nlast"),
            outcome(0, "first\nlast", "")
        );
    }

    #[test]
    fn a_command_need_not_read_its_input() {
        const MUCH: &[u8] = &[b'x'; 1 << 20];
        assert_eq!(run(&shell("exit 3"), MUCH), outcome(3, "", ""));
    }

    #[test]
    fn more_than_every_buffer_holds_arrives_whole() {
        const MUCH: &[u8] = &[b'x'; 3 << 20];
        let outcome = run(&command(&["cat"]), MUCH);
        assert_eq!((outcome.status, outcome.stdout.len()), (0, MUCH.len()));
    }

    #[test]
    fn a_command_that_does_not_read_may_still_write() {
        const MUCH: &[u8] = &[b'x'; 1 << 20];
        let outcome = run(&command(&["head", "-c", "1000000", "/dev/zero"]), MUCH);
        assert_eq!((outcome.status, outcome.stdout.len()), (0, 1_000_000));
    }

    #[test]
    fn output_under_way_at_the_end_arrives_before_the_status() {
        // More than the port takes at once, and no more than that, the agent and a pipe hold: the
        // command ends before anything is read.
        const BYTES: usize = 120_000;
        let (children, _turn) = children();
        let (mut host, guest) = port_to_host();
        let script = format!("head -c {BYTES} /dev/zero");
        let (pid, streams) = shell(&script).start(None).unwrap();
        let Streams::Pipes { stdout, .. } = streams else {
            panic!("no terminal was asked for")
        };
        let reader = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        let status = children
            .relay(pid, None, None, vec![Pump::new(stdout, guest)])
            .unwrap();
        assert_eq!((status, reader.join().unwrap().unwrap()), (0, BYTES));
    }

    #[test]
    fn a_command_killed_by_a_signal_tells_which() {
        assert_eq!(run(&shell("kill -KILL $$"), b""), outcome(137, "", ""));
    }

    #[test]
    fn a_command_that_is_not_there_ends_with_127() {
        let expected = outcome(127, "", "podvmm: no-such-command: command not found\n");
        assert_eq!(run(&command(&["no-such-command"]), b""), expected);
    }

    #[test]
    fn a_command_that_may_not_be_run_ends_with_126() {
        let expected = outcome(126, "", "podvmm: /etc: permission denied\n");
        assert_eq!(run(&command(&["/etc"]), b""), expected);
    }

    #[test]
    fn a_child_left_behind_does_not_hold_the_end_up() {
        let start = Instant::now();
        let outcome_of = run(&shell("sleep 20 & echo started"), b"");
        assert_eq!(outcome_of, outcome(0, "started\n", ""));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn standard_output_may_be_opened_again() {
        let outcome_of = run(
            &shell("echo one > /dev/stdout; echo two > /proc/self/fd/1"),
            b"",
        );
        assert_eq!(outcome_of, outcome(0, "one\ntwo\n", ""));
    }

    #[test]
    fn no_signal_stays_blocked_for_the_command() {
        let outcome_of = run(&command(&["grep", "SigBlk", "/proc/self/status"]), b"");
        assert_eq!(outcome_of, outcome(0, "SigBlk:\t0000000000000000\n", ""));
    }

    #[test]
    fn the_command_leads_a_session() {
        let script = "read _ _ _ _ pgrp session rest < /proc/self/stat; test $$ = $session";
        assert_eq!(run(&shell(script), b""), outcome(0, "", ""));
    }

    #[test]
    fn a_host_that_stops_reading_stops_the_command() {
        let (children, _turn) = children();
        let (host, guest) = port_to_host();
        drop(host);
        let (pid, streams) = shell("while echo y 2>&-; do :; done").start(None).unwrap();
        let Streams::Pipes { stdout, .. } = streams else {
            panic!("no terminal was asked for")
        };
        let status = children
            .relay(pid, None, None, vec![Pump::new(stdout, guest)])
            .unwrap();
        assert_ne!(status, 126);
    }

    #[test]
    fn the_command_is_asked_to_end_when_the_button_is_pressed() {
        let (children, _turn) = children();
        let (mut host, guest) = port_to_host();
        let (button, mut press) = io::pipe().unwrap();
        sys::set_nonblocking(button.as_fd()).unwrap();
        let command = shell("trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.1; done");
        let (pid, streams) = command.start(None).unwrap();
        let Streams::Pipes { stdin, stdout, .. } = streams else {
            panic!("no terminal was asked for");
        };
        drop(stdin);
        let pressing = thread::spawn(move || {
            let mut up = [0; 3];
            host.read_exact(&mut up).unwrap();
            press.write_all(b"power\n").unwrap();
            drop(press);
            let mut rest = String::new();
            host.read_to_string(&mut rest).unwrap();
            rest
        });
        let output = vec![Pump::new(stdout, guest)];
        let status = children.relay(pid, Some(button.as_fd()), None, output);
        assert_eq!(status.unwrap(), 3);
        assert_eq!(pressing.join().unwrap(), "asked\n");
    }

    #[test]
    fn a_terminal_has_its_size_and_is_the_controlling_one() {
        let (children, _turn) = children();
        let (host, guest) = port_to_host();
        let (guest_stdin, mut host_stdin) = io::pipe().unwrap();
        host_stdin.write_all(b"word\n").unwrap();
        drop(host_stdin);
        let script = "stty -echo; stty size; read word; echo got $word > /dev/tty; cat; exit 5";
        let size = Size::parse("33 101");
        let (pid, streams) = shell(script).start(size).unwrap();
        let Streams::Terminal(terminal) = streams else {
            panic!("a terminal was asked for")
        };
        let input = Pump::new(guest_stdin, terminal.try_clone().unwrap()).with_farewell(b"\x04");
        let text = read_all(host);
        let status = children
            .relay(pid, None, Some(input), vec![Pump::new(terminal, guest)])
            .unwrap();
        let text = text.join().unwrap();
        assert_eq!(status, 5, "{text:?}");
        assert!(text.ends_with("33 101\r\ngot word\r\n"), "{text:?}");
    }
}
