//! The inbox of podvmm, and the one thread that decides what happens to its VM.
//!
//! Everybody else reports or asks: vCPUs and devices, the agent, signals, and
//! clients of the API, who each get their answer through a channel of their own.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel};
use std::time::{Duration, Instant};

use api::http::{self, Next};
use api::{Answer, ApiError, Request, route};
use serde_json::Value;

use crate::command::Status;
use crate::ending::Ending;
use crate::lifecycle::Vm;

/// How often to look at what nobody reports: KVM keeps a halted vCPU to itself.
const TICK: Duration = Duration::from_secs(1);

/// What others tell `control`.
#[derive(Debug)]
pub enum Event {
    /// A vCPU or a device met the end of the guest.
    Ended(Ending),
    /// The agent reported.
    Status(Status),
    /// A signal asks podvmm to end.
    Signal(i32),
    /// A client asks.
    Call(Box<Request>, Reply),
    /// The snapshot that was asked for is written, or cannot be.
    Saved,
}

/// The way to answer a client. Without an answer it learns that podvmm is ending.
#[derive(Debug)]
pub struct Reply(Option<http::Reply>);

impl Reply {
    /// Answers by HTTP.
    pub fn new(reply: http::Reply) -> Self {
        Self(Some(reply))
    }

    /// A client that left does not get its answer.
    pub fn send(mut self, answer: &Result<Answer, ApiError>) {
        self.give(answer);
    }

    fn give(&mut self, answer: &Result<Answer, ApiError>) {
        if let Some(reply) = self.0.take() {
            let response = route::response(answer);
            reply.send(match answer {
                Ok(Answer::Exiting) => Next::AnswerAndStop(response),
                _ => Next::Answer(response),
            });
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.give(&Err(ApiError::Ending));
    }
}

/// The way into the inbox for those who belong to one life of the VM. What they
/// say after its end is not heard.
#[derive(Clone, Debug)]
pub struct Inbox {
    sender: Sender<(u32, Event)>,
    life: u32,
}

impl Inbox {
    /// The inbox of a VM that does not live yet.
    pub fn new() -> (Self, Receiver<(u32, Event)>) {
        let (sender, receiver) = channel();
        (Self { sender, life: 0 }, receiver)
    }

    /// Fails when there is nobody to listen any more.
    pub fn send(&self, event: Event) -> Result<(), SendError<(u32, Event)>> {
        self.sender.send((self.life, event))
    }

    /// The same inbox, for those who belong to the next life.
    pub(crate) fn next_life(&mut self) -> Self {
        self.life += 1;
        self.clone()
    }

    pub(crate) fn life(&self) -> u32 {
        self.life
    }
}

/// Why podvmm is done.
#[derive(Debug)]
pub enum Outcome {
    /// The guest ended, or podvmm was told to end by a signal.
    Ended(Ending),
    /// A client told podvmm to end.
    Dismissed,
}

/// Serves the inbox until podvmm is done. The VM is stopped by then, if it can be, and who
/// still waits for an answer learns that there will be none.
pub fn serve(vm: &mut Vm, events: Receiver<(u32, Event)>) -> Outcome {
    let mut looked = Instant::now();
    let mut due = looked + TICK;
    let outcome = loop {
        // By the clock, not by silence: whoever asks or says much is not to keep it away.
        let now = Instant::now();
        if now >= due {
            // First, as it says which vCPUs of the guest are parked for a moment and which for good.
            let sooner = vm.settle();
            if now >= looked + TICK {
                looked = now;
                if vm.has_halted() {
                    break Outcome::Ended(Ending::Halted);
                }
            }
            due = now + sooner.map_or(TICK, |sooner| sooner.min(TICK));
        }
        match events.recv_timeout(due.duration_since(now)) {
            Ok((_, Event::Signal(signal))) => break Outcome::Ended(Ending::Signal(signal)),
            Ok((_, Event::Call(request, reply))) => match *request {
                Request::Exit => {
                    // The client is to hear it when it is so.
                    vm.stop();
                    reply.send(&Ok(Answer::Exiting));
                    break Outcome::Dismissed;
                }
                Request::Snapshot(snapshot) => vm.snapshot(snapshot, reply),
                request => reply.send(&vm.answer(request)),
            },
            Ok((_, Event::Saved)) => vm.saved(),
            Ok((life, _)) if life != vm.life() => {}
            Ok((_, Event::Ended(ending))) => break Outcome::Ended(ending),
            Ok((_, Event::Status(Status::Ready))) => {
                log::info!("the agent starts the command");
                vm.events().vm("agent-ready", Value::Null);
            }
            Ok((_, Event::Status(Status::Exit(status)))) => {
                break Outcome::Ended(Ending::Command(status));
            }
            Ok((_, Event::Status(Status::Error(why)))) => {
                break Outcome::Ended(Ending::Agent(why));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the VM holds a way into its inbox")
            }
        }
    };
    drop(events);
    match outcome {
        Outcome::Ended(Ending::Memory(_)) => vm.abandon(),
        _ => vm.stop(),
    }
    outcome
}
