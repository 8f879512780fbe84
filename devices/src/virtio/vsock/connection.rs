//! One stream between a port of the guest and a unix socket.
//!
//! Bytes for the guest are read from the socket straight into its buffers, as far as it has given
//! credit. Bytes from the guest go straight to the socket; what the socket does not take waits
//! here, and the credit given to the guest is no more than may wait.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::{GuestRam, Segments, vectored};

/// Bytes the guest may send ahead of what the host's program takes.
pub(super) const WINDOW: u32 = 64 << 10;
/// Most bytes of one packet to the guest.
const MAX_DATA: usize = 64 << 10;
/// The longest line that can be right: `CONNECT 4294967295`.
const MAX_LINE: usize = 32;
/// How long a caller is held while no program in the guest listens on the port it wants.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How soon the guest is asked again, doubling up to the second.
const RETRY: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(320)];

/// The two ports that tell connections apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

#[derive(Debug)]
pub(super) enum State {
    /// A host's program is saying which port it wants.
    Greeting(Vec<u8>),
    /// The guest is to be asked, or is asked, for the port.
    Calling(Call),
    Open,
    /// Both sides are done; the guest is to say so by a reset.
    Closing,
}

/// A caller whom the guest has not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    since: Instant,
    pause: Duration,
    /// When to ask again. None while an answer is due.
    pub(super) again: Option<Instant>,
}

/// What is to be said to the guest, each at most once.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit: bool,
    credit_request: bool,
}

/// What a connection has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Lives,
    /// The connection is to be forgotten, and the guest told by a reset.
    Reset,
    /// The connection is to be forgotten; the guest knows.
    Over,
}

/// One packet to the guest, all but the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of payload that are written already.
    pub(super) len: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) state: State,
    /// What tells the connection from others; `None` until the greeting is over.
    pub(super) key: Option<Key>,
    /// The guest's program called the host's.
    pub(super) by_guest: bool,
    /// Whether it waits for its turn to send to the guest.
    pub(super) queued: bool,
    due: Due,
    /// The socket may have something to read.
    readable: bool,
    /// The socket will never have more.
    host_ended: bool,
    /// The host's program is gone for both directions.
    host_gone: bool,
    /// What the guest was told that the host will not do.
    told_shutdown: u32,
    /// What the guest said that it will not do.
    guest_shutdown: u32,
    /// The host was told that the guest will send no more.
    host_told: bool,
    /// Bytes of the guest's that the socket did not take.
    waiting: VecDeque<u8>,
    /// Bytes the socket took so far.
    forwarded: u32,
    /// Bytes the socket took, as far as the guest was told.
    told_forwarded: u32,
    /// Bytes sent to the guest so far.
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    /// The guest was asked for credit and has given none since.
    asked_credit: bool,
}

impl Connection {
    /// A host's program that has just connected.
    pub(super) fn greeting(stream: UnixStream) -> Self {
        Self::new(stream, State::Greeting(Vec::new()), None)
    }

    /// A guest's program that has reached a host's.
    pub(super) fn accepted(stream: UnixStream, key: Key) -> Self {
        let mut connection = Self::new(stream, State::Open, Some(key));
        connection.due.response = true;
        connection.by_guest = true;
        connection
    }

    fn new(stream: UnixStream, state: State, key: Option<Key>) -> Self {
        Self {
            stream,
            state,
            key,
            by_guest: false,
            queued: false,
            due: Due::default(),
            readable: true,
            host_ended: false,
            host_gone: false,
            told_shutdown: 0,
            guest_shutdown: 0,
            host_told: false,
            waiting: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
            asked_credit: false,
        }
    }

