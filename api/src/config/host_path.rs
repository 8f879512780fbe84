//! The host's files that a VM needs, so that it can be kept from all others.

use std::path::{Path, PathBuf};

/// A path of the host's that a VM needs: a file, or a folder with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPath {
    /// It need not be there yet if it is to be written.
    pub path: PathBuf,
    /// What for.
    pub access: Access,
}

/// What a VM needs a path of the host's for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what it says")]
pub enum Access {
    Read,
    /// To read it, too.
    Write,
    /// To make sockets in this folder, and to remove them.
    Sockets,
}

impl HostPath {
    /// To read a path.
    pub fn read(path: &Path) -> Self {
        let path = path.into();
        let access = Access::Read;
        Self { path, access }
    }

    /// To write a path.
    pub fn write(path: &Path) -> Self {
        let path = path.into();
        let access = Access::Write;
        Self { path, access }
    }

    /// To make a socket at a path, or to find one there that may be made anew.
    pub fn socket(path: &Path) -> Self {
        let folder = path.parent().filter(|it| *it != Path::new(""));
        Self::sockets(folder.unwrap_or_else(|| Path::new(".")))
    }

    /// To make sockets in a folder.
    pub fn sockets(folder: &Path) -> Self {
        let path = folder.into();
        let access = Access::Sockets;
        Self { path, access }
    }
}
