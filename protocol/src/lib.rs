//! What podvmm, its guest, its shim and containerd say to one another, and to their kernels, once, for all
//! who say it.
//!
//! | module | what |
//! |---|---|
//! | [`contract`] | files, ports, lines and paths on which the guest and the host agree |
//! | [`agent`] | the messages of the Kata agent's protocol |
//! | [`containerd`] | the messages of containerd's Task service, its events and figures |
//! | [`policy`] | which calls, devices and mounts the guest's agent obeys |
//! | [`ttrpc`] | how messages go over a stream |
//! | [`netlink`] | what the shim and the agent ask of their kernels about networks |
//!
//! The build generates the messages from the texts in `proto`, without `protoc`. They have what podvmm
//! uses, by the field numbers of those protocols.

pub mod agent;
pub mod containerd;
pub mod contract;
pub mod netlink;
pub mod policy;
pub mod ttrpc;
