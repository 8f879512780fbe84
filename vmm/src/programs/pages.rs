//! `podvmm pages`: gives VMs that are restored with a memory_socket the RAM of one snapshot.
//!
//! One thread accepts connections. Each VM has a thread of its own, which waits only for the faults
//! and the end of this VM. RAM may have been compressed before.

mod compressed;
mod connection;
mod removed;
mod source;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::thread::Builder;

use api::{HostPath, chain};
use devices::host::{ListenError, Listener};
use lexopt::{Arg, Parser};
use thiserror::Error;

use self::source::Source;
use crate::host::jail::{self, Jail, JailError, User, Wanted};
use crate::host::signals;
use crate::host::thread::{self, Enforcement, FilterError, Kind};
use crate::snapshot::{self, RestoreError};

/// What `podvmm pages --help` prints.
pub(crate) const HELP: &str = include_str!("pages.txt");

/// What `podvmm pages` is to do.
#[derive(Debug)]
pub(crate) enum Task {
    /// Print [`HELP`].
    Help,
    /// Give VMs pages.
    Serve {
        /// The socket that VMs come to.
        socket: PathBuf,
        /// Folder of the snapshot that the pages are of.
        folder: PathBuf,
        /// What a system call means that it has no need of.
        seccomp: Enforcement,
        /// What it gives up of the host.
        jail: Jail,
        /// `-v`, counted.
        verbosity: u8,
    },
    /// Compress RAM.
    Compress {
        /// Folder of the snapshot that the RAM is of.
        folder: PathBuf,
    },
}

