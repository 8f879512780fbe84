//! podvmm: one microVM, from its configuration to its end.
//!
//! ```text
//! main ─▶ cli ─▶ run ─▶ builder ─▶ Machine {vcpus, transports, io, ram}
//!                 │                   │ events
//!                 └──▶ control ◀──────┘
//! ```
//!
//! `control` alone decides; vCPU threads run the guest and tell it how that
//! ended; the `io` loop serves devices and waits on nothing but epoll.

mod attach;
mod builder;
pub mod check;
pub mod cli;
mod command;
mod control;
mod ending;
mod guest;
mod host;
mod image;
mod io;
mod keyboard;
mod machine;
mod memory;
mod rootfs;
pub mod run;
mod signals;
mod terminal;
mod transcript;
mod vcpu;

pub use ending::{EXIT_FAILURE, Ending};
