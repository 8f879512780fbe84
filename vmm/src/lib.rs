//! podvmm: one microVM on KVM, from its configuration to its end.
//!
//! [`VmBuilder`] starts a VM, booted or from a snapshot, [`Vm::run`] sees it to its [`Ending`], and a
//! [`Handle`] asks and orders it meanwhile. What it is made of says a [`VmConfig`](api::VmConfig); its
//! parts, and requests, are those of the HTTP API ([`api`]). `examples/boot.rs` and
//! `examples/restore.rs` are whole programs.
//!
//! A VM needs `/dev/kvm`, and descriptors: a few for each device, one for each connection. Of its process it
//! takes the signal SIGRTMIN, which makes vCPUs leave the guest, and it ends the process with status 119 if
//! another process gives the guest's RAM and goes away. It has neither filters of system calls nor a jail:
//! those are for a whole process, and the program `podvmm` sets them up. The process should ignore SIGXFSZ if
//! its files may be limited in size.
//!
//! # The house
//!
//! ```text
//! main ─▶ programs ─▶ vm::control ─▶ vm::lifecycle ─▶ build ─▶ Machine {vcpus, transports, io, ram}
//!             │            ▲                                        │
//!             └──▶ vm::service ─▶ inbox ◀───────────────────────────┘
//! ```
//!
//! `control` alone decides; vCPU threads run the guest and tell its inbox how that ended; the `io` loop serves
//! devices and waits on nothing but epoll. Rooms use those below them alone:
//!
//! | room | what |
//! |---|---|
//! | `programs` | what `podvmm` does by its first words, and the command line |
//! | `vm` | a VM's life, the one thread that decides over it, and its API |
//! | `build` | from a configuration to a machine, booted or restored |
//! | `snapshot` | a machine's state in files, saved and loaded |
//! | `machine` | what exists while a guest lives: vCPUs, devices on their loops |
//! | `console` | what goes between the guest's consoles and the host |
//! | `memory` | the guest's RAM, also as files, and from other processes |
//! | `inbox`, `host` | what other threads tell `control`; what the host is and offers |

mod build;
mod console;
mod host;
mod inbox;
mod machine;
mod memory;
mod programs;
mod snapshot;
mod vm;

pub use api;
pub use inbox::{EXIT_FAILURE, Ending, Site};
pub use programs::main;
pub use snapshot::{FormatError, Loaded, RestoreError};
pub use vm::service::ServiceError;
pub use vm::{Handle, StartError, Vm, VmBuilder};
