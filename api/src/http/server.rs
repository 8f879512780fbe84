//! One thread that serves every client of a unix socket.
//!
//! It waits for all clients at once, so a slow one delays no other client. It also waits for the
//! answers that other threads give, so a request that takes long delays no other client either. It
//! reads from no client whose last request has no answer, or whose last answer is not taken yet, so
//! no client makes it hold more than a request and an answer.

use std::collections::HashMap;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::connection::{Connection, MAX_FDS, Parsed};
use super::message::{Request, Response};

/// Clients served at once; more wait to be accepted.
const MAX_CLIENTS: usize = 1024;
const READ_SIZE: usize = 16 << 10;
const RETRY: Duration = Duration::from_millis(10);
/// What is watched besides the clients.
const LISTENER: u64 = 0;
const ANSWERS: u64 = u64::MAX - 1;
const STOP: u64 = u64::MAX;

/// What the server is to do after an answer.
#[derive(Debug)]
pub enum Next {
    Answer(Response),
    /// Answer, and serve no client any more once this one has the answer or is gone.
    AnswerAndStop(Response),
}

/// The way to answer one request, at any time and from any thread. The holder has to call [`Self::send`]: until
/// then the server reads no further request of the client.
#[derive(Debug)]
pub struct Reply {
    client: u64,
    answers: Arc<Answers>,
}

impl Reply {
    /// Gives the answer. It goes nowhere if the client has left.
    pub fn send(self, next: Next) {
        let mut given = self.answers.given.lock().expect(NO_PANIC);
        given.push((self.client, next));
        // The counter is far from full: the server empties it.
        let _ = rustix::io::write(&self.answers.wake, &1_u64.to_ne_bytes());
    }
}

const NO_PANIC: &str = "a panic ends the process";

/// Answers on their way to the server.
#[derive(Debug)]
struct Answers {
    given: Mutex<Vec<(u64, Next)>>,
    /// An eventfd.
    wake: OwnedFd,
}

impl Answers {
    fn take(&self) -> Vec<(u64, Next)> {
        let mut given = self.given.lock().expect(NO_PANIC);
        // Nothing to read: it was taken before.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut given)
    }
}

/// A socket that is listened on, and its clients.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    epoll: OwnedFd,
    answers: Arc<Answers>,
    clients: HashMap<u64, Client>,
    last_client: u64,
    accepting: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    connection: Connection,
    /// Set while its request has no answer: whether the connection stays open for others after it.
    waiting: Option<bool>,
    /// Bytes of answers that the client has not taken yet.
    unsent: Vec<u8>,
    /// Whether no more requests are read: the connection is closed once all is sent.
    closing: bool,
    /// What it is watched for.
    interest: epoll::EventFlags,
}

