//! Who has ended, and how. One thread waits for every child, of the agent's own and orphans that
//! became its own.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use crate::sys::{self, pid_t};

/// How one process ends.
#[derive(Debug, Default)]
pub(crate) struct End {
    status: Mutex<Option<u8>>,
    known: Condvar,
}

impl End {
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

    /// Whether it has.
    pub(crate) fn is_known(&self) -> bool {
        self.status
            .lock()
            .expect("a panic ends the process")
            .is_some()
    }

    fn tell(&self, status: u8) {
        *self.status.lock().expect("a panic ends the process") = Some(status);
        self.known.notify_all();
    }
}

/// Knows whose end is waited for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    expected: Mutex<HashMap<pid_t, Arc<End>>>,
    born: Condvar,
}

impl Shared {
    fn expected(&self) -> MutexGuard<'_, HashMap<pid_t, Arc<End>>> {
        self.expected.lock().expect("a panic ends the process")
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
    ) -> io::Result<(pid_t, Arc<End>)> {
        // Whoever has just ended is not looked up before it is here.
        let mut expected = self.0.expected();
        let pid = spawn()?;
        let end = Arc::<End>::default();
        expected.insert(pid, Arc::clone(&end));
        self.0.born.notify_all();
        Ok((pid, end))
    }
}

fn reap_next(shared: &Shared) {
    let Ok(pid) = sys::next_ended() else {
        // There is no child; one that is born meanwhile is seen at the next look.
        let expected = shared.expected();
        if expected.is_empty() {
            drop(shared.born.wait(expected));
        }
        return;
    };
    let mut expected = shared.expected();
    let Some(status) = sys::reap(pid) else {
        return;
    };
    let end = expected.remove(&pid);
    drop(expected);
    if let Some(end) = end {
        end.tell(status);
    }
}
