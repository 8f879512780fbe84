//! The threads that serve devices: one loop they share, named `io`, and one of
//! its own for each handler that blocks.
//!
//! A loop waits only on epoll. Handlers reach it and leave it by ownership. A
//! thread that adds a handler waits until the loop is done with the event it is
//! at. A thread that recalls a handler waits for this only for a while: the host
//! may never finish what a handler asked of it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use devices::virtio::{Handler, Recall, Runner, Thread, Ticket};
use event_manager::{Error as EventError, EventManager, RemoteEndpoint, SubscriberId};

use crate::host::thread::Kind;

/// How long a loop that is to end is waited for. Its handlers have been recalled, with more patience.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// All loops of a VM. A thread lives until each device has released it that had it prepared; or, if none had, as
/// long as the VM.
#[derive(Debug, Default)]
pub(crate) struct IoThreads {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    loops: HashMap<Thread, Arc<Loop>>,
    /// How many devices have prepared a thread.
    users: HashMap<Thread, usize>,
    handlers: HashMap<u64, Running>,
    next_ticket: u64,
}

/// A handler that is on a loop.
#[derive(Debug)]
struct Running {
    home: Arc<Loop>,
    subscriber: SubscriberId,
    /// If it was recalled and has not come back.
    recall: Option<Leaving>,
}

/// A handler that leaves its loop after the event it is at.
#[derive(Debug)]
struct Leaving {
    /// Whether it still is to leave. Held while it does.
    wanted: Arc<Mutex<bool>>,
    back: Receiver<Box<dyn Handler>>,
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
        if let Some(home) = self.loops.get(&thread) {
            return Ok(home.clone());
        }
        let home = Arc::new(Loop::start(&thread)?);
        Ok(self.loops.entry(thread).or_insert(home).clone())
    }

    fn insert(&mut self, running: Running) -> Ticket {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.handlers.insert(ticket, running);
        Ticket(ticket)
    }
}

impl Runner for IoThreads {
    fn prepare(&self, thread: Thread) -> io::Result<()> {
        let mut table = self.table();
        table.loop_for(thread.clone())?;
        *table.users.entry(thread).or_default() += 1;
        Ok(())
    }

    fn release(&self, thread: Thread) {
        let mut table = self.table();
        let Some(users) = table.users.get_mut(&thread) else {
            return;
        };
        *users -= 1;
        if *users > 0 {
            return;
        }
        table.users.remove(&thread);
        let unused = table.loops.remove(&thread);
        // Others need not wait for the thread's end. A handler that is late keeps its loop.
        drop(table);
        drop(unused);
    }

    fn run(&self, handler: Box<dyn Handler>) -> io::Result<Ticket> {
        let mut table = self.table();
        let home = table.loop_for(handler.thread())?;
        let subscriber = home.add(handler)?;
        Ok(table.insert(Running {
            home,
            subscriber,
            recall: None,
        }))
    }

    fn recall(&self, ticket: Ticket, patience: Duration) -> Recall {
        let Some(mut running) = self.table().handlers.remove(&ticket.0) else {
            return Recall::Gone;
        };
        let leaving = match running.recall.take() {
            Some(leaving) => leaving,
            None => match running.home.remove(running.subscriber) {
                Ok(leaving) => leaving,
                Err(_) => return Recall::Gone,
            },
        };
        match leaving.back.recv_timeout(patience) {
            Ok(handler) => Recall::Back(handler),
            Err(RecvTimeoutError::Disconnected) => Recall::Gone,
            Err(RecvTimeoutError::Timeout) => {
                running.recall = Some(leaving);
                self.table().handlers.insert(ticket.0, running);
                Recall::Late(ticket)
            }
        }
    }

