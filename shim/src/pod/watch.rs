//! What goes on by itself as long as a pod's VM lives.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use protocol::containerd::events::{Event, TaskOnly};
use protocol::ttrpc::CallError;

use super::Pod;
use crate::pod::error::Error;
use crate::pod::guest::Guest;
use crate::pod::state::Exit;
use crate::pod::task::KILLED;

/// The time between looks at whether the guest's agent answers, by which its clock follows the
/// host's.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long the agent may take to answer before the guest is taken to hang.
const HEARTBEAT_PATIENCE: Duration = Duration::from_secs(30);

/// The time between a guest's words that it is out of memory.
const OOM_PAUSE: Duration = Duration::from_millis(200);

/// What goes on, on a thread of its own.
type Watch = fn(&Pod, &Guest);

impl Pod {
    /// Starts the threads.
    pub(super) fn watch(self: &Arc<Self>, guest: &Arc<Guest>) -> Result<(), Error> {
        let watchers: [(&str, Watch); 3] = [
            ("end", Self::watch_end),
            ("oom", Self::watch_ooms),
            ("heartbeat", Self::watch_heart),
        ];
        for (name, watch) in watchers {
            let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
            let thread = thread::Builder::new()
                .name(name.into())
                .stack_size(64 << 10);
            thread
                .spawn(move || watch(&pod, &guest))
                .map_err(Error::Thread)?;
        }
        Ok(())
    }

    /// When the VM has ended, so has all in it.
    fn watch_end(&self, guest: &Guest) {
        guest.vm.life.wait();
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for container in containers {
            for process in container.processes() {
                // Of those that run, who waits for their end hears of it as well; one is first.
                self.ended(&container, &process, Exit::now(KILLED));
            }
        }
    }

    fn watch_ooms(&self, guest: &Guest) {
        // It ends with the VM, or with an agent that does not tell.
        while let Ok(container_id) = guest.agent.next_oom() {
            if self.container(&container_id).is_ok() {
                self.events.offer(Event::Oom(TaskOnly { container_id }));
            }
            // A guest may say so as often as it likes.
            thread::sleep(OOM_PAUSE);
        }
    }

    /// Keeps the guest's clock with the host's, and ends a VM whose agent does not answer.
    fn watch_heart(&self, guest: &Guest) {
        loop {
            thread::sleep(HEARTBEAT);
            if guest.vm.life.has_ended() {
                return;
            }
            match guest.greet(HEARTBEAT_PATIENCE) {
                Err(error) if guest.is_ending() => {
                    log::debug!("the guest's agent: {error}");
                    return;
                }
                Err(CallError::Late { .. }) => {
                    log::error!("the guest's agent does not answer, so its VM is ended");
                    guest.vm.kill();
                }
                // Without its connection nothing can be asked of it any more.
                Err(CallError::Gone(_) | CallError::Send { .. }) => {
                    log::error!("the connection to the guest's agent ended, and so does its VM");
                    guest.vm.kill();
                }
                Err(error) => log::debug!("the guest's agent: {error}"),
                Ok(()) => {}
            }
        }
    }
}
