//! Why a request was refused, and the HTTP status that says so.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::JsonError;

/// A refusal.
#[derive(Debug, Error)]
pub enum ApiError {
    #[error("{0}: there is no such endpoint")]
    NoSuchEndpoint(String),
    #[error("{path} takes {expected}, not {found}")]
    Method {
        path: String,
        expected: &'static str,
        found: String,
    },
    #[error("there is no device '{0}'")]
    NoSuchDevice(String),
    /// JSON that does not parse, or not as what is wanted.
    #[error("the body is not what {request} takes")]
    Body {
        request: &'static str,
        source: JsonError,
    },
    /// A state in which the request makes no sense.
    #[error("{request}: the VM is {state}, it must be {needed}")]
    State {
        request: &'static str,
        state: State,
        needed: &'static str,
    },
    /// A snapshot takes the time it needs, and what would change the VM has to wait for it.
    #[error("{request}: a snapshot of the VM is being written; wait for its answer")]
    Busy { request: &'static str },
    /// A VM that cannot be, for a reason the client can do something about. Outermost cause first.
    #[error("{}", .0.join(": "))]
    Impossible(Vec<String>),
    /// The host failed. Outermost cause first.
    #[error("{}", .0.join(": "))]
    Host(Vec<String>),
    /// podvmm is on its way out.
    #[error("podvmm is ending")]
    Ending,
}

/// Where in its life a VM is, in Cloud Hypervisor's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// There is no VM.
    #[serde(rename = "not created")]
    None,
    Created,
    Running,
    Paused,
    Shutdown,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "not created",
            Self::Created => "Created",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
        })
    }
}

impl ApiError {
    /// The HTTP status for it (RFC 9110 §15).
    pub fn status(&self) -> u16 {
        match self {
            Self::Body { .. } | Self::Impossible(_) => 400,
            Self::NoSuchEndpoint(_) | Self::NoSuchDevice(_) => 404,
            Self::Method { .. } => 405,
            Self::State { .. } | Self::Busy { .. } => 409,
            Self::Host(_) => 500,
            Self::Ending => 503,
        }
    }

    /// The error and its causes, outermost first.
    pub fn chain(&self) -> Vec<String> {
        match self {
            Self::Impossible(chain) | Self::Host(chain) => chain.clone(),
            other => chain(other),
        }
    }
}

/// An error and its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> Vec<String> {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What the user reads of `error`, in which nothing is said twice.
    pub(crate) fn printed(error: &dyn std::error::Error) -> String {
        let causes = chain(error);
        for pair in causes.windows(2) {
            assert!(!pair[0].contains(&pair[1]), "said twice: {causes:?}");
        }
        causes.join(": ")
    }
}
