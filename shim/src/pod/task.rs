//! A container of the pod's, and its processes, as containerd sees them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, SystemTime};

use protocol::agent::oci;
use protocol::containerd::task::status;

use crate::agent::Target;
use crate::agent::stdio::{Close, Logger, Owner, Paths};
use crate::pod::size::Limits;
use crate::pod::spec::hooks::Hooks;

/// What a process that ended with its VM is said to have ended by: SIGKILL.
pub(crate) const KILLED: u32 = 128 + 9;

/// The status of a process that could not be started, as shells have it.
pub(crate) const NOT_STARTED: u32 = 127;

/// The largest status that a process can end with (wait(2)).
const MAX_STATUS: u32 = 255;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

impl State {
    /// The state as containerd's number.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Created => status::CREATED,
            Self::Running => status::RUNNING,
            Self::Paused => status::PAUSED,
            Self::Stopped(_) => status::STOPPED,
        }
    }

    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            _ => None,
        }
    }
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) target: Target,
    pub(crate) paths: Paths,
    /// What is to be run, of one that is not a container's first.
    pub(crate) spec: Option<oci::Process>,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the agent is starting the process.
    pub(crate) starts: AtomicBool,
    /// Whether the process was told to end at once, so that the shim does not wait for the readers
    /// of its output.
    pub(crate) killed: AtomicBool,
    /// What ends its input, while it runs.
    pub(crate) close: Mutex<Option<Arc<Close>>>,
    /// The program that takes its output, until both have ended.
    logger: Mutex<Option<Logger>>,
}

impl Process {
    pub(crate) fn new(target: Target, paths: Paths, spec: Option<oci::Process>) -> Self {
        Self {
            target,
            paths,
            spec,
            state: Mutex::new(State::Created),
            changed: Condvar::new(),
            starts: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            close: Mutex::default(),
            logger: Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> State {
        *self.locked()
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }

    /// Changes the state unless it has ended. Says whether it did.
    pub(crate) fn enter(&self, state: State) -> bool {
        let mut now = self.locked();
        if matches!(*now, State::Stopped(_)) {
            return false;
        }
        *now = state;
        self.changed.notify_all();
        true
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) -> Exit {
        let mut state = self.locked();
        loop {
            match *state {
                State::Stopped(exit) => return exit,
                _ => state = self.changed.wait(state).expect("a panic ends the process"),
            }
        }
    }

    /// Waits for the end, but not on behalf of a caller who `is_gone`, after whom it looks each `period`.
    pub(crate) fn wait_for(&self, period: Duration, is_gone: impl Fn() -> bool) -> Option<Exit> {
        while !self.ends_within(period) {
            if is_gone() {
                return None;
            }
        }
        self.state().exit()
    }

    /// Waits for the end, but no longer than `patience`. Says whether it came.
    pub(crate) fn ends_within(&self, patience: Duration) -> bool {
        let runs = |state: &mut State| !matches!(state, State::Stopped(_));
        let waited = self
            .changed
            .wait_timeout_while(self.locked(), patience, runs);
        let (state, _) = waited.expect("a panic ends the process");
        matches!(*state, State::Stopped(_))
    }

    /// Ends its input.
    pub(crate) fn close_stdin(&self) {
        let close = self.close.lock().expect("a panic ends the process");
        close.iter().for_each(|close| close.close());
    }

    pub(crate) fn has_logger(&self, logger: Option<Logger>) {
        *self.logger.lock().expect("a panic ends the process") = logger;
    }

    /// Waits until the program that takes its output has all of it.
    pub(crate) fn end_logger(&self) {
        let logger = self.logger.lock().expect("a panic ends the process").take();
        logger.into_iter().for_each(Logger::end);
    }

    /// Whose output it is that this process writes, in a namespace of containerd's.
    pub(crate) fn owner<'a>(&'a self, namespace: &'a str) -> Owner<'a> {
        let Target { container, exec } = &self.target;
        let id = if exec.is_empty() { container } else { exec };
        Owner { namespace, id }
    }

    /// The status containerd knows, of what the agent says. Older agents of Kata's give the number
    /// of a signal as it is; after SIGKILL it can be nothing else.
    pub(crate) fn status(&self, said: u32) -> u32 {
        if said == 9 && self.is_given_up() {
            KILLED
        } else {
            said.min(MAX_STATUS)
        }
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) first: Arc<Process>,
    /// The thread of this shim that waits for its first process's end, once that runs. By its number
    /// containerd tells the containers of a pod from each other.
    pub(crate) thread: OnceLock<u32>,
    /// Processes other than the first, by containerd's name.
    pub(crate) execs: Mutex<HashMap<String, Arc<Process>>>,
    pub(crate) limits: Mutex<Limits>,
    /// The CPUs that it may use of the host's, as a list; empty for all.
    pub(crate) cpus: Mutex<String>,
    pub(crate) hooks: Hooks,
    /// What the host is to prefer when it runs out of memory.
    pub(crate) oom_score: i64,
}

impl Container {
    /// The process of this name; without one the first.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return Some(Arc::clone(&self.first));
        }
        let execs = self.execs.lock().expect("a panic ends the process");
        execs.get(exec_id).cloned()
    }

    pub(crate) fn cpus(&self) -> String {
        self.cpus.lock().expect("a panic ends the process").clone()
    }

    pub(crate) fn set_cpus(&self, cpus: &str) {
        *self.cpus.lock().expect("a panic ends the process") = cpus.into();
    }

    /// All of its processes, the first last.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let execs = self.execs.lock().expect("a panic ends the process");
        let mut all: Vec<_> = execs.values().cloned().collect();
        all.push(Arc::clone(&self.first));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_final_and_wakes_who_waits() {
        let target = Target {
            container: "c".into(),
            exec: String::new(),
        };
        let process = Arc::new(Process::new(target, Paths::default(), None));
        let waiting = std::thread::spawn({
            let process = Arc::clone(&process);
            move || process.wait().status
        });
        assert!(process.enter(State::Running));
        assert!(!process.ends_within(Duration::from_millis(1)));
        let soon = Duration::from_millis(1);
        assert_eq!(process.wait_for(soon, || true), None, "the caller is gone");
        assert!(process.enter(State::Stopped(Exit::now(7))));
        let exit = process.wait_for(soon, || true);
        assert_eq!(exit.map(|exit| exit.status), Some(7));
        assert!(process.ends_within(Duration::ZERO));
        assert!(!process.enter(State::Stopped(Exit::now(KILLED))));
        assert!(!process.enter(State::Running));
        assert_eq!(waiting.join().unwrap(), 7);
    }

    #[test]
    fn only_a_kill_makes_nine_a_signal() {
        let target = Target {
            container: "c".into(),
            exec: String::new(),
        };
        let process = Process::new(target, Paths::default(), None);
        assert_eq!([0, 9, 137].map(|said| process.status(said)), [0, 9, 137]);
        let of_no_process = [256, u32::MAX].map(|said| process.status(said));
        assert_eq!(of_no_process, [255, 255]);
        process.killed.store(true, Ordering::Relaxed);
        assert_eq!([0, 9, 15].map(|said| process.status(said)), [0, 137, 15]);
    }
}
