//! podvmm: one microVM, from its configuration to its end.
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
//! | `inbox`, `host` | what everybody tells `control`; what the host is and offers |

mod build;
mod console;
mod host;
mod inbox;
mod machine;
mod memory;
pub mod programs;
mod snapshot;
mod vm;

pub use inbox::{EXIT_FAILURE, Ending};
pub use snapshot::{FormatError, Loaded, RestoreError};