    /// Reads the greeting as far as it has come, and not a byte more. The port, once it is known.
    pub(super) fn greet(&mut self) -> io::Result<Option<u32>> {
        let State::Greeting(line) = &mut self.state else {
            return Ok(None);
        };
        let mut byte = [0];
        while line.len() < MAX_LINE {
            match (&self.stream).read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => return parse_greeting(line).map(Some),
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// The guest is to be asked for the port.
    pub(super) fn call(&mut self, key: Key, now: Instant) {
        self.key = Some(key);
        self.state = State::Calling(Call {
            since: now,
            pause: RETRY[0],
            again: None,
        });
        self.due.request = true;
    }

    /// Asks the guest again if it is time.
    pub(super) fn call_again(&mut self, now: Instant) {
        if let State::Calling(call) = &mut self.state
            && call.again.is_some_and(|again| again <= now)
        {
            call.again = None;
            self.due.request = true;
        }
    }

    /// When the guest is to be asked again, if it is.
    pub(super) fn again(&self) -> Option<Instant> {
        match &self.state {
            State::Calling(call) => call.again,
            State::Greeting(_) | State::Open | State::Closing => None,
        }
    }

    /// The socket is ready for something.
    pub(super) fn ready(&mut self, readable: bool, gone: bool) -> Fate {
        self.readable |= readable;
        self.host_gone |= gone;
        match &self.state {
            // A caller that left does not wait for the guest.
            State::Calling(_) if self.host_gone => Fate::Reset,
            State::Open => self.flush(),
            State::Greeting(_) | State::Calling(_) | State::Closing => Fate::Lives,
        }
    }

    /// Follows a packet of the guest's.
    pub(super) fn hear(
        &mut self,
        op: Op,
        flags: u32,
        payload: (&GuestRam, &mut Segments),
        now: Instant,
    ) -> Fate {
        match (op, &mut self.state) {
            (Op::Reset, State::Calling(call)) => {
                if now.duration_since(call.since) >= PATIENCE {
                    return Fate::Over;
                }
                call.again = Some(now + call.pause);
                call.pause = (call.pause * 2).min(RETRY[1]);
                Fate::Lives
            }
            (Op::Reset, _) => Fate::Over,
            (Op::Response, State::Calling(call)) if call.again.is_none() => {
                self.state = State::Open;
                let host_port = self.key.map_or(0, |key| key.host_port);
                let line = format!("OK {host_port}\n");
                // The socket is empty, so it takes this at once or its program is gone.
                match vectored::send_bytes(&self.stream, line.as_bytes()) {
                    Ok(sent) if sent == line.len() => Fate::Lives,
                    _ => Fate::Reset,
                }
            }
            (Op::CreditUpdate, _) => Fate::Lives,
            (Op::CreditRequest, State::Open) => {
                self.due.credit = true;
                Fate::Lives
            }
            (Op::Shutdown, State::Open) => {
                self.guest_shutdown |= flags & SHUTDOWN_BOTH;
                self.flush()
            }
            (Op::Shutdown, State::Closing) => Fate::Reset,
            (Op::Data, State::Open) if self.guest_shutdown & SHUTDOWN_SEND == 0 => {
                let (ram, payload) = payload;
                self.take(ram, payload)
            }
            // What the guest sent before it learned of the end.
            (Op::Data, State::Closing) => Fate::Lives,
            _ => Fate::Reset,
        }
    }

    /// What the guest says of its room, in every packet.
    pub(super) fn learn_credit(&mut self, window: u32, forwarded: u32) {
        self.guest_window = window;
        self.guest_forwarded = forwarded;
        // An answer that gives none is not asked for again: the guest tells when its program reads.
        self.asked_credit &= self.credit() == 0;
    }

    /// Bytes the guest has room for. Nonsense of the guest's makes that none.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_window.saturating_sub(in_flight)
    }

    /// What goes with every packet: the window, and what of it was taken so far.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told_forwarded = self.forwarded;
        self.due.credit = false;
        (WINDOW, self.forwarded)
    }

