//! What the shim uses of the node: its systemd, networks, processors, processes and folders.

pub(crate) mod cpus;
pub(crate) mod labels;
pub(crate) mod logging;
pub(crate) mod network;
pub(crate) mod phases;
pub(crate) mod place;
pub(crate) mod process;
pub(crate) mod record;
pub(crate) mod systemd;
pub(crate) mod turn;
