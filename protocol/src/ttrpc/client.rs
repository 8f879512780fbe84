//! Makes calls over a unix socket, several at once from any thread.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::{Code, MAX_MESSAGE, Request, Response, Status, frame};

/// The time between looks at whether an answer is still wanted.
const PERIOD: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The other side refuses.
    #[error(transparent)]
    Refused(#[from] Status),
    /// The other side did not answer in time; it may have done what was asked.
    #[error("no answer to {method} within {timeout:?}")]
    Late {
        method: String,
        /// How long the answer was waited for.
        timeout: Duration,
    },
    /// The caller does not want the answer any more; what was asked may have been done.
    #[error("the answer to {0} is not wanted any more")]
    Unwanted(String),
    /// The connection has ended; what was asked may have been done.
    #[error("the connection ended before {0} was answered")]
    Gone(String),
    /// The request could not be sent.
    #[error("send {method}")]
    Send { method: String, source: io::Error },
    /// The answer is no message of the protocol.
    #[error("read the answer to {method}")]
    Answer {
        method: String,
        source: prost::DecodeError,
    },
}

/// A connection. Dropping it ends the calls under way.
///
/// The other side need not be honest: it is not waited for longer than a caller says, whether it does not answer
/// or does not read, and nothing is kept of what no caller waits for.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    writing: Turn,
    calls: Arc<Mutex<Calls>>,
}

#[derive(Debug)]
struct Calls {
    /// The number of the next stream: odd, as a client's are.
    next: u32,
    /// Callers that wait, by the number of their stream; none once the connection has ended.
    waiting: Option<HashMap<u32, SyncSender<Answer>>>,
}

/// An answer's bytes; none if it was too long.
type Answer = Option<Vec<u8>>;

/// How long a caller waits.
#[derive(Clone, Copy)]
enum Patience<'a> {
    Endless,
    Until(Instant),
    While(&'a dyn Fn() -> bool),
}

impl Patience<'_> {
    /// How long to wait before the next look at this; none if it is over.
    fn left(self) -> Option<Duration> {
        match self {
            Self::Endless => Some(Duration::from_secs(3600)),
            Self::Until(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                (!left.is_zero()).then_some(left)
            }
            Self::While(is_wanted) => is_wanted().then_some(PERIOD),
        }
    }
}

/// The right to write, which one caller at a time has. It is waited for no longer than a caller says.
#[derive(Debug, Default)]
struct Turn {
    is_taken: Mutex<bool>,
    given_back: Condvar,
}

impl Turn {
    /// Takes it, or says that it was not to be had.
    fn take(&self, patience: Patience<'_>) -> Option<Taken<'_>> {
        let mut is_taken = self.is_taken.lock().expect("a panic ends the process");
        while *is_taken {
            let waited = self.given_back.wait_timeout(is_taken, patience.left()?);
            is_taken = waited.expect("a panic ends the process").0;
        }
        *is_taken = true;
        Some(Taken(self))
    }
}

/// The turn, until it is dropped.
struct Taken<'a>(&'a Turn);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.is_taken.lock().expect("a panic ends the process") = false;
        self.0.given_back.notify_one();
    }
}

