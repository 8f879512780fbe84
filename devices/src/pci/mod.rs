//! PCI, as much as a virtual machine needs (PCI Local Bus Specification 3.0): one bus with functions on
//! it, that a [`Bridge`] shows by configuration mechanism 1, and what functions are made of.
//!
//! ```text
//!  vCPU: ports 0xcf8, 0xcfc ─▶ Bridge ─▶ Function: configuration space
//!                                │  says where the BAR is
//!                                ▼
//!        load or store ──────▶ Bus ───▶ Function: memory behind its BAR
//!  function: event fd of a vector ─────▶ Host (KVM): a message to a local APIC
//! ```
//!
//! A [`Function`] knows nothing of the bridge. A device of the host's that is passed through would be another
//! one: it would need several BARs, some of which are mapped and not emulated, and an
//! [`Msix`] whose event fds the host's driver writes to.

mod bridge;
mod config;
mod events;
mod msix;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;

use std::fmt::Debug;
use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

pub use self::bridge::{AddError, Bridge, BridgeState, CONFIG_PORTS, CONFIG_PORTS_LEN, EventPorts};
pub use self::config::{BAR, COMMAND, ConfigSpace, Identity};
pub use self::msix::{EntryState, Msix};

/// A function on the bus: its configuration space, and as [`BusDevice`] the memory behind its BAR.
///
/// All of it runs with the function's lock held, on the vCPU thread that made the access.
pub trait Function: BusDevice + Debug {
    /// Reads register `register`, 0 to 63: four bytes of configuration space.
    fn read_config(&mut self, register: usize) -> u32;

    /// Writes those bits of a register that are in `mask`, which is whole bytes.
    fn write_config(&mut self, register: usize, value: u32, mask: u32);

    /// How long the memory behind its BAR is: a power of two.
    fn bar_len(&self) -> u64;

    /// Where the driver wants that memory to be. None if it is not to answer.
    fn wanted(&self) -> Option<u64>;

    /// Follows each move of the memory: it answers there from now on, or nowhere.
    fn moved(&mut self, address: Option<u64>);

    /// It is on the bus from now on, as the device of this number, or no more: no driver reaches it then, and its
    /// interrupts reach none.
    fn placed(&mut self, device: Option<u8>);
}

/// What a function has a processor's local APIC told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// What the host's kernel does for a function without anyone being asked: KVM's routes and event fds.
pub trait Host: Send + Sync + Debug {
    /// Has what is written to `event` sent as `message` for vector `vector`, what was written already too.
    fn deliver(&self, vector: u16, event: &EventFd, message: Message) -> io::Result<()>;

    /// Ends that: what is written from now on stays in `event`.
    fn keep(&self, vector: u16, event: &EventFd) -> io::Result<()>;

    /// Has the guest's stores to `address`, of whatever width, written to `event` instead.
    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Ends that.
    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
