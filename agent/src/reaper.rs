//! Who has ended, and how. One thread waits for every child, of the agent's own and orphans that
//! became its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::sys::{self, pid_t};

/// How one process ends.
#[derive(Debug)]
pub(crate) struct End {
    status: Mutex<Option<u8>>,
    known: Condvar,
    /// A descriptor that is readable once the process's end is known.
    event: OwnedFd,
    /// The `cgroup.kill` of what is to end with the process.
    rest: OnceLock<File>,
}

impl End {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            status: Mutex::default(),
            known: Condvar::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
            rest: OnceLock::new(),
        })
    }

    /// Has all processes of a cgroup killed, by its `cgroup.kill`, when this one ends. Only the first
    /// one counts.
    pub(crate) fn takes_along(&self, rest: File) {
        // If it is told of meanwhile, one of the two sees what the other did.
        let _ = self.rest.set(rest);
        if self.is_known() {
            self.kill_rest();
        }
    }

    fn kill_rest(&self) {
        if let Some(mut rest) = self.rest.get() {
            // A cgroup that is gone has no processes.
            let _ = rest.write_all(b"1");
        }
    }

    /// A descriptor that is readable once the process's end is known.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Waits for it: the process's own status, or 128 + N if signal N ended it.
    pub(crate) fn wait(&self) -> u8 {
        let mut status = self.status.lock().expect("a panic ends the process");
        loop {
            match *status {
                Some(status) => return status,
                None => status = self.known.wait(status).expect("a panic ends the process"),
            }
        }
    }

    /// Waits for it at most so long.
    pub(crate) fn wait_for(&self, time: Duration) -> Option<u8> {
        let status = self.status.lock().expect("a panic ends the process");
        let waited = self
            .known
            .wait_timeout_while(status, time, |status| status.is_none());
        *waited.expect("a panic ends the process").0
    }

    /// Whether the process's end is known.
    pub(crate) fn is_known(&self) -> bool {
        self.status
            .lock()
            .expect("a panic ends the process")
            .is_some()
    }

    pub(crate) fn tell(&self, status: u8) {
        let mut known = self.status.lock().expect("a panic ends the process");
        self.kill_rest();
        *known = Some(status);
        drop(known);
        // Its count is far from its end.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        self.known.notify_all();
    }
}

/// Knows whose end is waited for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    children: Mutex<Children>,
    born: Condvar,
}

#[derive(Debug, Default)]
struct Children {
    expected: HashMap<pid_t, Arc<End>>,
    /// How many births are under way whose children are not known yet.
    births: usize,
    /// Who ended meanwhile and was not expected.
    strangers: HashMap<pid_t, u8>,
}

impl Children {
    fn expect(&mut self, pid: pid_t, end: &Arc<End>) {
        self.expected.insert(pid, Arc::clone(end));
    }

    /// One that was waited for has ended. Whom to tell.
    fn ended(&mut self, pid: pid_t, status: u8) -> Option<Arc<End>> {
        let end = self.expected.remove(&pid);
        if end.is_none() && self.births > 0 {
            self.strangers.insert(pid, status);
        }
        end
    }
}

impl Shared {
    fn children(&self) -> MutexGuard<'_, Children> {
        self.children.lock().expect("a panic ends the process")
    }
}

/// A child's start, until all that came of it is known.
#[derive(Debug)]
pub(crate) struct Birth(Arc<Shared>);

impl Birth {
    /// A child that is there already, as another one told. It may have ended.
    pub(crate) fn adopt(&self, pid: pid_t) -> io::Result<Arc<End>> {
        let end = Arc::new(End::new()?);
        let mut children = self.0.children();
        if children.expected.contains_key(&pid) {
            return Err(io::Error::other("another process is taken for its own"));
        }
        match children.strangers.remove(&pid) {
            Some(status) => end.tell(status),
            None => {
                children.expect(pid, &end);
                self.0.born.notify_all();
            }
        }
        Ok(end)
    }

    /// A pidfd of a child. None if it has ended and was taken note of.
    pub(crate) fn handle(&self, pid: pid_t) -> io::Result<Option<OwnedFd>> {
        // Its number is its own until it is taken note of, which the reaper's thread cannot do
        // while this lock is held.
        let children = self.0.children();
        let pid = Pid::from_raw(pid).filter(|_| children.expected.contains_key(&pid));
        let handle = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        Ok(handle.transpose()?)
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut children = self.0.children();
        children.births -= 1;
        if children.births == 0 {
            children.strangers = HashMap::new();
        }
    }
}

impl Reaper {
    /// Starts the thread that waits.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let shared = Arc::clone(&reaper.0);
        thread::Builder::new()
            .name("reaper".into())
            .spawn(move || {
                loop {
                    reap_next(&shared);
                }
            })?;
        Ok(reaper)
    }

    /// Starts a child by `spawn`, whose end will be known.
    pub(crate) fn expect(
        &self,
        spawn: impl FnOnce() -> io::Result<pid_t>,
    ) -> io::Result<(pid_t, Arc<End>, Birth)> {
        let end = Arc::new(End::new()?);
        // With this lock, the reaper's thread looks up a child that ends at once only after it was
        // added here.
        let mut children = self.0.children();
        let pid = spawn()?;
        children.expect(pid, &end);
        children.births += 1;
        self.0.born.notify_all();
        Ok((pid, end, Birth(Arc::clone(&self.0))))
    }
}

fn reap_next(shared: &Shared) {
    let Ok(pid) = sys::next_ended() else {
        // There is no child; one that is born meanwhile is seen at the next look.
        let children = shared.children();
        if children.expected.is_empty() {
            drop(shared.born.wait(children));
        }
        return;
    };
    let mut children = shared.children();
    let Some(status) = sys::reap(pid) else {
        return;
    };
    let end = children.ended(pid, status);
    drop(children);
    if let Some(end) = end {
        end.tell(status);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_ended_before_it_was_told_of_is_known_to_have() {
        let reaper = Reaper::default();
        let (pid, end, birth) = reaper.expect(|| Ok(70_000)).unwrap();
        let end_of = |pid, status| reaper.0.children().ended(pid, status);
        assert!(end_of(70_001, 137).is_none());
        assert_eq!(birth.adopt(70_001).unwrap().wait(), 137);
        assert!(birth.handle(70_001).unwrap().is_none());
        let late = birth.adopt(70_002).unwrap();
        assert!(birth.adopt(pid).is_err() && birth.adopt(70_002).is_err());
        drop(birth);
        assert!(end_of(70_003, 1).is_none());
        assert!(reaper.0.children().strangers.is_empty());
        end_of(70_002, 4).unwrap().tell(4);
        end_of(pid, 5).unwrap().tell(5);
        assert_eq!((late.wait(), end.wait()), (4, 5));
        assert_eq!(end.wait_for(Duration::ZERO), Some(5));
    }
    #[test]
    fn the_rest_is_killed_whether_the_end_is_known_before_or_after() {
        let killed = |is_known_first: bool| {
            let (mut kills, kill) = io::pipe().unwrap();
            let end = End::new().unwrap();
            if is_known_first {
                end.tell(0);
            }
            end.takes_along(OwnedFd::from(kill).into());
            if !is_known_first {
                end.tell(0);
            }
            drop(end);
            io::read_to_string(&mut kills).unwrap()
        };
        assert_eq!([killed(true), killed(false)], ["1", "1"]);
    }
}
