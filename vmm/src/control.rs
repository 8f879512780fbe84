//! The inbox of a VM, and the one thread that decides what happens to it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use crate::command::Status;
use crate::ending::Ending;
use crate::machine::Machine;

/// What others tell `control`.
#[derive(Debug)]
pub enum Event {
    /// A vCPU or a device met the end of the guest.
    Ended(Ending),
    /// The agent reported.
    Status(Status),
    /// A signal asks podvmm to end.
    Signal(i32),
}

/// Makes the inbox and the way into it.
pub fn inbox() -> (Sender<Event>, Receiver<Event>) {
    channel()
}

/// Waits for the end of `machine`'s guest and says which one it was.
pub fn wait(machine: &Machine, inbox: &Receiver<Event>) -> Ending {
    loop {
        match inbox.recv_timeout(Machine::HALT_CHECK) {
            Ok(Event::Ended(ending)) => return ending,
            Ok(Event::Signal(signal)) => return Ending::Signal(signal),
            Ok(Event::Status(Status::Ready)) => log::info!("the agent starts the command"),
            Ok(Event::Status(Status::Exit(status))) => return Ending::Command(status),
            Ok(Event::Status(Status::Error(why))) => return Ending::Agent(why),
            Err(RecvTimeoutError::Timeout) => {
                if machine.is_halted() {
                    return Ending::Halted;
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the machine's vCPUs hold senders while it lives")
            }
        }
    }
}
