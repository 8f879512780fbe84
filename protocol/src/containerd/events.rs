//! Events that a shim sends to containerd.

use prost_types::Any;

include!(concat!(env!("OUT_DIR"), "/containerd.events.rs"));

/// The service of containerd that takes events.
pub const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";

/// An event that containerd is told of.
#[derive(Debug)]
pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    Exit(TaskExit),
    Delete(TaskDelete),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Oom(TaskOnly),
    Paused(TaskOnly),
    Resumed(TaskOnly),
}

impl Event {
    /// The event's topic, and the event as a message with its type.
    pub fn envelope(&self) -> (&'static str, Any) {
        use super::any;
        match self {
            Self::Create(event) => ("/tasks/create", any("containerd.events.TaskCreate", event)),
            Self::Start(event) => ("/tasks/start", any("containerd.events.TaskStart", event)),
            Self::Exit(event) => ("/tasks/exit", any("containerd.events.TaskExit", event)),
            Self::Delete(event) => ("/tasks/delete", any("containerd.events.TaskDelete", event)),
            Self::ExecAdded(event) => (
                "/tasks/exec-added",
                any("containerd.events.TaskExecAdded", event),
            ),
            Self::ExecStarted(event) => (
                "/tasks/exec-started",
                any("containerd.events.TaskExecStarted", event),
            ),
            Self::Oom(event) => ("/tasks/oom", any("containerd.events.TaskOOM", event)),
            Self::Paused(event) => ("/tasks/paused", any("containerd.events.TaskPaused", event)),
            Self::Resumed(event) => (
                "/tasks/resumed",
                any("containerd.events.TaskResumed", event),
            ),
        }
    }
}
