//! Unix sockets on which the host's programs reach podvmm or something of the guest.
//!
//! A socket is bound and listened on under a temporary name beside its path, and only then linked to
//! it. So a client that finds the path can connect, and a path that refuses connections belongs to
//! a process that is gone: that socket is replaced. A socket that is served is never taken over,
//! even if two processes start at the same time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, Mode, RenameFlags, fchmod, renameat_with};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How often a path is tried that others change meanwhile.
const ATTEMPTS: usize = 16;

/// Why there is no socket to connect to.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{} is in use by a process that answers there", .0.display())]
    InUse(PathBuf),
    #[error("{} exists and is not a socket: remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    #[error("replace {}, the socket of a process that is gone: remove it", .path.display())]
    Stale { path: PathBuf, source: io::Error },
    #[error("listen on {}", .path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// A socket that only this user may open, and that never blocks. Dropping it removes its file.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    file: FileId,
}

/// Device and inode.
type FileId = (u64, u64);

fn file_id(path: &Path) -> io::Result<FileId> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Listener {
    /// Listens at `path`. A socket there that no process serves any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Listen {
            path: path.into(),
            source,
        };
        let new = Unplaced::bind(path).map_err(failed)?;
        for _ in 0..ATTEMPTS {
            match fs::hard_link(&new.temporary, path) {
                Ok(()) => return new.placed(path).map_err(failed),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
            match Occupant::of(path).map_err(failed)? {
                Occupant::Gone => {}
                Occupant::Served => break,
                Occupant::Other => return Err(ListenError::NotASocket(path.into())),
                Occupant::Stale(file) => {
                    let replaced = new.replace(path, file);
                    if replaced.map_err(|source| ListenError::Stale {
                        path: path.into(),
                        source,
                    })? {
                        log::info!("{}: replaced a stale socket", path.display());
                        return new.placed(path).map_err(failed);
                    }
                }
            }
        }
        Err(ListenError::InUse(path.into()))
    }

    /// The next client that has connected. `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same socket once more, for a server of its own. Its file stays the business of `self`.
    pub fn socket(&self) -> io::Result<UnixListener> {
        self.socket.try_clone()
    }

    /// Removes the socket's file, unless another file has its path by now.
    pub fn remove(&self) {
        if file_id(&self.path).is_ok_and(|file| file == self.file) {
            // It may be removed by another process meanwhile.
            let _ = fs::remove_file(&self.path);
        }
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
        self.remove();
    }
}

/// A socket that is listened on under a temporary name. Dropping it removes whatever has that name.
#[derive(Debug)]
struct Unplaced {
    socket: UnixListener,
    temporary: PathBuf,
}

impl Unplaced {
    fn bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file that bind makes gets the mode of the socket (unix_bind_bsd in net/unix/af_unix.c),
        // so that there is no moment in which others can open it.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let temporary = bind_beside(&socket, path)?;
        let new = Self {
            socket: socket.into(),
            temporary,
        };
        listen(&new.socket, BACKLOG)?;
        Ok(new)
    }

    /// Takes the path of the stale socket `file`. False if another has it by now.
    fn replace(&self, path: &Path, file: FileId) -> io::Result<bool> {
        self.exchange(path)?;
        if file_id(&self.temporary)? == file {
            return Ok(true);
        }
        // Another process was faster, and it is its socket that has just lost its path.
        self.exchange(path)?;
        Ok(false)
    }

    fn exchange(&self, path: &Path) -> io::Result<()> {
        renameat_with(CWD, &self.temporary, CWD, path, RenameFlags::EXCHANGE)?;
        Ok(())
    }

    fn placed(&self, path: &Path) -> io::Result<Listener> {
        Ok(Listener {
            socket: self.socket.try_clone()?,
            path: path.into(),
            file: file_id(path)?,
        })
    }
}

