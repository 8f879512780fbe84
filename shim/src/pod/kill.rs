//! Signals to a pod's processes, and that SIGKILL is the end of one.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use protocol::ttrpc::{CallError, Code};

use super::{Pod, SIGKILL, first_of};
use crate::pod::error::{Error, asked};
use crate::pod::guest::Guest;
use crate::pod::state::{Exit, State};
use crate::pod::task::{Container, KILLED, Process};

/// How long a guest that did not do as told may take to say that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// How long a process may take to end once the guest has taken the SIGKILL for it. It has no say in
/// that, but its guest's kernel may be busy with what it leaves behind.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

impl Pod {
    /// Signals a process. A guest that does not even kill is ended.
    pub(crate) fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        match process.state() {
            State::Stopped(_) | State::Deleted(_) => {
                let what = if exec_id.is_empty() { id } else { exec_id };
                return Err(Error::NotFound(format!("process of {what}: it has ended")));
            }
            // Not while it is being started either: then it would start all the same.
            State::Created | State::Starting if !exec_id.is_empty() => {
                return Err(Error::NotFound(format!("process {exec_id} in {id} yet")));
            }
            State::Created => {
                self.drop_created(&container);
                return Ok(());
            }
            // A first process that is being started is there, and is signalled by the agent.
            State::Starting | State::Running | State::Paused => {}
        }
        let guest = self.guest()?;
        let is_kill = signal == SIGKILL;
        if is_kill && process.give_up() {
            insist(&guest, &process)?;
        }
        // All of a container are signalled by what stands for it.
        let target = if all {
            first_of(id)
        } else {
            process.target.clone()
        };
        match guest.agent.signal(&target, signal) {
            Err(error @ CallError::Late { .. })
                if is_kill || guest.agent.check(SIGN_OF_LIFE).is_err() =>
            {
                log::error!("kill {id} {exec_id}: {error}, so its VM is ended");
                guest.vm.kill();
                Ok(())
            }
            // With its VM it has ended.
            Err(CallError::Gone(_) | CallError::Send { .. }) => {
                guest.vm.kill();
                Ok(())
            }
            // It has ended meanwhile.
            Err(CallError::Refused(status)) if status.code == Code::NotFound => Ok(()),
            answer => answer.map_err(asked("signal the process")),
        }
    }

    /// Ends a container that was never started.
    pub(super) fn drop_created(&self, container: &Container) {
        if let Ok(guest) = self.guest() {
            let target = &container.first.target;
            if let Err(error) = guest.agent.signal(target, 9) {
                log::warn!("{}: {error}", container.id);
            }
        }
        self.ended(container, &container.first, Exit::now(KILLED));
    }
}

/// Sees to it that a process ends that is killed. A guest whose kernel or agent keeps it all the same
/// is ended: what it answers to a signal is only its word.
fn insist(guest: &Arc<Guest>, process: &Arc<Process>) -> Result<(), Error> {
    let (guest, process) = (Arc::clone(guest), Arc::clone(process));
    let wait = move || {
        if !process.ends_within(LAST_PATIENCE) {
            log::error!(
                "{}: {} s after SIGKILL it has not ended, so its VM is ended",
                process.target,
                LAST_PATIENCE.as_secs()
            );
            guest.vm.kill();
        }
    };
    let thread = thread::Builder::new()
        .name("insist".into())
        .stack_size(64 << 10);
    thread.spawn(wait).map(drop).map_err(Error::Thread)
}
