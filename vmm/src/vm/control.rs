//! The one thread that decides what happens to the VM.
//!
//! All other threads report to its inbox or ask there, for vCPUs and devices, the agent, signals,
//! and clients of the API. Each client gets an answer of its own.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use api::{Answer, Request};
use protocol::contract::Status;
use serde_json::Value;

use crate::inbox::{Ending, Event};
use crate::vm::lifecycle::Lifecycle;

/// How often to look for what no thread reports: KVM does not tell that a vCPU has halted.
const TICK: Duration = Duration::from_secs(1);

/// Serves the inbox until the VM ends. It is stopped by then, if it can be, and a client that
/// still waits for an answer learns that there will be none.
pub(crate) fn serve(vm: &mut Lifecycle, events: Receiver<(u32, Event)>) -> Ending {
    let mut looked = Instant::now();
    let mut due = looked + TICK;
    let ending = loop {
        // This goes by the clock and does not wait for silence: a client or thread that sends much
        // must not put it off.
        let now = Instant::now();
        if now >= due {
            // First, as it says which vCPUs of the guest are parked for a moment and which for good.
            let sooner = vm.settle();
            if now >= looked + TICK {
                looked = now;
                if vm.has_halted() {
                    break Ending::Halted;
                }
            }
            due = now + sooner.map_or(TICK, |sooner| sooner.min(TICK));
        }
        match events.recv_timeout(due.duration_since(now)) {
            Ok((_, Event::Signal(signal))) => break Ending::Signal(signal),
            Ok((_, Event::Call(request, reply))) => match *request {
                Request::Exit => {
                    // The client is to hear it when it is so.
                    vm.stop();
                    reply.send(Ok(Answer::Exiting));
                    break Ending::Dismissed;
                }
                Request::Snapshot(snapshot) => vm.snapshot(snapshot, reply),
                request => reply.send(vm.answer(request)),
            },
            Ok((_, Event::Saved)) => vm.saved(),
            Ok((life, _)) if life != vm.life() => {}
            Ok((_, Event::Ended(ending))) => break ending,
            Ok((_, Event::Status(Status::Ready))) => {
                log::info!("the agent starts the command");
                vm.events().vm("agent-ready", Value::Null);
            }
            Ok((_, Event::Status(Status::Exit(status)))) => {
                break Ending::Command(status);
            }
            Ok((_, Event::Status(Status::Error(why)))) => {
                break Ending::Agent(why);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the VM holds a way into its inbox")
            }
        }
    };
    drop(events);
    match ending {
        Ending::Memory(_) => vm.abandon(),
        _ => vm.stop(),
    }
    ending
}
