//! Requests of containerd for tasks, and their answers.

include!(concat!(env!("OUT_DIR"), "/containerd.task.rs"));

/// The service every shim offers. Its messages are the same in both versions.
pub const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