    fn keep(&self, ticket: Ticket) -> io::Result<Ticket> {
        let gone = || io::Error::other("the handler is gone");
        let mut running = self.table().handlers.remove(&ticket.0).ok_or_else(gone)?;
        if let Some(Leaving { wanted, back }) = running.recall.take() {
            *wanted.lock().expect("no thread panics while it holds it") = false;
            if let Ok(handler) = back.try_recv() {
                // It has left meanwhile.
                running.subscriber = running.home.add(handler)?;
            }
        }
        self.table().handlers.insert(ticket.0, running);
        Ok(ticket)
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
    fn start(thread: &Thread) -> io::Result<Self> {
        let (name, kind) = match thread {
            Thread::Io => ("io", Kind::Io),
            Thread::Own { name, work } => (name.as_str(), Kind::from(*work)),
        };
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let builder = Builder::new().name(name.into());
        let thread = kind.spawn(builder, move || {
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

    /// Has a handler leave after the event it is at, unless it is not to any more by then.
    fn remove(&self, subscriber: SubscriberId) -> Result<Leaving, EventError> {
        let wanted = Arc::new(Mutex::new(true));
        let (leave, back) = mpsc::channel();
        let still_wanted = wanted.clone();
        self.endpoint.fire(move |manager| {
            let wanted = still_wanted
                .lock()
                .expect("no thread panics while it holds it");
            if *wanted && let Ok(handler) = manager.remove_subscriber(subscriber) {
                // The handler is dropped here if no thread waits for it any more.
                let _ = leave.send(handler);
            }
        })?;
        Ok(Leaving { wanted, back })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // An empty call wakes the loop; it fails only when the loop has ended.
        let _ = self.endpoint.fire(|_| ());
        let Some(thread) = self.thread.take() else {
            return;
        };
        let deadline = Instant::now() + LAST_PATIENCE;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                let name = thread.thread().name().unwrap_or_default();
                log::error!("{name} is left behind: the host does not finish a request");
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if thread.join().is_err() {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use devices::virtio::{RingState, Work};
    use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const SHORT: Duration = Duration::from_millis(20);

    /// Has one event, which lasts until it is let go of.
    #[derive(Debug)]
    struct Slow {
        begun: mpsc::Sender<()>,
        end: Receiver<()>,
        event: EventFd,
    }

    impl MutEventSubscriber for Slow {
        fn init(&mut self, ops: &mut EventOps) {
            let events = Events::new_raw(self.event.as_raw_fd(), EventSet::IN);
            ops.add(events).expect("it is an eventfd");
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.event.read().expect("it is due");
            // The test may have no more interest.
            let _ = self.begun.send(());
            let _ = self.end.recv();
        }
    }

    impl Handler for Slow {
        fn thread(&self) -> Thread {
            Thread::Own {
                name: "slow".into(),
                work: Work::Disk,
            }
        }

        fn drain(&mut self) {}

        fn rings(&self) -> Vec<RingState> {
            Vec::new()
        }
    }

    /// A handler that is at its event, which ends by the sender.
    fn at_its_event(threads: &IoThreads) -> (Ticket, mpsc::Sender<()>, EventFd) {
        let (begun, begins) = mpsc::channel();
        let (ends, end) = mpsc::channel();
        let event = EventFd::new(0).unwrap();
        event.write(1).unwrap();
        let handler = Slow {
            begun,
            end,
            event: event.try_clone().unwrap(),
        };
        let ticket = threads.run(Box::new(handler)).unwrap();
        begins.recv_timeout(LONG).unwrap();
        (ticket, ends, event)
    }

    #[test]
    fn a_handler_that_is_late_comes_back_after_its_event() {
        let threads = IoThreads::default();
        let (ticket, ends, _event) = at_its_event(&threads);
        let Recall::Late(ticket) = threads.recall(ticket, SHORT) else {
            panic!("it cannot have come back");
        };
        ends.send(()).unwrap();
        assert!(matches!(threads.recall(ticket, LONG), Recall::Back(_)));
    }

    #[test]
    fn one_that_is_kept_goes_on_whether_it_has_left_or_not() {
        for has_left in [false, true] {
            let threads = IoThreads::default();
            let (ticket, ends, event) = at_its_event(&threads);
            let Recall::Late(ticket) = threads.recall(ticket, SHORT) else {
                panic!("it cannot have come back");
            };
            if has_left {
                ends.send(()).unwrap();
                thread::sleep(SHORT);
            }
            let ticket = threads.keep(ticket).unwrap();
            if !has_left {
                ends.send(()).unwrap();
            }
            // It is at its event once more, so it is on its loop.
            event.write(1).unwrap();
            ends.send(()).unwrap();
            let deadline = Instant::now() + LONG;
            while unread(&event) {
                assert!(Instant::now() < deadline, "it serves nothing");
                thread::sleep(Duration::from_millis(1));
            }
            assert!(matches!(threads.recall(ticket, LONG), Recall::Back(_)));
        }
    }

    fn unread(event: &EventFd) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        // SAFETY: `event` is open, and outlives the borrow.
        let event = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let mut poll_fd = [PollFd::new(&event, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut poll_fd, Some(&now)).expect("it is an eventfd") > 0
    }

    #[test]
    fn a_thread_ends_with_the_last_device_that_has_it() {
        let threads = IoThreads::default();
        let thread = Thread::Own {
            name: "shared".into(),
            work: Work::Disk,
        };
        let has_it = || threads.table().loops.contains_key(&thread);
        threads.prepare(thread.clone()).unwrap();
        threads.prepare(thread.clone()).unwrap();
        threads.release(thread.clone());
        assert!(has_it());
        threads.release(thread.clone());
        assert!(!has_it());
        threads.release(thread.clone());
        threads.prepare(thread.clone()).unwrap();
        assert!(has_it());
    }

    #[test]
    fn threads_that_never_finish_are_left_behind() {
        let threads = IoThreads::default();
        let (_ticket, _ends, _event) = at_its_event(&threads);
        let started = Instant::now();
        drop(threads);
        assert!(started.elapsed() < LAST_PATIENCE + LONG / 2);
    }
}
