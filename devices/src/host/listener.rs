//! A unix socket on which the host's programs find something of the guest.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why nobody can be listened for.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{} is in use by a process that answers there", .0.display())]
    InUse(PathBuf),
    #[error("{} was left behind by a process that is gone: remove it", .0.display())]
    Stale(PathBuf),
    #[error("listen on {}", .path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// A socket that only this user may open, and that is never waited for. Dropping it removes its
/// file.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Listen {
            path: path.into(),
            source,
        };
        let socket = UnixListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse if UnixStream::connect(path).is_ok() => {
                ListenError::InUse(path.into())
            }
            io::ErrorKind::AddrInUse => ListenError::Stale(path.into()),
            _ => failed(source),
        })?;
        let path = path.to_path_buf();
        let listener = Self { socket, path };
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&listener.path, private).map_err(failed)?;
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// Who has connected, if anybody has.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have been removed by somebody else.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn a_socket_in_use_or_left_behind_is_not_taken_over() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        drop(listener);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(Listener::bind(&path), Err(ListenError::Stale(_))));
        assert!(path.exists());
    }
}
