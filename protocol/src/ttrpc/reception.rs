//! Takes in connections. The thread that takes one in serves it, and answers its first requests
//! before another thread is woken to wait for the next connection: where the kernel is interpreted,
//! a thread that is made or woken costs more than an answer.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{Service, Workers, frame, serve};

/// Threads that wait at first.
const SPARE: usize = 3;
/// How long others wait for one who has connected and says nothing.
const PATIENCE: Duration = Duration::from_millis(100);

/// Waits for the next who connects, and gives the connection, or none if it is not to be served.
type Accept = Box<dyn Fn() -> io::Result<Option<OwnedFd>> + Send>;

struct Reception {
    /// Held by who waits for the next connection.
    accept: Mutex<Accept>,
    /// How many threads serve no connection.
    free: AtomicUsize,
    service: Arc<dyn Service>,
    workers: Workers,
    complain: fn(&io::Error),
}

/// Serves all whom `accept` lets in, on threads of its own, and tells `complain` who could not be.
pub fn receive(
    accept: impl Fn() -> io::Result<Option<OwnedFd>> + Send + 'static,
    service: Arc<dyn Service>,
    complain: fn(&io::Error),
) -> io::Result<()> {
    let reception = Arc::new(Reception {
        accept: Mutex::new(Box::new(accept)),
        free: AtomicUsize::new(0),
        service,
        workers: Workers::default(),
        complain,
    });
    (0..SPARE).try_for_each(|_| reception.spawn())
}

impl Reception {
    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        self.free.fetch_add(1, Ordering::SeqCst);
        let reception = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("connection".into())
            .stack_size(Workers::STACK);
        let spawned = thread.spawn(move || {
            reception.rehearse();
            loop {
                if let Err(error) = reception.take_in() {
                    (reception.complain)(&error);
                }
            }
        });
        if spawned.is_err() {
            self.free.fetch_sub(1, Ordering::SeqCst);
        }
        spawned.map(drop)
    }

    /// Answers a request that no client made, so that this thread has the memory for an answer
    /// before a client waits for one.
    fn rehearse(&self) {
        let mut nonsense = Vec::new();
        let written = frame::write(&mut nonsense, 0, frame::REQUEST, &[]);
        written.expect("there is memory for ten bytes");
        let _ = serve(&nonsense[..], io::sink(), &self.service, &self.workers);
    }

    /// Waits for one connection, and serves it to its end.
    fn take_in(self: &Arc<Self>) -> io::Result<()> {
        let turn = self.accept.lock().expect("a panic ends the process");
        let Some(stream) = turn()? else {
            return Ok(());
        };
        let stream = Arc::new(stream);
        let was_last = self.free.fetch_sub(1, Ordering::SeqCst) == 1;
        let served = match was_last {
            true => self.spawn(),
            false => Ok(()),
        };
        if served.is_ok() {
            let reader = Reader {
                stream: Arc::clone(&stream),
                turn: Some(turn),
                is_first: true,
            };
            // A host that says nonsense, or is gone, has ended its connection and no more.
            let _ = serve(reader, Writer(stream), &self.service, &self.workers);
        }
        self.free.fetch_add(1, Ordering::SeqCst);
        served
    }
}

/// Holds the turn to listen while the first requests are read and answered.
struct Reader<'a> {
    stream: Arc<OwnedFd>,
    turn: Option<MutexGuard<'a, Accept>>,
    is_first: bool,
}

impl Read for Reader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let is_first = std::mem::take(&mut self.is_first);
        if self.turn.is_some() && !(is_first && self.is_ready()) {
            self.turn = None;
        }
        let (read, _) = recv(&*self.stream, bytes, RecvFlags::empty())?;
        Ok(read)
    }
}

impl Reader<'_> {
    /// Whether there is something to read, now or soon.
    fn is_ready(&self) -> bool {
        let mut stream = [PollFd::new(&*self.stream, PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE).expect("it is short");
        matches!(poll(&mut stream, Some(&patience)), Ok(1))
    }
}

struct Writer(Arc<OwnedFd>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(&*self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