/// Why no pages are given.
#[derive(Debug, Error)]
pub(crate) enum PagesError {
    /// Unknown, incomplete or superfluous arguments.
    #[error(transparent)]
    Arguments(#[from] lexopt::Error),
    /// Something is missing.
    #[error("{0} is missing; see podvmm pages --help")]
    Missing(&'static str),
    /// Two things that cannot both be.
    #[error("--compress goes with nothing else; see podvmm pages --help")]
    Contradiction,
    /// There is no such snapshot, or it cannot be used.
    #[error("the snapshot in {}", .folder.display())]
    Snapshot {
        /// Folder where the snapshot should be.
        folder: PathBuf,
        source: RestoreError,
    },
    /// Another podvmm writes to the folder.
    #[error("a podvmm writes to {}", .0.display())]
    Busy(PathBuf),
    /// RAM is not compressed.
    #[error("compress to {}", .path.display())]
    Compress {
        /// Path of the compressed file.
        path: PathBuf,
        source: io::Error,
    },
    /// The socket could not be made.
    #[error("--socket")]
    Listen(#[from] ListenError),
    /// The process cannot give up what it does not need.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The value of `--seccomp`.
    #[error("--seccomp: write true, log or false")]
    Seccomp,
    /// The host does not let it make all of a jail that is required.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The value of an option of the jail.
    #[error("{0}; see podvmm pages --help")]
    JailValue(&'static str),
    /// Signals, or who comes to the socket.
    #[error("{0}")]
    Wait(&'static str, #[source] io::Error),
}

/// Parses the arguments after `pages`.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Task, PagesError> {
    let mut parser = Parser::from_args(arguments);
    let (mut socket, mut folder, mut verbosity) = (None, None, 0_u8);
    let (mut compress, mut seccomp, mut jail) = (None, Enforcement::default(), Jail::default());
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Task::Help),
            Arg::Long("socket") => socket = Some(PathBuf::from(parser.value()?)),
            Arg::Long("snapshot") => folder = Some(PathBuf::from(parser.value()?)),
            Arg::Long("compress") => compress = Some(PathBuf::from(parser.value()?)),
            Arg::Long("seccomp") => {
                let value = parser.value()?;
                let value = value.to_str().and_then(Enforcement::parse);
                seccomp = value.ok_or(PagesError::Seccomp)?;
            }
            Arg::Long("jail") => {
                let wanted = parser.value()?.to_str().and_then(Wanted::parse);
                let mistake = PagesError::JailValue("--jail: write on, off or required");
                jail.wanted = wanted.ok_or(mistake)?;
            }
            Arg::Long("jail-user") => {
                let user = parser.value()?.to_str().and_then(User::parse);
                let mistake = PagesError::JailValue("--jail-user: write UID or UID:GID");
                jail.user = Some(user.ok_or(mistake)?);
            }
            Arg::Short('v') => verbosity = verbosity.saturating_add(1),
            unexpected => return Err(unexpected.unexpected().into()),
        }
    }
    if let Some(what) = jail.contradiction() {
        return Err(PagesError::JailValue(what));
    }
    if let Some(compressed) = compress {
        return match (socket, folder) {
            (None, None) => Ok(Task::Compress { folder: compressed }),
            _ => Err(PagesError::Contradiction),
        };
    }
    Ok(Task::Serve {
        socket: socket.ok_or(PagesError::Missing("--socket"))?,
        folder: folder.ok_or(PagesError::Missing("--snapshot"))?,
        seccomp,
        jail,
        verbosity,
    })
}

/// Gives pages until a signal ends the process.
pub(crate) fn serve(
    socket: PathBuf,
    folder: PathBuf,
    seccomp: Enforcement,
    jail: Jail,
) -> Result<(), PagesError> {
    let source = Source::open(&folder).map_err(|source| PagesError::Snapshot { folder, source })?;
    let source = Arc::new(source);
    // All of the snapshot is open, and there is no other thread yet.
    jail::enter(&jail, &[HostPath::socket(&socket)])?;
    let listener = Listener::bind(&socket)?;
    let accepting = |source| PagesError::Wait("accept a VM", source);
    let vms = listener.socket().map_err(accepting)?;
    vms.set_nonblocking(false).map_err(accepting)?;
    // What VMs say is read from here on.
    thread::filter(Kind::PageServer, seccomp, None)?;
    signals::watch(move |_| {
        // The next page server finds the path free.
        listener.remove();
        process::exit(0);
    })
    .map_err(|source| PagesError::Wait("watch for signals", source))?;
    for number in 0_u64.. {
        let (stream, _) = vms.accept().map_err(accepting)?;
        let source = Arc::clone(&source);
        let serves = move || match connection::serve(&stream, &source) {
            Ok(served) => log::info!("VM {number} is gone: {served}"),
            Err(error) => log::error!("VM {number} is left: {}", chain(&error).join(": ")),
        };
        let builder = Builder::new().name(format!("vm{number}"));
        if let Err(error) = Kind::PageServer.spawn(builder, serves) {
            log::error!("VM {number} is left: {error}");
        }
    }
    Ok(())
}

/// Writes a compressed file beside each that is RAM in a snapshot, and a line about it to `out`.
pub(crate) fn compress(folder: &Path, out: &mut impl Write) -> Result<(), PagesError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| PagesError::Compress { path, source }
    };
    let unusable = |source| PagesError::Snapshot {
        folder: folder.into(),
        source,
    };
    signals::survive_file_size_limit().map_err(failed(folder))?;
    // No other podvmm may write a snapshot there meanwhile: it would remove files that belong to no
    // snapshot.
    let lock = snapshot::lock(folder)
        .map_err(failed(folder))?
        .ok_or_else(|| PagesError::Busy(folder.into()))?;
    let (ram_len, files) = snapshot::memory_files(folder).map_err(unusable)?;
    for file in &files {
        let plain = file.open().map_err(unusable)?;
        let path = file.compressed();
        let len = compressed::compress(&plain, &file.ranges, ram_len, &path);
        let len = len.map_err(failed(&path))?;
        let from: u64 = file
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        writeln!(out, "{}: {len} bytes of {from}", path.display()).map_err(failed(&path))?;
    }
    lock.sync_all().map_err(failed(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let parse = |arguments: &[&str]| parse(arguments.iter().map(OsString::from));
        let task = parse(&["--socket", "/s", "--snapshot", "/f"]).unwrap();
        assert!(matches!(task, Task::Serve { .. }));
        let refusal = |arguments: &[&str]| parse(arguments).unwrap_err().to_string();
        assert!(refusal(&["--socket", "/s"]).starts_with("--snapshot is missing"));
        assert!(refusal(&["--snapshot", "/f"]).starts_with("--socket is missing"));
        let task = parse(&["--compress", "/f"]).unwrap();
        assert!(matches!(task, Task::Compress { .. }));
        let refused = refusal(&["--compress", "/f", "--socket", "/s"]);
        assert!(refused.starts_with("--compress goes with nothing else"));
        assert!(refusal(&["--jail", "yes"]).starts_with("--jail: write"));
        assert!(refusal(&["--jail", "on", "--jail-user", "0"]).starts_with("--jail-user: write"));
        assert!(refusal(&["--jail-user", "7"]).starts_with("--jail-user: it goes with --jail"));
        assert!(refusal(&["serve"]).starts_with("unexpected argument"));
        assert!(matches!(parse(&["--help"]), Ok(Task::Help)));
    }
}
