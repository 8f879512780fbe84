//! A container of the pod's, and its processes, as containerd sees them. Where a process is in its life is in
//! `state`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use protocol::agent::oci;

use crate::agent::Target;
use crate::agent::stdio::{Close, Logger, Owner, Paths};
use crate::pod::error::Error;
use crate::pod::size::Limits;
use crate::pod::spec::hooks::Hooks;
use crate::pod::state::{Exit, Refused, State};

/// What a process that ended with its VM is said to have ended by: SIGKILL.
pub(crate) const KILLED: u32 = 128 + 9;

/// The status of a process that could not be started, as shells have it.
pub(crate) const NOT_STARTED: u32 = 127;

/// The largest status that a process can end with (wait(2)).
const MAX_STATUS: u32 = 255;

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) target: Target,
    pub(crate) paths: Paths,
    /// What is to be run, of one that is not a container's first.
    pub(crate) spec: Option<oci::Process>,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the process was told to end at once, so that the shim does not wait for the readers
    /// of its output. This is no state of its own: one that runs, is paused or starts can be killed, and
    /// its exit status is read by it once it has ended.
    killed: AtomicBool,
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

    /// Takes a step to another state, or says why that is refused. Returns the state before.
    pub(crate) fn change(
        &self,
        step: impl FnOnce(State) -> Result<State, Refused>,
    ) -> Result<State, Error> {
        let mut state = self.locked();
        let before = *state;
        *state = step(before).map_err(|refused| self.refusal(refused))?;
        self.changed.notify_all();
        Ok(before)
    }

    /// Has containerd delete it, which is refused before its end. Returns the end.
    pub(crate) fn delete(&self) -> Result<Exit, Error> {
        let step = match self.target.exec.as_str() {
            "" => State::deleted,
            _ => State::deleted_exec,
        };
        self.change(step)?;
        Ok(self.state().exit().expect("what was deleted has ended"))
    }

    /// An error unless the process is in that state.
    pub(crate) fn expect(&self, wanted: State) -> Result<(), Error> {
        let met = self.state().expect(wanted);
        met.map_err(|refused| self.refusal(refused))
    }

    /// Why containerd is told that a step was refused.
    fn refusal(&self, refused: Refused) -> Error {
        match refused {
            Refused::State { is, wanted } => Error::State {
                what: self.name().into(),
                is,
                wanted,
            },
            Refused::Deleted => Error::NotFound(self.target.to_string()),
        }
    }

    /// Containerd's name of it: that of its container, or the one of an exec.
    pub(crate) fn name(&self) -> &str {
        let Target { container, exec } = &self.target;
        if exec.is_empty() { container } else { exec }
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
        let runs = |state: &mut State| state.exit().is_none();
        let waited = self
            .changed
            .wait_timeout_while(self.locked(), patience, runs);
        let (state, _) = waited.expect("a panic ends the process");
        state.exit().is_some()
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
        Owner {
            namespace,
            id: self.name(),
        }
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

    /// Notes that it was told to end at once. Returns whether that is new.
    pub(crate) fn give_up(&self) -> bool {
        !self.killed.swap(true, Ordering::Relaxed)
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
    use protocol::ttrpc::{Code, Status};

    fn process(exec: &str) -> Arc<Process> {
        let target = Target {
            container: "c".into(),
            exec: exec.into(),
        };
        Arc::new(Process::new(target, Paths::default(), None))
    }

    #[test]
    fn an_end_is_final_and_wakes_who_waits() {
        let process = process("");
        let waiting = std::thread::spawn({
            let process = Arc::clone(&process);
            move || process.wait_for(Duration::from_secs(60), || false)
        });
        process.change(State::begin).unwrap();
        process.change(State::started).unwrap();
        assert!(!process.ends_within(Duration::from_millis(1)));
        let soon = Duration::from_millis(1);
        assert_eq!(process.wait_for(soon, || true), None, "the caller is gone");
        let end = |status| process.change(|state| state.ended(Exit::now(status)));
        assert_eq!(end(7).unwrap(), State::Running);
        let exit = process.wait_for(soon, || true);
        assert_eq!(exit.map(|exit| exit.status), Some(7));
        assert!(process.ends_within(Duration::ZERO));
        end(KILLED).unwrap_err();
        process.change(State::begin).unwrap_err();
        assert_eq!(waiting.join().unwrap().map(|exit| exit.status), Some(7));
    }

    #[test]
    fn what_is_refused_names_the_process_as_containerd_does() {
        let said = |process: &Process, step: fn(State) -> Result<State, Refused>| {
            let before = process.state();
            let refused = process.change(step).unwrap_err();
            assert_eq!(process.state(), before);
            Status::from(refused)
        };
        let first = process("");
        let paused = said(&first, State::paused);
        let expected = (Code::FailedPrecondition, "c is created, not running");
        assert_eq!((paused.code, paused.message.as_str()), expected);
        let exec = process("e");
        exec.change(State::begin).unwrap();
        let again = said(&exec, State::begin);
        let expected = (Code::FailedPrecondition, "e is starting, not created");
        assert_eq!((again.code, again.message.as_str()), expected);
        exec.change(|state| state.ended(Exit::now(0))).unwrap();
        assert_eq!(exec.delete().unwrap().status, 0);
        let deleted = said(&exec, State::deleted_exec);
        let expected = (Code::NotFound, "there is no process e of c");
        assert_eq!((deleted.code, deleted.message.as_str()), expected);
    }

    #[test]
    fn of_two_that_start_a_process_one_does() {
        let process = process("e");
        let start = || process.change(State::begin).is_ok();
        let started = std::thread::scope(|scope| {
            let starts = [(); 8].map(|()| scope.spawn(start));
            starts.map(|start| start.join().unwrap())
        });
        assert_eq!(started.iter().filter(|it| **it).count(), 1);
    }

    #[test]
    fn only_a_kill_makes_nine_a_signal() {
        let process = process("");
        assert_eq!([0, 9, 137].map(|said| process.status(said)), [0, 9, 137]);
        let of_no_process = [256, u32::MAX].map(|said| process.status(said));
        assert_eq!(of_no_process, [255, 255]);
        assert!(process.give_up() && !process.give_up());
        assert_eq!([0, 9, 15].map(|said| process.status(said)), [0, 137, 15]);
    }
}
