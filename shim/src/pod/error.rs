//! Why containerd is told that something cannot be done.

use std::path::PathBuf;

use protocol::ttrpc::{CallError, Code, Status};

use crate::agent::{ReachError, stdio};
use crate::config;
use crate::host::logging::MAX_TEXT_CHARS;
use crate::host::network;
use crate::pod::spec::hooks;
use crate::pod::{cgroup, mounts, spec};
use crate::vm;

/// Why something cannot be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is no {0}")]
    NotFound(String),
    #[error("{0} is there already")]
    Exists(String),
    #[error("{what} is {is}, not {wanted}")]
    State {
        what: String,
        is: &'static str,
        wanted: &'static str,
    },
    #[error("the pod has no VM")]
    NoVm,
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error(transparent)]
    Reach(#[from] ReachError),
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error("the guest's agent: {act}")]
    Agent {
        act: &'static str,
        source: CallError,
    },
    #[error("start a thread")]
    Thread(#[source] std::io::Error),
    #[error("read random numbers")]
    Random(#[source] std::io::Error),
    #[error("make a folder for the VM")]
    Folder(#[source] std::io::Error),
    #[error("the pool {}", .folder.display())]
    Pool {
        folder: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "there can be no template: templates are off, or the pods' default is too small for one"
    )]
    NoTemplate,
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NotFound,
            Error::Exists(_) => Code::AlreadyExists,
            Error::State { .. } | Error::NoVm => Code::FailedPrecondition,
            Error::Spec(_) | Error::Stdio(_) => Code::InvalidArgument,
            Error::Config(config::Error::Annotation { .. }) => Code::InvalidArgument,
            Error::Agent {
                source: CallError::Refused(status),
                ..
            } => status.code,
            _ => Code::Unknown,
        };
        let why = api::chain(&error).join(": ");
        // A guest may have said it, at any length.
        Status::new(code, why.chars().take(MAX_TEXT_CHARS).collect::<String>())
    }
}

pub(crate) fn asked(act: &'static str) -> impl Fn(CallError) -> Error {
    move |source| Error::Agent { act, source }
}
