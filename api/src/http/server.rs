//! One thread that serves every client of a unix socket.
//!
//! It waits for all of them at once, so a slow one delays nobody, and reads from none whose last
//! answer is not taken yet, so none makes it hold more than a request and an answer.

use std::collections::HashMap;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::connection::{Connection, MAX_FDS, Parsed};
use super::message::{Request, Response};

/// Clients served at once; more wait to be accepted.
const MAX_CLIENTS: usize = 1024;
/// Answers to one client before others get their turn.
const TURN: usize = 16;
const READ_SIZE: usize = 16 << 10;
const RETRY: Duration = Duration::from_millis(10);
const LISTENER: u64 = 0;

/// What the server is to do after an answer.
#[derive(Debug)]
pub enum Next {
    Answer(Response),
    /// Answer, and serve nobody any more once the client has the answer or is gone.
    AnswerAndStop(Response),
}

/// A socket that is listened on, and its clients.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    epoll: OwnedFd,
    clients: HashMap<u64, Client>,
    last_client: u64,
    accepting: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    connection: Connection,
    /// Bytes of answers that the client has not taken yet.
    unsent: Vec<u8>,
    /// Its turn was over before its requests were.
    more: bool,
    /// No more requests are read; it is closed once all is sent.
    closing: bool,
    /// What it is watched for.
    interest: epoll::EventFlags,
}

impl Server {
    /// A server of the clients that connect to `listener`.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let server = Self {
            listener,
            epoll,
            clients: HashMap::new(),
            last_client: LISTENER,
            accepting: true,
        };
        server.watch(LISTENER, server.listener.as_fd(), epoll::EventFlags::IN)?;
        Ok(server)
    }

    /// Serves clients with what `answer` says, one request at a time in the order they come, until
    /// it says stop or `stop` is readable.
    pub fn serve(
        &mut self,
        stop: BorrowedFd<'_>,
        mut answer: impl FnMut(Request) -> Next,
    ) -> io::Result<()> {
        const STOP: u64 = u64::MAX;
        self.watch(STOP, stop, epoll::EventFlags::IN)?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 64];
        loop {
            let (events, _) = match epoll::wait(&self.epoll, &mut events, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            for event in events {
                match event.data.u64() {
                    STOP => return Ok(()),
                    LISTENER => self.accept(),
                    number => {
                        if self.turn(number, &mut answer) {
                            self.finish(number);
                            return Ok(());
                        }
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
                    // No descriptor is free, say. Whoever waits does so until a client leaves, or
                    // something else does.
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
            unsent: Vec::new(),
            more: false,
            closing: false,
            interest,
        };
        self.clients.insert(number, client);
    }

    /// Serves a client as far as it goes without waiting. True if the server is to stop.
    fn turn(&mut self, number: u64, answer: &mut impl FnMut(Request) -> Next) -> bool {
        let Some(client) = self.clients.get_mut(&number) else {
            return false;
        };
        let stop = match client.turn(answer) {
            Ok(stop) => stop,
            Err(error) => {
                log::debug!("a client of the API is gone: {error}");
                client.unsent.clear();
                client.closing = true;
                false
            }
        };
        let done = client.closing && client.unsent.is_empty();
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
        if (done || unwatched) && !stop {
            self.clients.remove(&number);
            self.set_accepting(true);
        }
        stop
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
        if self.unsent.is_empty() && !self.more {
            epoll::EventFlags::IN
        } else {
            epoll::EventFlags::OUT
        }
    }

    /// Sends, reads and answers until it would have to wait. True if the server is to stop.
    fn turn(&mut self, answer: &mut impl FnMut(Request) -> Next) -> io::Result<bool> {
        self.more = false;
        let mut answers = 0;
        loop {
            self.send()?;
            if !self.unsent.is_empty() || self.closing {
                return Ok(false);
            }
            if answers == TURN {
                self.more = true;
                return Ok(false);
            }
            match self.connection.next() {
                Parsed::Request(request, keep_alive) => {
                    answers += 1;
                    self.closing = !keep_alive;
                    match answer(request) {
                        Next::Answer(response) => self.unsent = response.encode(keep_alive),
                        Next::AnswerAndStop(response) => {
                            self.unsent = response.encode(false);
                            return Ok(true);
                        }
                    }
                }
                Parsed::Continue => self.unsent = b"HTTP/1.1 100 \r\n\r\n".to_vec(),
                Parsed::Refuse(response) => {
                    self.closing = true;
                    self.unsent = response.encode(false);
                }
                Parsed::Incomplete => {
                    if !self.read()? {
                        return Ok(false);
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
