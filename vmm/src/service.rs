//! podvmm's API on its socket: the thread that joins clients to `control`.
//!
//! Waits for clients and, for each request, for `control`, which waits for
//! nobody's guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread::{Builder, JoinHandle};

use api::http::{Next, Server};
use api::{Answer, ApiError, route};
use devices::host::{ListenError, Listener};
use thiserror::Error;

use crate::control::{Event, Inbox};

/// Why there is no API.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The socket.
    #[error("--api-socket")]
    Listen(#[from] ListenError),
    /// What waits for its clients.
    #[error("watch the API socket")]
    Watch(#[source] io::Error),
    /// Its thread.
    #[error("start the thread of the API")]
    Thread(#[source] io::Error),
}

/// The API while it is served. Dropping it ends that, after the answer that is
/// being given, and removes the socket.
#[derive(Debug)]
pub struct Service {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Serves clients at `socket` with what `control` answers.
    pub fn start(socket: &Path, inbox: Inbox) -> Result<Self, ServiceError> {
        let listener = Listener::bind(socket)?;
        let server = listener.socket().and_then(Server::new);
        let mut server = server.map_err(ServiceError::Watch)?;
        let (stopped, stop) = io::pipe().map_err(ServiceError::Thread)?;
        let thread = Builder::new()
            .name("api".into())
            .spawn(move || {
                let served = server.serve(stopped.as_fd(), |request| answer(&inbox, request));
                if let Err(error) = served {
                    log::error!("the API ended: {error}");
                }
                // Removes the socket: nobody serves it any more.
                drop(listener);
            })
            .map_err(ServiceError::Thread)?;
        Ok(Self {
            stop: Some(stop.into()),
            thread: Some(thread),
        })
    }
}

fn answer(inbox: &Inbox, request: api::http::Request) -> Next {
    let answer = route::request(request).and_then(|request| {
        let (reply, answer) = channel();
        // Without `control` there is no answer either.
        let _ = inbox.send(Event::Call(Box::new(request), reply));
        answer.recv().unwrap_or(Err(ApiError::Ending))
    });
    let response = route::response(&answer);
    match answer {
        Ok(Answer::Exiting) => Next::AnswerAndStop(response),
        _ => Next::Answer(response),
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The other end of the pipe becomes readable.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the API's thread panicked");
        }
    }
}