impl Client {
    /// Talks on `stream`, with a thread of its own that reads the answers.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        Self::with_max_answer(stream, MAX_MESSAGE)
    }

    /// The same, where an answer that is longer than so many bytes is passed over, and its call refused.
    pub fn with_max_answer(stream: UnixStream, bytes: u32) -> io::Result<Self> {
        let calls = Arc::new(Mutex::new(Calls {
            next: 1,
            waiting: Some(HashMap::new()),
        }));
        let (reader, waiting) = (stream.try_clone()?, Arc::clone(&calls));
        thread::Builder::new()
            .name("ttrpc".into())
            .stack_size(64 << 10)
            .spawn(move || {
                hear(reader, &waiting, bytes);
                // Each caller that waits learns that no answer comes.
                lock(&waiting).waiting = None;
            })?;
        Ok(Self {
            stream,
            writing: Turn::default(),
            calls,
        })
    }

    /// Calls `service`/`method` and waits for the answer, at most `timeout` if there is one.
    pub fn call<A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Option<Duration>,
    ) -> Result<A, CallError> {
        let request = Request {
            timeout_nano: nanos(timeout.unwrap_or_default()),
            ..encoded(service, method, request)
        };
        let Some(timeout) = timeout else {
            return self.exchange(&request, Patience::Endless);
        };
        let answer = self.exchange(&request, Patience::Until(Instant::now() + timeout));
        answer.map_err(|error| match error {
            CallError::Unwanted(method) => CallError::Late { method, timeout },
            other => other,
        })
    }

    /// Calls `service`/`method` and waits for the answer, as long as it `is_wanted`.
    pub fn call_while<A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<A, CallError> {
        self.exchange(
            &encoded(service, method, request),
            Patience::While(is_wanted),
        )
    }

    fn exchange<A: Message + Default>(
        &self,
        request: &Request,
        patience: Patience<'_>,
    ) -> Result<A, CallError> {
        let method = &request.method;
        let gone = || CallError::Gone(method.clone());
        let (stream, answer) = self.register().ok_or_else(gone)?;
        let answer = self
            .send(stream, request, patience)
            .and_then(|()| wait(&answer, request, patience))
            .inspect_err(|_| self.forget(stream))?;
        let wrong = |source| CallError::Answer {
            method: method.clone(),
            source,
        };
        let too_long = || Status::new(Code::ResourceExhausted, "the answer is too long");
        let response = answer.ok_or_else(too_long)?;
        let Response { status, payload } = Response::decode(&response[..]).map_err(wrong)?;
        match status {
            Some(status) if status.code != 0 => {
                let code = Code::try_from(status.code).unwrap_or(Code::Unknown);
                Err(Status::new(code, status.message).into())
            }
            _ => A::decode(&payload[..]).map_err(wrong),
        }
    }

    /// A stream of its own for a caller, and where its answer comes; none if the connection has ended.
    fn register(&self) -> Option<(u32, Receiver<Answer>)> {
        let (answered, answer) = sync_channel(1);
        let mut calls = lock(&self.calls);
        let mut stream = calls.next;
        let waiting = calls.waiting.as_mut()?;
        // After 2^31 calls, those that have waited since still have theirs.
        while waiting.contains_key(&stream) {
            stream = stream.wrapping_add(2);
        }
        waiting.insert(stream, answered);
        calls.next = stream.wrapping_add(2);
        Some((stream, answer))
    }

    /// Sends a request. Where the other side stops reading in the middle of it, the connection ends: it can take
    /// no other request then.
    fn send(
        &self,
        stream: u32,
        request: &Request,
        patience: Patience<'_>,
    ) -> Result<(), CallError> {
        let failed = |source| CallError::Send {
            method: request.method.clone(),
            source,
        };
        let late = || CallError::Unwanted(request.method.clone());
        let bytes = frame::encode(stream, frame::REQUEST, &request.encode_to_vec());
        let bytes = bytes.map_err(failed)?;
        let _turn = self.writing.take(patience).ok_or_else(late)?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match send(
                &self.stream,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let Some(left) = patience.left() else {
                        if rest.len() < bytes.len() {
                            let _ = self.stream.shutdown(Shutdown::Both);
                        }
                        return Err(late());
                    };
                    let left = Timespec::try_from(left).expect("it is an hour at most");
                    let mut room = [PollFd::new(&self.stream, PollFlags::OUT)];
                    match poll(&mut room, Some(&left)) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(errno) => return Err(failed(errno.into())),
                    }
                }
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Ok(())
    }

    fn forget(&self, stream: u32) {
        if let Some(waiting) = &mut lock(&self.calls).waiting {
            waiting.remove(&stream);
        }
    }
}

fn lock(calls: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    calls.lock().expect("a panic ends the process")
}

fn encoded(service: &str, method: &str, request: &impl Message) -> Request {
    Request {
        service: service.into(),
        method: method.into(),
        payload: request.encode_to_vec(),
        timeout_nano: 0,
    }
}

fn nanos(timeout: Duration) -> i64 {
    timeout.as_nanos().try_into().unwrap_or(i64::MAX)
}

fn wait(
    answer: &Receiver<Answer>,
    request: &Request,
    patience: Patience<'_>,
) -> Result<Answer, CallError> {
    loop {
        let Some(left) = patience.left() else {
            return Err(CallError::Unwanted(request.method.clone()));
        };
        match answer.recv_timeout(left) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(CallError::Gone(request.method.clone()));
            }
        }
    }
}

/// Hands each answer to the caller that waits for it, until there are no more answers. All else is passed over.
fn hear(reader: impl Read, calls: &Mutex<Calls>, most: u32) {
    let mut reader = BufReader::with_capacity(frame::READ_AHEAD, reader);
    let is_awaited = |stream| {
        let calls = lock(calls);
        let waiting = calls.waiting.as_ref();
        waiting.is_some_and(|waiting| waiting.contains_key(&stream))
    };
    while let Ok(Some(header)) = frame::Header::read(&mut reader) {
        if header.kind != frame::RESPONSE || !is_awaited(header.stream) {
            match header.pass_over(&mut reader) {
                Ok(()) => continue,
                Err(_) => return,
            }
        }
        let Ok(answer) = header.payload(&mut reader, most) else {
            return;
        };
        let mut calls = lock(calls);
        let waiting = calls.waiting.as_mut();
        if let Some(caller) = waiting.and_then(|waiting| waiting.remove(&header.stream)) {
            // It has room for this one, and who gave up is not told.
            let _ = caller.try_send(answer);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The thread that reads sees the end.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests;
