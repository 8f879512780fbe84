//! What a shim tells containerd of.

use prost_types::{Any, Timestamp};

use super::task::Mount;

/// The service of containerd that takes events.
pub const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";

#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardRequest {
    #[prost(message, optional, tag = "1")]
    pub envelope: Option<Envelope>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    #[prost(message, optional, tag = "1")]
    pub timestamp: Option<Timestamp>,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub topic: String,
    #[prost(message, optional, tag = "4")]
    pub event: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskIo {
    #[prost(string, tag = "1")]
    pub stdin: String,
    #[prost(string, tag = "2")]
    pub stdout: String,
    #[prost(string, tag = "3")]
    pub stderr: String,
    #[prost(bool, tag = "4")]
    pub terminal: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskCreate {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub bundle: String,
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    #[prost(message, optional, tag = "4")]
    pub io: Option<TaskIo>,
    #[prost(uint32, tag = "6")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskStart {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskDelete {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    #[prost(uint32, tag = "3")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "4")]
    pub exited_at: Option<Timestamp>,
    /// The process's identifier, if it is not the container's first.
    #[prost(string, tag = "5")]
    pub id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExit {
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process's identifier; a container's first process has the container's.
    #[prost(string, tag = "2")]
    pub id: String,
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    #[prost(uint32, tag = "4")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "5")]
    pub exited_at: Option<Timestamp>,
}

/// An event that names only its container: `TaskOOM`, `TaskPaused` or `TaskResumed`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskOnly {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExecAdded {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskExecStarted {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub pid: u32,
}

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
