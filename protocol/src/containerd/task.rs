//! Requests of containerd for tasks, and their answers.

include!(concat!(env!("OUT_DIR"), "/containerd.task.rs"));

/// The service every shim offers. Its messages are the same in both versions.
pub const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// States of [`StateResponse::status`].
pub mod status {
    pub const CREATED: i32 = 1;
    pub const RUNNING: i32 = 2;
    pub const STOPPED: i32 = 3;
    pub const PAUSED: i32 = 4;
}