impl Server {
    /// A server of the clients that connect to `listener`.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let server = Self {
            listener,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            answers: Arc::new(Answers {
                given: Mutex::default(),
                wake,
            }),
            clients: HashMap::new(),
            last_client: LISTENER,
            accepting: true,
        };
        server.watch(LISTENER, server.listener.as_fd(), epoll::EventFlags::IN)?;
        server.watch(ANSWERS, server.answers.wake.as_fd(), epoll::EventFlags::IN)?;
        Ok(server)
    }

    /// Hands the requests of all clients to `ask`, which answers them when it can, until an answer says
    /// stop or `stop` is readable. A client's requests come one after the other.
    pub fn serve(
        &mut self,
        stop: BorrowedFd<'_>,
        mut ask: impl FnMut(Request, Reply),
    ) -> io::Result<()> {
        self.watch(STOP, stop, epoll::EventFlags::IN)?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 64];
        loop {
            let (events, _) = match epoll::wait(&self.epoll, &mut events, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            for event in events {
                match event.data.u64() {
                    STOP => {
                        for (number, next) in self.answers.take() {
                            self.answer(number, next);
                            self.finish(number);
                        }
                        return Ok(());
                    }
                    LISTENER => self.accept(),
                    ANSWERS => {
                        for (number, next) in self.answers.take() {
                            if self.answer(number, next) {
                                self.finish(number);
                                return Ok(());
                            }
                            self.turn(number, &mut ask);
                        }
                    }
                    number => {
                        let flags = event.flags;
                        if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                            self.leave(number);
                        }
                        self.turn(number, &mut ask);
                    }
                }
            }
        }
    }

    fn watch(&self, number: u64, fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(number), flags)?;
        Ok(())
    }

    fn accept(&mut self) {
        while self.clients.len() < MAX_CLIENTS {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // No descriptor is free, say. A new client waits until another one leaves, or
                    // until a descriptor is closed elsewhere.
                    log::warn!("accept a client of the API: {error}");
                    thread::sleep(RETRY);
                    break;
                }
            }
        }
        self.set_accepting(self.clients.is_empty());
    }

    fn set_accepting(&mut self, accepting: bool) {
        if self.accepting == accepting {
            return;
        }
        let flags = if accepting {
            epoll::EventFlags::IN
        } else {
            epoll::EventFlags::empty()
        };
        let data = epoll::EventData::new_u64(LISTENER);
        match epoll::modify(&self.epoll, &self.listener, data, flags) {
            Ok(()) => self.accepting = accepting,
            Err(error) => log::warn!("watch the API socket: {error}"),
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        let interest = epoll::EventFlags::IN;
        let number = self.last_client + 1;
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| self.watch(number, stream.as_fd(), interest));
        if let Err(error) = watched {
            log::warn!("watch a client of the API: {error}");
            return;
        }
        self.last_client = number;
        let client = Client {
            stream,
            connection: Connection::default(),
            waiting: None,
            unsent: Vec::new(),
            closing: false,
            interest,
        };
        self.clients.insert(number, client);
    }

    /// Takes the answer to a client's request. True if the server is to stop.
    fn answer(&mut self, number: u64, next: Next) -> bool {
        let (response, stop) = match next {
            Next::Answer(response) => (response, false),
            Next::AnswerAndStop(response) => (response, true),
        };
        if let Some(client) = self.clients.get_mut(&number) {
            let keep_alive = client.waiting.take().unwrap_or(false) && !stop;
            client.closing |= !keep_alive;
            client.unsent = response.encode(keep_alive);
        }
        stop
    }

    /// Serves a client as far as it goes without waiting.
    fn turn(&mut self, number: u64, ask: &mut impl FnMut(Request, Reply)) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        let answers = &self.answers;
        let ask = |request: Request| {
            let answers = answers.clone();
            let client = number;
            ask(request, Reply { client, answers });
        };
        if let Err(error) = client.turn(ask) {
            log::debug!("a client of the API is gone: {error}");
            client.unsent.clear();
            client.waiting = None;
            client.closing = true;
        }
        let done = client.closing && client.waiting.is_none() && client.unsent.is_empty();
        let wanted = client.wanted();
        let unwatched = wanted != client.interest
            && epoll::modify(
                &self.epoll,
                &client.stream,
                epoll::EventData::new_u64(number),
                wanted,
            )
            .is_err();
        client.interest = wanted;
        if done || unwatched {
            self.clients.remove(&number);
            self.set_accepting(true);
        }
    }

    /// Drops a client that has closed its connection before it was answered: epoll would report that without end.
    fn leave(&mut self, number: u64) {
        let waits = |client: &Client| client.waiting.is_some();
        if self.clients.get(&number).is_some_and(waits) {
            log::debug!("a client of the API left before its answer");
            self.clients.remove(&number);
            self.set_accepting(true);
        }
    }

    /// Gives a client what is left of its last answer, with patience but not for ever.
    fn finish(&mut self, number: u64) {
        let Some(mut client) = self.clients.remove(&number) else {
            return;
        };
        let patience = Some(Duration::from_secs(1));
        let sent = client
            .stream
            .set_nonblocking(false)
            .and_then(|()| client.stream.set_write_timeout(patience))
            .and_then(|()| client.stream.write_all(&client.unsent));
        if let Err(error) = sent {
            log::debug!("the last answer was not taken: {error}");
        }
    }
}

impl Client {
    fn wanted(&self) -> epoll::EventFlags {
        match self.waiting {
            Some(_) => epoll::EventFlags::empty(),
            None if self.unsent.is_empty() => epoll::EventFlags::IN,
            None => epoll::EventFlags::OUT,
        }
    }

    /// Sends, reads and asks until it would have to wait.
    fn turn(&mut self, mut ask: impl FnMut(Request)) -> io::Result<()> {
        loop {
            self.send()?;
            if !self.unsent.is_empty() || self.closing || self.waiting.is_some() {
                return Ok(());
            }
            match self.connection.next() {
                Parsed::Request(request, keep_alive) => {
                    self.waiting = Some(keep_alive);
                    ask(request);
                }
                Parsed::Continue => self.unsent = b"HTTP/1.1 100 \r\n\r\n".to_vec(),
                Parsed::Refuse(response) => {
                    self.closing = true;
                    self.unsent = response.encode(false);
                }
                Parsed::Incomplete => {
                    if !self.read()? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what there is. False if that is nothing, for now or for ever.
    fn read(&mut self) -> io::Result<bool> {
        let mut bytes = [0; READ_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.stream, &mut parts, &mut control, flags) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(false),
            other => other?,
        };
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        self.connection
            .receive(&bytes[..received.bytes], fds.flatten());
        if received.bytes == 0 {
            self.closing = true;
        }
        Ok(received.bytes > 0)
    }
}

#[cfg(test)]
mod tests;
