//! Places in a container's root. Its image, and other containers with the same volumes, have had a hand in what is
//! there: each path is looked up as if the container's root were the only one.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The file or folder at `path` below `root`, made if it is not there. Links are followed as if `root`
/// were the root of all files, and what they point to is made too.
pub(super) fn find(root: BorrowedFd<'_>, path: &Path, is_file: bool) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT) => make(root, path, is_file),
        found => Ok(found?),
    }
}

/// Finds the place step by step, so that it can make what is missing. No step follows a link or leaves
/// the folder it is taken from, whatever another container does there meanwhile.
fn make(root: BorrowedFd<'_>, path: &Path, is_file: bool) -> io::Result<OwnedFd> {
    /// How many links are followed in one path: as many as the kernel follows.
    const MAX_LINKS: usize = 40;
    let step = |from: BorrowedFd<'_>, name: &OsStr| {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(from, name, flags, Mode::empty(), resolve)
    };
    // The names still to be taken, the next one last.
    let mut names = backwards(path);
    // The folders on the way from the root.
    let mut way: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(name) = names.pop() {
        if name == ".." {
            way.pop();
            continue;
        }
        let here = way.last().map_or(root, AsFd::as_fd);
        let next = match step(here, &name) {
            Err(Errno::NOENT) => {
                let made = if is_file && names.is_empty() {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    rustix::fs::openat(here, &name, flags, Mode::from_raw_mode(0o644)).map(drop)
                } else {
                    rustix::fs::mkdirat(here, &name, Mode::from_raw_mode(0o755))
                };
                match made {
                    // Another container with the same volume was faster.
                    Err(Errno::EXIST) => {}
                    made => made?,
                }
                step(here, &name)?
            }
            found => found?,
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) != FileType::Symlink {
            way.push(next);
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = rustix::fs::readlinkat(&next, "", Vec::new())?;
        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
        if target.is_absolute() {
            way.clear();
        }
        names.extend(backwards(target));
    }
    match way.pop() {
        Some(found) => Ok(found),
        None => Ok(root.try_clone_to_owned()?),
    }
}

/// A path's names from the last to the first, with `..` where it goes up.
fn backwards(path: &Path) -> Vec<OsString> {
    let names = path.components().rev().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        _ => None,
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn places_are_made_below_the_root_whatever_links_say() {
        let folder = std::env::temp_dir().join(format!("podvmm-agent-root-{}", std::process::id()));
        fs::create_dir_all(folder.join("inside")).unwrap();
        std::os::unix::fs::symlink("/inside", folder.join("link")).unwrap();
        std::os::unix::fs::symlink("../../../../etc", folder.join("out")).unwrap();
        let root =
            rustix::fs::open(&folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        find(root.as_fd(), Path::new("/link/a/b"), false).unwrap();
        find(root.as_fd(), Path::new("/link/file"), true).unwrap();
        find(root.as_fd(), Path::new("/../up"), false).unwrap();
        find(root.as_fd(), Path::new("/out/made-by-test/passwd"), true).unwrap();
        let made = [
            folder.join("inside/a/b").is_dir(),
            folder.join("inside/file").is_file(),
            folder.join("up").is_dir(),
            folder.join("etc/made-by-test/passwd").is_file(),
        ];
        let leaked = Path::new("/etc/made-by-test").exists();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!((made, leaked), ([true; 4], false));
    }

    #[test]
    fn links_to_nowhere_are_followed_and_their_targets_made() {
        let folder = std::env::temp_dir().join(format!("podvmm-agent-link-{}", std::process::id()));
        fs::create_dir_all(folder.join("etc")).unwrap();
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, folder.join(name)).unwrap();
        };
        link("../run/resolver/resolv.conf", "etc/resolv.conf");
        link("/late/../later/./run", "run-link");
        link("run-link/inner/", "chain");
        link("../../..", "top");
        link("b", "etc/a");
        link("a", "etc/b");
        link("/proc/self/fd/0", "magic");
        let root =
            rustix::fs::open(&folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let find = |path: &str, is_file| find(root.as_fd(), Path::new(path), is_file);
        find("etc/resolv.conf", true).unwrap();
        find("/chain/file", true).unwrap();
        find("top/reached/../beside", false).unwrap();
        find("magic", true).unwrap();
        let endless = find("etc/a/x", true).unwrap_err();
        let below_a_file = find("etc/resolv.conf/x", true).unwrap_err();
        let whole = find("/", false).unwrap();
        let is_same = |a: &OwnedFd, b: &OwnedFd| {
            let [a, b] = [a, b].map(|fd| rustix::fs::fstat(fd).unwrap());
            (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
        };
        let is_root = is_same(&whole, &root);
        let made = [
            folder.join("run/resolver/resolv.conf").is_file(),
            folder.join("later/run/inner/file").is_file(),
            folder.join("beside").is_dir(),
            folder.join("proc/self/fd/0").is_file(),
        ];
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!((made, is_root), ([true; 4], true));
        assert_eq!(endless.raw_os_error(), Some(libc::ELOOP));
        assert_eq!(below_a_file.raw_os_error(), Some(libc::ENOTDIR));
    }
}