impl Drop for Unplaced {
    fn drop(&mut self) {
        // What is left of it is a stale socket that nothing looks for.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Binds `socket` in the folder of `path`, and returns where. An address has 107 bytes at most, so the
/// temporary name is the path's with a suffix, or a shorter one where that does not fit.
fn bind_beside(socket: impl AsFd, path: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path names no file");
    let name = path.file_name().ok_or_else(no_name)?;
    // The client's address, too.
    SocketAddrUnix::new(path)?;
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let suffix = format!(".{:x}.{number:x}", process::id());
        let mut long = name.to_owned();
        long.push(&suffix);
        let long = path.with_file_name(long);
        let (temporary, address) = match SocketAddrUnix::new(&long) {
            Ok(address) => (long, address),
            Err(_) => {
                let short = path.with_file_name(suffix);
                let address = SocketAddrUnix::new(&short)?;
                (short, address)
            }
        };
        match bind(&socket, &address) {
            // Left behind by a process that had this number.
            Err(Errno::ADDRINUSE) => {}
            other => return Ok(other.map(|()| temporary)?),
        }
    }
}

/// What is at a path.
enum Occupant {
    /// There is nothing at the path any more.
    Gone,
    /// A socket that a process serves.
    Served,
    /// A socket that no process serves, and none will.
    Stale(FileId),
    /// Something that is no socket.
    Other,
}

impl Occupant {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Gone),
            other => other?,
        };
        if !metadata.file_type().is_socket() {
            return Ok(Self::Other);
        }
        // A server that does not accept now must not make us wait.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&client, &SocketAddrUnix::new(path)?) {
            // Its queue is full, or it is a socket of another type.
            Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(Self::Served),
            Err(Errno::CONNREFUSED) => Ok(Self::Stale((metadata.dev(), metadata.ino()))),
            Err(Errno::NOENT) => Ok(Self::Gone),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Barrier;
    use std::thread;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    /// Names in `folder`.
    fn names(folder: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(folder.as_path()).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_socket_in_use_is_not_taken_over() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        assert_eq!(names(&folder), ["socket"]);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_server_whose_queue_is_full_is_not_waited_for() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let _listener = Listener::bind(&path).unwrap();
        let connect = |_| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            connect(&client, &SocketAddrUnix::new(&path).unwrap()).map(|()| client)
        };
        let clients: Vec<_> = (0..1000).map_while(|number| connect(number).ok()).collect();
        assert!(clients.len() < 1000, "the queue has no end");
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        assert_eq!(names(&folder), ["socket"]);
    }

    #[test]
    fn only_its_user_may_open_it() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let new = Unplaced::bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&new.temporary), 0o600, "before it has its path");
        let _listener = new.placed(&new.temporary).unwrap();
        let _listener = Listener::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn what_is_no_stale_stream_socket_stays() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        fs::write(&path, "precious").unwrap();
        let refused = Listener::bind(&path).unwrap_err();
        assert!(matches!(refused, ListenError::NotASocket(_)), "{refused}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        fs::remove_file(&path).unwrap();
        let target = folder.as_path().join("target");
        std::os::unix::fs::symlink(&target, &path).unwrap();
        let refused = Listener::bind(&path).unwrap_err();
        assert!(matches!(refused, ListenError::NotASocket(_)), "{refused}");

        fs::remove_file(&path).unwrap();
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        let refused = Listener::bind(&path).unwrap_err();
        assert!(matches!(refused, ListenError::InUse(_)), "{refused}");
        assert_eq!(names(&folder), ["socket"]);
    }

    #[test]
    fn paths_that_cannot_be_are_refused() {
        let folder = TempDir::new().unwrap();
        for path in ["no/such", "..", &"x".repeat(108)] {
            let refused = Listener::bind(&folder.as_path().join(path)).unwrap_err();
            assert!(
                matches!(refused, ListenError::Listen { .. }),
                "{path}: {refused}"
            );
        }
        assert_eq!(names(&folder), [""; 0]);
    }

    #[test]
    fn a_path_may_be_as_long_as_an_address() {
        let folder = TempDir::new().unwrap();
        let len = folder.as_path().as_os_str().as_bytes().len() + 1;
        let path = folder.as_path().join("x".repeat(107 - len));
        let _listener = Listener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_took_its_path_is_not_removed() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let first = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = Listener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn of_many_that_replace_a_stale_socket_one_has_it() {
        for _ in 0..50 {
            let folder = TempDir::new().unwrap();
            let path = folder.as_path().join("socket");
            drop(UnixListener::bind(&path).unwrap());
            let (start, end) = (Barrier::new(4), Barrier::new(4));
            let try_once = || {
                start.wait();
                let listener = Listener::bind(&path);
                end.wait();
                listener.ok()
            };
            let listeners: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(try_once)).collect();
                let joined = threads.into_iter().map(|thread| thread.join().unwrap());
                joined.flatten().collect()
            });
            assert_eq!(listeners.len(), 1);
            let _client = UnixStream::connect(&path).unwrap();
            listeners[0].accept().unwrap();
            assert_eq!(names(&folder), ["socket"]);
        }
    }
}