    /// Gives the socket the guest's bytes. A guest that sends more than it may is reset.
    fn take(&mut self, ram: &GuestRam, payload: &mut Segments) -> Fate {
        if payload.len() > WINDOW as usize - self.waiting.len().min(WINDOW as usize) {
            return Fate::Reset;
        }
        while self.waiting.is_empty() && !payload.is_empty() {
            let len = payload.len();
            match vectored::send(&self.stream, ram, payload, len) {
                Ok(count) => self.forward(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The host's program no longer reads. The guest first gets what the host still
                    // has for it, and then learns of the end.
                    self.host_gone = true;
                    self.readable = true;
                    self.forward(payload.len());
                    return Fate::Lives;
                }
            }
        }
        let mut piece = [0; 4096];
        while !payload.is_empty() {
            let step = payload.len().min(piece.len());
            if payload.read(ram, &mut piece[..step]).is_err() {
                return Fate::Reset;
            }
            self.waiting.extend(&piece[..step]);
        }
        Fate::Lives
    }

    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).expect("no more than the window at once");
        self.forwarded = self.forwarded.wrapping_add(count);
        // Before the guest runs dry, and not for each packet.
        self.due.credit |= self.forwarded.wrapping_sub(self.told_forwarded) >= WINDOW / 2;
    }

    /// Gives the socket what waits, and what the guest's end means once nothing does.
    fn flush(&mut self) -> Fate {
        while !self.waiting.is_empty() {
            match vectored::send_bytes(&self.stream, self.waiting.as_slices().0) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.forward(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fate::Lives,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.host_gone = true;
                    self.readable = true;
                    self.forward(self.waiting.len());
                    self.waiting.clear();
                }
            }
        }
        // A flood is over; its room is not kept.
        self.waiting = VecDeque::new();
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // The guest waits for this before it forgets the connection.
            return Fate::Reset;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.host_told {
            // Once: it makes the socket ready, which leads here again.
            self.host_told = true;
            // Fails when the other end is gone, which its reading tells.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Fate::Lives
    }

    /// Whether there is something to say to the guest.
    pub(super) fn has_message(&self) -> bool {
        let due = &self.due;
        due.request
            || due.response
            || due.credit
            || due.credit_request
            || (matches!(self.state, State::Open)
                && (self.may_read() || self.shutdown_due().is_some()))
    }

    fn may_read(&self) -> bool {
        self.readable
            && !self.host_ended
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            && (self.credit() > 0 || !self.asked_credit)
    }

    /// What the host will not do any more and the guest has not heard.
    fn shutdown_due(&self) -> Option<u32> {
        let flags = match (self.host_ended, self.host_gone) {
            (true, true) => SHUTDOWN_BOTH,
            (true, false) => SHUTDOWN_SEND,
            (false, _) => 0,
        };
        (flags & !self.told_shutdown != 0).then_some(flags)
    }

    /// The next packet for the guest, whose payload goes into `room`.
    pub(super) fn message(&mut self, ram: &GuestRam, room: &mut Segments) -> Option<Message> {
        let plain = |op| {
            Some(Message {
                op,
                flags: 0,
                len: 0,
            })
        };
        let due = |flag: &mut bool| std::mem::take(flag);
        if due(&mut self.due.request) {
            return plain(Op::Request);
        }
        if due(&mut self.due.response) {
            return plain(Op::Response);
        }
        if matches!(self.state, State::Open) {
            if self.may_read() && self.credit() == 0 {
                self.asked_credit = true;
                self.due.credit_request = true;
            } else if self.may_read()
                && let Some(len) = self.read(ram, room)
            {
                return Some(Message {
                    op: Op::Data,
                    flags: 0,
                    len,
                });
            }
            if let Some(flags) = self.shutdown_due() {
                self.told_shutdown = flags;
                if flags == SHUTDOWN_BOTH {
                    self.state = State::Closing;
                }
                return Some(Message {
                    op: Op::Shutdown,
                    flags,
                    len: 0,
                });
            }
        }
        if due(&mut self.due.credit_request) {
            return plain(Op::CreditRequest);
        }
        if due(&mut self.due.credit) {
            return plain(Op::CreditUpdate);
        }
        None
    }

    /// Reads from the socket into the guest's buffer. None if there is nothing.
    fn read(&mut self, ram: &GuestRam, room: &mut Segments) -> Option<u32> {
        let max = (self.credit() as usize).min(MAX_DATA).min(room.len());
        if max == 0 {
            return None;
        }
        loop {
            match vectored::read(&self.stream, ram, room, max) {
                Ok(0) => {
                    self.host_ended = true;
                    return None;
                }
                Ok(count) => {
                    let count = u32::try_from(count).expect("at most MAX_DATA");
                    self.sent = self.sent.wrapping_add(count);
                    return Some(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.host_ended = true;
                        self.host_gone = true;
                    }
                    return None;
                }
            }
        }
    }
}

/// The port in `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> io::Result<u32> {
    let line = str::from_utf8(line).unwrap_or_default();
    let line = line.strip_suffix('\r').unwrap_or(line);
    match line.split_once(' ') {
        Some((word, port)) if word.eq_ignore_ascii_case("CONNECT") => {
            let digits = port.bytes().all(|byte| byte.is_ascii_digit());
            let port = port.parse().ok().filter(|_| digits);
            port.ok_or_else(|| io::ErrorKind::InvalidData.into())
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_names_a_port_in_any_case() {
        let port = |line: &str| parse_greeting(line.as_bytes()).ok();
        assert_eq!(port("CONNECT 1024"), Some(1024));
        assert_eq!(port("connect 0\r"), Some(0));
        assert_eq!(port("Connect 4294967295"), Some(u32::MAX));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT +1",
            "CONNECT 4294967296",
            "OK 1",
        ] {
            assert_eq!(port(line), None, "{line}");
        }
    }
}
