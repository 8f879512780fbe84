//! podvmm's API on its socket: the thread that joins clients to `control`.
//!
//! It waits for clients and for the answers of `control`. `control` waits for no guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread::{Builder, JoinHandle};

use api::http::{self, Request, Server};
use api::route;
use devices::host::{ListenError, Listener};
use thiserror::Error;

use crate::host::thread::Kind;
use crate::inbox::{Event, Inbox, Reply};

/// Why there is no API.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The API's socket could not be made.
    #[error("--api-socket")]
    Listen(#[from] ListenError),
    /// What waits for the socket's clients could not be set up.
    #[error("watch the API socket")]
    Watch(#[source] io::Error),
    /// The API's thread could not be started.
    #[error("start the thread of the API")]
    Thread(#[source] io::Error),
}

/// The API while it is served. Dropping it ends that, after the answers that are
/// given, and removes the socket.
#[derive(Debug)]
pub(crate) struct Service {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Serves clients at `socket` with what `control` answers.
    pub(crate) fn start(socket: &Path, inbox: Inbox) -> Result<Self, ServiceError> {
        let listener = Listener::bind(socket)?;
        let server = listener.socket().and_then(Server::new);
        let mut server = server.map_err(ServiceError::Watch)?;
        let (stopped, stop) = io::pipe().map_err(ServiceError::Thread)?;
        let thread = Kind::Api
            .spawn(Builder::new().name("api".into()), move || {
                let served = server.serve(stopped.as_fd(), |request, reply| {
                    ask(&inbox, request, reply)
                });
                if let Err(error) = served {
                    log::error!("the API ended: {error}");
                }
                // Removes the socket: no thread serves it any more.
                drop(listener);
            })
            .map_err(ServiceError::Thread)?;
        Ok(Self {
            stop: Some(stop.into()),
            thread: Some(thread),
        })
    }
}

fn ask(inbox: &Inbox, request: Request, reply: http::Reply) {
    let reply = Reply::to_http(reply);
    match route::request(request) {
        Err(error) => reply.send(Err(error)),
        Ok(request) => {
            // Without `control` the event is dropped, and the reply with it.
            let _ = inbox.send(Event::Call(Box::new(request), reply));
        }
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
