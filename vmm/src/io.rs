//! The threads that serve devices: one loop they share, named `io`, and one of
//! its own for each handler that blocks.
//!
//! A loop waits only on epoll. Handlers reach it and leave it by ownership;
//! whoever adds or recalls one waits for the event the loop is at.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};

use devices::virtio::{Handler, Runner, Thread, Ticket};
use event_manager::{Error as EventError, EventManager, RemoteEndpoint, SubscriberId};

/// All loops of a VM. Threads start when the first handler needs them.
#[derive(Debug, Default)]
pub(crate) struct IoThreads {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    shared: Option<Arc<Loop>>,
    handlers: HashMap<u64, (Arc<Loop>, SubscriberId)>,
    next_ticket: u64,
}

impl IoThreads {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("no thread panics while it holds the table")
    }
}

impl Table {
    fn loop_for(&mut self, thread: Thread) -> io::Result<Arc<Loop>> {
        match (thread, &self.shared) {
            (Thread::Own(name), _) => Ok(Arc::new(Loop::start(name)?)),
            (Thread::Io, Some(shared)) => Ok(shared.clone()),
            (Thread::Io, None) => {
                let shared = Arc::new(Loop::start("io".into())?);
                Ok(self.shared.insert(shared).clone())
            }
        }
    }
}

impl Runner for IoThreads {
    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket> {
        let mut table = self.table();
        let home = table.loop_for(handler.thread())?;
        let subscriber = home.add(handler)?;
        let ticket = table.next_ticket;
        table.next_ticket += 1;
        table.handlers.insert(ticket, (home, subscriber));
        Ok(Ticket(ticket))
    }

    fn recall(&self, ticket: Ticket) -> Option<Box<dyn Handler>> {
        let (home, subscriber) = self.table().handlers.remove(&ticket.0)?;
        home.remove(subscriber).ok()
    }
}

/// One event loop and its thread. Dropping it ends the thread and the handlers
/// it still has.
struct Loop {
    endpoint: RemoteEndpoint<Box<dyn Handler>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loop {
    fn start(name: String) -> io::Result<Self> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = Builder::new().name(name).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    // epoll_wait fails only for arguments that are wrong from
                    // the start; going on would be a busy loop.
                    log::error!("device loop ended: {error}");
                    return;
                }
            }
        })?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    fn add(&self, handler: Box<dyn Handler>) -> io::Result<SubscriberId> {
        self.endpoint
            .call_blocking(move |manager| Ok::<_, EventError>(manager.add_subscriber(handler)))
            .map_err(io::Error::other)
    }

    fn remove(&self, subscriber: SubscriberId) -> Result<Box<dyn Handler>, EventError> {
        self.endpoint
            .call_blocking(move |manager| manager.remove_subscriber(subscriber))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // An empty call wakes the loop; it fails only when the loop has ended.
        let _ = self.endpoint.call_blocking(|_| Ok::<_, EventError>(()));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a device loop panicked");
        }
    }
}

impl std::fmt::Debug for Loop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loop")
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}
