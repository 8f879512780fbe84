//! podvmm: one microVM, from its configuration to its end.
//!
//! ```text
//! main ─▶ cli ─▶ run ─▶ control ─▶ lifecycle ─▶ build ─▶ Machine {vcpus, transports, io, ram}
//!                          ▲ ▲                                │
//!        clients ─▶ service┘ └──────────── events ────────────┘
//! ```
//!
//! `control` alone decides; vCPU threads run the guest and tell it how that
//! ended; the `io` loop serves devices and waits on nothing but epoll.

pub mod attach;
pub mod build;
pub mod check;
pub mod cli;
pub mod client;
pub mod command;
mod console_client;
pub mod control;
mod ending;
pub mod events;
pub mod guest;
mod handover;
pub mod host;
pub mod image;
mod io;
mod keyboard;
pub mod lifecycle;
pub mod machine;
pub mod memory;
mod metrics;
pub mod page_server;
pub mod remote_ram;
mod resize;
pub mod run;
pub mod service;
mod share;
mod signals;
pub mod snapshot;
pub mod socket_console;
pub mod streams;
mod tap;
mod terminal;
mod top;
mod transcript;
mod userfault;
pub mod vcpu;
mod vcpus;

pub use ending::{EXIT_FAILURE, Ending};
