//! Files of the host's that no share carries: written in pieces, below one folder, through no link.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use protocol::agent::messages::CopyFileRequest;
use protocol::ttrpc::{Code, Status};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};

const BASE: &str = "/run/kata-containers";
const FOLDER_MODE: u32 = 0o755;
const PERMISSIONS: u32 = 0o7777;

/// Why a file is not copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{path} is not below {base}")]
    Outside { path: String, base: String },
    #[error("{path}: {what} {value} is out of range")]
    Range {
        path: String,
        what: &'static str,
        value: i64,
    },
    #[error("{0} is neither a file, a folder nor a link")]
    Kind(String),
    #[error("write {path}: {source}")]
    Write { path: String, source: io::Error },
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Outside { .. } | Error::Range { .. } | Error::Kind(_) => Code::InvalidArgument,
            Error::Write { .. } => Code::Internal,
        };
        Self::new(code, error)
    }
}

/// Writes a piece. A file is in its place when its last one is written.
pub(crate) fn copy(request: &CopyFileRequest) -> Result<(), Error> {
    copy_below(Path::new(BASE), request)
}

pub(crate) fn copy_below(base: &Path, request: &CopyFileRequest) -> Result<(), Error> {
    let piece = Piece::parse(base, request)?;
    piece.write(base).map_err(|source| Error::Write {
        path: request.path.clone(),
        source,
    })
}

/// A request that makes sense.
struct Piece<'a> {
    folders: Vec<&'a OsStr>,
    name: &'a OsStr,
    kind: FileType,
    mode: Mode,
    folder_mode: Mode,
    owner: (Uid, Gid),
    offset: u64,
    is_last: bool,
    data: &'a [u8],
}

impl<'a> Piece<'a> {
    fn parse(base: &Path, request: &'a CopyFileRequest) -> Result<Self, Error> {
        let outside = || Error::Outside {
            path: request.path.clone(),
            base: base.display().to_string(),
        };
        let below = Path::new(&request.path).strip_prefix(base);
        let names = below
            .map_err(|_| outside())?
            .components()
            .map(|part| match part {
                Component::Normal(name) => Ok(name),
                _ => Err(outside()),
            });
        let mut folders = names.collect::<Result<Vec<_>, _>>()?;
        let name = folders.pop().ok_or_else(outside)?;
        let kind = match FileType::from_raw_mode(request.file_mode) {
            // Shims of old say permissions only.
            FileType::Unknown if request.file_mode & !PERMISSIONS == 0 => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Directory | FileType::Symlink) => kind,
            _ => return Err(Error::Kind(request.path.clone())),
        };
        let range = |what: &'static str, value: i64| Error::Range {
            path: request.path.clone(),
            what,
            value,
        };
        let not_negative = |what, value: i64| u64::try_from(value).map_err(|_| range(what, value));
        let id = |what, value: i32| {
            let checked = not_negative(what, value.into());
            checked.map(|_| value.cast_unsigned())
        };
        let offset = not_negative("offset", request.offset)?;
        let size = not_negative("size", request.file_size)?;
        let end = offset.saturating_add(request.data.len() as u64);
        if kind == FileType::RegularFile && end > size {
            return Err(range("offset", request.offset));
        }
        let folder_mode = match request.dir_mode & PERMISSIONS {
            0 => FOLDER_MODE,
            mode => mode,
        };
        Ok(Self {
            folders,
            name,
            kind,
            mode: Mode::from_raw_mode(request.file_mode & PERMISSIONS),
            folder_mode: Mode::from_raw_mode(folder_mode),
            owner: (
                Uid::from_raw(id("uid", request.uid)?),
                Gid::from_raw(id("gid", request.gid)?),
            ),
            offset,
            is_last: end == size,
            data: &request.data,
        })
    }

    fn write(&self, base: &Path) -> io::Result<()> {
        std::fs::create_dir_all(base)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = rustix::fs::openat(CWD, base, flags, Mode::empty())?;
        for name in &self.folders {
            folder = enter(folder.as_fd(), name, self.folder_mode)?;
        }
        match self.kind {
            FileType::Directory => {
                enter(folder.as_fd(), self.name, self.mode)?;
                self.own(folder.as_fd(), self.name)?;
                let flags = AtFlags::empty();
                Ok(rustix::fs::chmodat(&folder, self.name, self.mode, flags)?)
            }
            FileType::Symlink => {
                let part = self.part();
                match rustix::fs::unlinkat(&folder, &part, AtFlags::empty()) {
                    Err(rustix::io::Errno::NOENT) => {}
                    removed => removed?,
                }
                rustix::fs::symlinkat(OsStr::from_bytes(self.data), &folder, &part)?;
                self.own(folder.as_fd(), &part)?;
                Ok(rustix::fs::renameat(&folder, &part, &folder, self.name)?)
            }
            _ => self.write_file(folder.as_fd()),
        }
    }

    fn write_file(&self, folder: BorrowedFd<'_>) -> io::Result<()> {
        let part = self.part();
        let mut flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        if self.offset == 0 {
            flags |= OFlags::TRUNC;
        }
        let file = File::from(open(folder, &part, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all_at(self.data, self.offset)?;
        if self.is_last {
            self.own(folder, &part)?;
            // After the owner: a change of that takes bits away.
            rustix::fs::fchmod(&file, self.mode)?;
            rustix::fs::renameat(folder, &part, folder, self.name)?;
        }
        Ok(())
    }

    fn own(&self, folder: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
        let (uid, gid) = self.owner;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(
            folder,
            name,
            Some(uid),
            Some(gid),
            flags,
        )?)
    }

    /// The name of the file until it is whole.
    fn part(&self) -> OsString {
        let mut part = OsString::from(".");
        part.push(self.name);
        part.push(".part");
        part
    }
}

