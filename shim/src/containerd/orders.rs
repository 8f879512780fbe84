//! Which pod a shim is for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::containerd::arguments::Arguments;
use crate::host::place::Place;

/// By it containerd says where events go.
pub(crate) const EVENTS: &str = "TTRPC_ADDRESS";

/// What a shim is told of its pod, by its command line or where it waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) namespace: String,
    /// containerd's socket.
    address: String,
    /// Its socket for events.
    pub(crate) events: PathBuf,
    /// Of the pod.
    pub(crate) id: String,
    pub(crate) debug: bool,
    pub(crate) bundle: PathBuf,
    /// When it was asked for, as [`crate::host::phases::to_text`] writes it.
    pub(crate) asked: String,
}

impl Orders {
    /// As `arguments` and the environment say.
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
