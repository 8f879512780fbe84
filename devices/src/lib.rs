//! The bus, the legacy devices and the virtio devices a pod VM lives by.
//!
//! A leaf of the workspace: it knows guest memory, event fds and host files, and neither KVM nor
//! the configuration. The `vmm` crate decides which devices there are, puts them on a [`bus`],
//! joins their event fds to KVM and runs their handlers.
//!
//! To use it alone: make a device, such as [`virtio::blk::Blk`], activate it with guest memory and
//! its queues, and put the handlers that this gives on an event-manager loop. With the feature
//! `test-utils`, `virtio::testing` does so with a driver of its own, for tests and benchmarks.
//!
//! The guest is hostile. No byte it writes may make a device panic, wait for ever or grow; what
//! it gets wrong is counted, and answered with DEVICE_NEEDS_RESET or a dropped chain.

pub mod bus;
pub mod counter;
pub mod host;
pub mod legacy;
pub mod pci;
pub mod virtio;