/// Opens one name, which is no link.
fn open(
    folder: BorrowedFd<'_>,
    name: &OsStr,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, name, flags, mode, resolve)
}

/// The folder of this name, made if it is not there.
fn enter(folder: BorrowedFd<'_>, name: &OsStr, mode: Mode) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match open(folder, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => {
            rustix::fs::mkdirat(folder, name, mode)?;
            // What the mask took away.
            rustix::fs::chmodat(folder, name, mode, AtFlags::empty())?;
            Ok(open(folder, name, flags, Mode::empty())?)
        }
        found => Ok(found?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::PathBuf;

    struct Base(PathBuf);

    impl Base {
        fn new(name: &str) -> Self {
            let base = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            fs::create_dir_all(&base).unwrap();
            Self(base)
        }

        fn request(&self, path: &str, data: &[u8]) -> CopyFileRequest {
            let owner = fs::metadata(&self.0).unwrap();
            CopyFileRequest {
                path: self.0.join(path).to_str().unwrap().into(),
                file_size: data.len().try_into().unwrap(),
                file_mode: 0o100_640,
                dir_mode: 0o750,
                uid: owner.uid().cast_signed(),
                gid: owner.gid().cast_signed(),
                data: data.to_vec(),
                ..CopyFileRequest::default()
            }
        }
    }

    impl Drop for Base {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_comes_in_pieces_and_is_there_when_it_is_whole() {
        let base = Base::new("podvmm-copy-pieces");
        let mut piece = base.request("volume/..data_1/key", b"first ");
        piece.file_size = 12;
        copy_below(&base.0, &piece).unwrap();
        let place = base.0.join("volume/..data_1/key");
        assert!(!place.exists());
        piece.offset = 6;
        piece.data = b"second".to_vec();
        copy_below(&base.0, &piece).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"first second");
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o640);
        let folder = fs::metadata(place.parent().unwrap()).unwrap();
        assert_eq!(folder.mode() & 0o777, 0o750);
        assert_eq!(fs::read_dir(place.parent().unwrap()).unwrap().count(), 1);
        // And again, in one piece.
        copy_below(&base.0, &base.request("volume/..data_1/key", b"")).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"");
    }

    #[test]
    fn folders_and_links_are_made_and_made_again() {
        let base = Base::new("podvmm-copy-links");
        let mut folder = base.request("volume", b"");
        folder.file_mode = 0o040_700;
        let mut link = base.request("volume/..data", b"..data_1");
        link.file_mode = 0o120_777;
        for target in ["..data_1", "..data_2"] {
            link.data = target.into();
            copy_below(&base.0, &folder).unwrap();
            copy_below(&base.0, &link).unwrap();
            let made = fs::read_link(base.0.join("volume/..data")).unwrap();
            assert_eq!(made, Path::new(target));
        }
    }

    #[test]
    fn nothing_is_written_elsewhere() {
        let base = Base::new("podvmm-copy-escape");
        let outside = Base::new("podvmm-copy-outside");
        symlink(&outside.0, base.0.join("link")).unwrap();
        symlink(outside.0.join("file"), base.0.join("final")).unwrap();
        for path in [
            "link/file",
            "../escaped",
            "a/../../escaped",
            "link",
            "/etc/escaped",
            "",
        ] {
            let mut request = base.request(path, b"x");
            request.file_mode = if path == "link" { 0o040_755 } else { 0o100_644 };
            assert!(copy_below(&base.0, &request).is_err(), "{path}");
        }
        // What is in its place goes, wherever it leads.
        copy_below(&base.0, &base.request("final", b"x")).unwrap();
        assert!(base.0.join("final").symlink_metadata().unwrap().is_file());
        // A link that waits where the piece is to be written.
        symlink(outside.0.join("file"), base.0.join(".new.part")).unwrap();
        copy_below(&base.0, &base.request("new", b"x")).unwrap_err();
        assert_eq!(fs::read_dir(&outside.0).unwrap().count(), 0);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let base = Base::new("podvmm-copy-numbers");
        let refused = |change: fn(&mut CopyFileRequest)| {
            let mut request = base.request("file", b"abc");
            change(&mut request);
            copy_below(&base.0, &request).unwrap_err()
        };
        for change in [
            (|request| request.offset = -1) as fn(&mut CopyFileRequest),
            |request| request.offset = 1,
            |request| request.file_size = -1,
            |request| request.uid = -1,
            |request| request.gid = i32::MIN,
            |request| request.offset = i64::MAX,
        ] {
            assert!(matches!(refused(change), Error::Range { .. }));
        }
        let device = refused(|request| request.file_mode = 0o060_600);
        assert!(matches!(device, Error::Kind(_)), "{device}");
        assert_eq!(fs::read_dir(&base.0).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn any_path_is_below_or_refused(path in "(/b|/base)?(/|\\.\\./|\\./|[a-c])*", mode: u32, offset: i64, size: i64) {
            let request = CopyFileRequest {
                path,
                file_mode: mode,
                offset,
                file_size: size,
                ..CopyFileRequest::default()
            };
            if let Ok(piece) = Piece::parse(Path::new("/base"), &request) {
                let plain = |name: &&OsStr| !matches!(name.to_str(), Some("" | "." | ".."));
                prop_assert!(piece.folders.iter().chain([&piece.name]).all(plain));
                prop_assert!(request.path.starts_with("/base/"));
            }
        }
    }
}
