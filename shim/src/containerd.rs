//! What containerd and a node's user ask the shim for, and how.

pub(crate) mod arguments;
pub(crate) mod info;
pub(crate) mod orders;
pub(crate) mod pool;
pub(crate) mod runtime_class;
pub(crate) mod service;
pub(crate) mod start;
