//! What other threads tell `control`, the one thread that decides what happens to the VM, and how
//! they tell it.

mod ending;
mod site;

use std::sync::mpsc::{Receiver, SendError, Sender, channel};

use api::http::{self, Next};
use api::{Answer, ApiError, Request, route};
use protocol::contract::Status;

pub use self::ending::{EXIT_FAILURE, Ending};
pub use self::site::Site;

/// What others tell `control`.
#[derive(Debug)]
pub(crate) enum Event {
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
pub(crate) struct Reply(Option<To>);

/// Where an answer goes.
#[derive(Debug)]
enum To {
    Http(http::Reply),
    Thread(Sender<Result<Answer, ApiError>>),
}

impl Reply {
    /// Answers by HTTP.
    pub(crate) fn to_http(reply: http::Reply) -> Self {
        Self(Some(To::Http(reply)))
    }

    /// Answers a thread that waits for it.
    pub(crate) fn to_thread() -> (Self, Receiver<Result<Answer, ApiError>>) {
        let (sender, receiver) = channel();
        (Self(Some(To::Thread(sender))), receiver)
    }

    /// A client that left does not get its answer.
    pub(crate) fn send(mut self, answer: Result<Answer, ApiError>) {
        self.give(answer);
    }

    fn give(&mut self, answer: Result<Answer, ApiError>) {
        match self.0.take() {
            None => {}
            Some(To::Http(reply)) => {
                let response = route::response(&answer);
                reply.send(match answer {
                    Ok(Answer::Exiting) => Next::AnswerAndStop(response),
                    _ => Next::Answer(response),
                });
            }
            Some(To::Thread(sender)) => {
                let _ = sender.send(answer);
            }
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.give(Err(ApiError::Ending));
    }
}

/// The way into the inbox for those who belong to one life of the VM. What they
/// say after its end is not heard.
#[derive(Clone, Debug)]
pub(crate) struct Inbox {
    sender: Sender<(u32, Event)>,
    life: u32,
}

impl Inbox {
    /// The inbox of a VM that does not live yet.
    pub(crate) fn new() -> (Self, Receiver<(u32, Event)>) {
        let (sender, receiver) = channel();
        (Self { sender, life: 0 }, receiver)
    }

    /// Fails when `control` no longer listens.
    pub(crate) fn send(&self, event: Event) -> Result<(), SendError<(u32, Event)>> {
        self.sender.send((self.life, event))
    }

    /// This inbox for those who belong to the VM's next life.
    pub(crate) fn next_life(&mut self) -> Self {
        self.life += 1;
        self.clone()
    }

    pub(crate) fn life(&self) -> u32 {
        self.life
    }
}
