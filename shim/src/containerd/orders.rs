//! Which pod a shim is for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::containerd::arguments::Arguments;
use crate::host::place::Place;

/// The environment variable by which containerd says where events go.
pub(crate) const EVENTS: &str = "TTRPC_ADDRESS";

/// What a shim is told of its pod, by its command line or where it waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) namespace: String,
    /// The path of containerd's socket.
    address: String,
    /// The path of containerd's socket for events.
    pub(crate) events: PathBuf,
    /// The pod's identifier, as containerd has it.
    pub(crate) id: String,
    pub(crate) debug: bool,
    pub(crate) bundle: PathBuf,
    /// When the shim was asked for, as [`crate::host::phases::to_text`] writes it.
    pub(crate) asked: String,
}

impl Orders {
    /// The orders that `arguments` and the environment say.
    pub(crate) fn new(arguments: &Arguments, bundle: &Path, asked: String) -> Self {
        let said = || std::env::var_os(EVENTS).map(PathBuf::from);
        let events = arguments.events.clone().or_else(said);
        Self {
            namespace: arguments.namespace.clone(),
            address: arguments.address.clone(),
            events: events.unwrap_or_else(|| format!("{}.ttrpc", arguments.address).into()),
            id: arguments.id.clone(),
            debug: arguments.debug,
            bundle: bundle.into(),
            asked,
        }
    }

    pub(crate) fn place(&self) -> Place {
        Place::new(&self.address, &self.namespace, &self.id)
    }
}
