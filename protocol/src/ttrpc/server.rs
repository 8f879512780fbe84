//! Answers calls. The thread that reads a connection answers those that are quick, and gives each
//! other one to a worker, as many wait for as long as what they wait for lives.

use std::collections::VecDeque;
use std::io::{self, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Code, MAX_MESSAGE, Request, Response, Status, StatusMessage, frame};

/// A call to be answered.
#[derive(Debug)]
pub struct Call<'a> {
    /// The service's name, as `grpc.Health`.
    pub service: &'a str,
    /// The method's name, as `Check`.
    pub method: &'a str,
    payload: &'a [u8],
    /// A pipe that hangs up once the caller is gone; none for a quick call.
    caller: Option<&'a PipeReader>,
}

impl Call<'_> {
    /// Answers by `answer`, whose request is what this call brings.
    pub fn answer<Q: Message + Default, A: Message>(
        &self,
        answer: impl FnOnce(Q) -> Result<A, Status>,
    ) -> Result<Vec<u8>, Status> {
        let request = Q::decode(self.payload);
        let request = request.map_err(|error| Status::new(Code::InvalidArgument, error))?;
        Ok(answer(request)?.encode_to_vec())
    }

    /// A descriptor that hangs up, as poll(2) has it, once the caller is gone. A service that waits
    /// to take something for the answer must wait for this too; otherwise the next caller may miss
    /// what it takes. Not for quick calls.
    pub fn caller(&self) -> BorrowedFd<'_> {
        self.caller.expect("a quick call does not wait").as_fd()
    }

    /// Whether the caller is gone.
    pub fn is_orphan(&self) -> bool {
        let Some(caller) = self.caller else {
            return false;
        };
        let mut caller = [PollFd::new(caller, PollFlags::empty())];
        matches!(poll(&mut caller, Some(&Timespec::default())), Ok(1))
    }

    /// The status for a method that the service does not have.
    pub fn unimplemented(&self) -> Status {
        Status::unimplemented(self.service, self.method)
    }
}

/// What answers calls, several at once.
pub trait Service: Send + Sync + 'static {
    /// Whether a call is answered without waiting for anything, so that no other thread need be
    /// woken for it.
    fn is_quick(&self, _service: &str, _method: &str) -> bool {
        false
    }

    /// Answers a call, with an encoded message. It may take as long as it likes.
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status>;

    /// Hears that a call's answer is written, or that no caller is there to take it.
    fn answered(&self, _call: &Call<'_>) {}
}

/// Answers the calls of one connection until the other side ends it, or says what no ttrpc client
/// does.
pub fn serve(
    reader: impl Read,
    writer: impl Write + Send + 'static,
    service: &Arc<dyn Service>,
    workers: &Workers,
) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(frame::READ_AHEAD, reader);
    let writer = Arc::new(Mutex::new(writer));
    let mut presence = None;
    while let Some(frame) = frame::read(&mut reader)? {
        if frame.kind != frame::REQUEST {
            // Streaming is not offered, so no call takes this frame.
            continue;
        }
        let stream = frame.stream;
        let refused = match parse(&frame) {
            Err(status) => Some(status),
            Ok(request) if service.is_quick(&request.service, &request.method) => {
                answer(&**service, &writer, stream, &request, None);
                None
            }
            Ok(request) => {
                let (service, writer) = (Arc::clone(service), Arc::clone(&writer));
                let caller = caller(&mut presence)?;
                let job = move || answer(&*service, &writer, stream, &request, Some(&caller));
                workers.run(Box::new(job)).err()
            }
        };
        if let Some(status) = refused {
            reply(&writer, stream, Err(status))?;
        }
    }
    Ok(())
}

/// What those who answer see of the caller. Its other end is closed with the connection.
fn caller(presence: &mut Option<(Arc<PipeReader>, PipeWriter)>) -> io::Result<Arc<PipeReader>> {
    let (caller, present) = match presence.take() {
        Some(pipe) => pipe,
        None => io::pipe().map(|(caller, present)| (Arc::new(caller), present))?,
    };
    let (caller, _) = presence.insert((caller, present));
    Ok(Arc::clone(caller))
}

fn answer(
    service: &dyn Service,
    writer: &Mutex<impl Write>,
    stream: u32,
    request: &Request,
    caller: Option<&PipeReader>,
) {
    let call = Call {
        service: &request.service,
        method: &request.method,
        payload: &request.payload,
        caller,
    };
    let answer = service.call(&call);
    // A client that is gone needs no answer; the reader sees that it is.
    let _ = reply(writer, stream, answer);
    service.answered(&call);
}

fn parse(frame: &frame::Frame) -> Result<Request, Status> {
    let invalid = |what: &dyn std::fmt::Display| Status::new(Code::InvalidArgument, what);
    if frame.stream.is_multiple_of(2) {
        return Err(invalid(&"a client's streams have odd numbers"));
    }
    let payload = frame.payload.as_deref();
    let payload = payload.ok_or_else(|| invalid(&"a message of more than 4 MiB"))?;
    Request::decode(payload).map_err(|error| invalid(&error))
}

fn reply(
    writer: &Mutex<impl Write>,
    stream: u32,
    answer: Result<Vec<u8>, Status>,
) -> io::Result<()> {
    let refusal = |Status { code, message }| Response {
        status: Some(StatusMessage {
            code: code.into(),
            message,
        }),
        payload: Vec::new(),
    };
    let response = match answer {
        Ok(payload) => Response {
            status: None,
            payload,
        },
        Err(status) => refusal(status),
    };
    let mut response = response.encode_to_vec();
    if response.len() > MAX_MESSAGE as usize {
        let status = Status::new(Code::ResourceExhausted, "an answer of more than 4 MiB");
        response = refusal(status).encode_to_vec();
    }
    let mut writer = writer.lock().expect("a panic ends the process");
    frame::write(&mut *writer, stream, frame::RESPONSE, &response)
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that answer calls, for all connections. There are as many as calls were ever under way
/// at once.
#[derive(Clone, Debug, Default)]
pub struct Workers(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// The most threads there may be: far more than the processes of a pod have streams.
    const MOST: usize = 4096;
    /// The size of a thread's stack, in bytes of virtual memory; what is not used costs nothing.
    pub(super) const STACK: usize = 256 << 10;

    fn run(&self, job: Job) -> Result<(), Status> {
        let mut state = self.0.state();
        if state.idle <= state.jobs.len() {
            if state.threads == Self::MOST {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    "too many calls are under way",
                ));
            }
            let shared = Arc::clone(&self.0);
            let thread = thread::Builder::new().stack_size(Self::STACK);
            let spawned = thread.spawn(move || shared.work());
            spawned.map_err(|error| Status::new(Code::ResourceExhausted, error))?;
            state.threads += 1;
            state.idle += 1;
        }
        state.jobs.push_back(job);
        self.0.work.notify_one();
        Ok(())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            match state.jobs.pop_front() {
                None => state = self.work.wait(state).expect("a panic ends the process"),
                Some(job) => {
                    state.idle -= 1;
                    drop(state);
                    job();
                    state = self.state();
                    state.idle += 1;
                }
            }
        }
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("jobs", &self.jobs.len())
            .field("threads", &self.threads)
            .field("idle", &self.idle)
            .finish()
    }
}
