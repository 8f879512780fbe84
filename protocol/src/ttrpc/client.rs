//! Makes calls over a unix socket, several at once from any thread.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use prost::Message;

use super::{Code, Request, Response, Status, frame};

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
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// A lock that is held while a request is written.
    writing: Mutex<()>,
    calls: Arc<Mutex<Calls>>,
}

#[derive(Debug)]
struct Calls {
    /// The number of the next stream: odd, as a client's are.
    next: u32,
    /// Callers that wait, by the number of their stream; none once the connection has ended.
    waiting: Option<HashMap<u32, SyncSender<Frame>>>,
}

type Frame = Option<Vec<u8>>;

impl Client {
    /// Talks on `stream`, with a thread of its own that reads the answers.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let calls = Arc::new(Mutex::new(Calls {
            next: 1,
            waiting: Some(HashMap::new()),
        }));
        let (reader, waiting) = (stream.try_clone()?, Arc::clone(&calls));
        thread::Builder::new()
            .name("ttrpc".into())
            .stack_size(64 << 10)
            .spawn(move || {
                hear(reader, &waiting);
                // Each caller that waits learns that no answer comes.
                lock(&waiting).waiting = None;
            })?;
        Ok(Self {
            stream,
            writing: Mutex::new(()),
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
        let gone = || CallError::Gone(method.into());
        let (answered, answer) = sync_channel(1);
        let stream = {
            let mut calls = lock(&self.calls);
            let stream = calls.next;
            calls.next = stream.wrapping_add(2);
            let waiting = calls.waiting.as_mut().ok_or_else(gone)?;
            waiting.insert(stream, answered);
            stream
        };
        let nanos = timeout.map_or(0, |timeout| timeout.as_nanos());
        let message = Request {
            service: service.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: nanos.try_into().unwrap_or(i64::MAX),
        };
        self.send(stream, &message).map_err(|source| {
            self.forget(stream);
            CallError::Send {
                method: method.into(),
                source,
            }
        })?;
        let answer = match timeout {
            None => answer.recv().map_err(|_| gone())?,
            Some(timeout) => answer.recv_timeout(timeout).map_err(|error| {
                self.forget(stream);
                match error {
                    RecvTimeoutError::Disconnected => gone(),
                    RecvTimeoutError::Timeout => CallError::Late {
                        method: method.into(),
                        timeout,
                    },
                }
            })?,
        };
        let wrong = |source| CallError::Answer {
            method: method.into(),
            source,
        };
        let too_long = || Status::new(Code::ResourceExhausted, "an answer of more than 4 MiB");
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

    fn send(&self, stream: u32, request: &Request) -> io::Result<()> {
        let _writing = self.writing.lock().expect("a panic ends the process");
        let payload = request.encode_to_vec();
        frame::write(&mut &self.stream, stream, frame::REQUEST, &payload)
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

/// Hands each answer to the caller that waits for it, until there are no more answers.
fn hear(mut reader: UnixStream, calls: &Mutex<Calls>) {
    while let Ok(Some(frame)) = frame::read(&mut reader) {
        let mut calls = lock(calls);
        let waiting = calls.waiting.as_mut();
        let caller = waiting.and_then(|waiting| waiting.remove(&frame.stream));
        if let Some(caller) = caller.filter(|_| frame.kind == frame::RESPONSE) {
            // It has room for this one, and who gave up is not told.
            let _ = caller.try_send(frame.payload);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The thread that reads sees the end.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
