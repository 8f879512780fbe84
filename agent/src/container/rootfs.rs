//! A container's view of files, made in its own mount namespace. Paths are of the image's making: each
//! is looked up as if the container's root were the only one.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use protocol::agent::oci::{LinuxDevice, Mount, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::sys;

type Error = Box<dyn std::error::Error>;

/// Character devices that every container has: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Makes the container's root this process's, with all that is to be mounted there.
pub(crate) fn enter(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux.clone().unwrap_or_default();
    let root = spec.root.clone().unwrap_or_default();
    let propagation = match linux.rootfs_propagation.as_str() {
        // The guest shares its mounts with no other mount namespace, so a container has none to
        // share with.
        "" | "shared" | "rshared" | "slave" | "rslave" => MountPropagationFlags::DOWNSTREAM,
        "private" | "rprivate" => MountPropagationFlags::PRIVATE,
        other => return Err(format!("there is no propagation {other}").into()),
    };
    rustix::mount::mount_change("/", propagation | MountPropagationFlags::REC)?;
    let at = |what: &str, source: io::Error| -> Error { format!("{what}: {source}").into() };
    rustix::mount::mount_bind_recursive(&root.path, &root.path)
        .map_err(|errno| at(&root.path, errno.into()))?;
    let fd = rustix::fs::open(
        &root.path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    for mount in &spec.mounts {
        apply(fd.as_fd(), mount).map_err(|error| -> Error {
            format!("mount {} on {}: {error}", mount.source, mount.destination).into()
        })?;
    }
    make_devices(fd.as_fd(), &linux.devices)?;
    rustix::process::fchdir(&fd)?;
    rustix::process::pivot_root(".", ".").map_err(|errno| at("enter the root", errno.into()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    if !linux.masked_paths.is_empty() {
        let null = null_device().map_err(|error| at("/dev/null", error))?;
        for path in &linux.masked_paths {
            mask(path, null.as_fd()).map_err(|error| at(path, error))?;
        }
    }
    for path in &linux.readonly_paths {
        make_readonly(path).map_err(|error| at(path, error))?;
    }
    if let Some(process) = &spec.process {
        // Later it is too late, for the root may be read-only.
        make_folder(&process.cwd).map_err(|error| at(&process.cwd, error))?;
    }
    if root.readonly {
        rustix::mount::mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")?;
    }
    Ok(())
}

/// The options of a mount, told apart.
#[derive(Debug, PartialEq)]
struct Options {
    flags: MountFlags,
    propagation: Vec<MountPropagationFlags>,
    bind: Option<bool>,
    /// Whether the mount is read-only with all that is mounted below it.
    all_readonly: bool,
    /// Options for the file system itself.
    data: Vec<String>,
}

fn options(words: &[String]) -> Options {
    let mut options = Options {
        flags: MountFlags::empty(),
        propagation: Vec::new(),
        bind: None,
        all_readonly: false,
        data: Vec::new(),
    };
    for word in words {
        let (flag, on) = match word.as_str() {
            "rro" => {
                options.all_readonly = true;
                (MountFlags::RDONLY, true)
            }
            "bind" => {
                options.bind = Some(options.bind.unwrap_or(false));
                continue;
            }
            "rbind" => {
                options.bind = Some(true);
                continue;
            }
            "defaults" => continue,
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            other => {
                match propagation(other) {
                    Some(flags) => options.propagation.push(flags),
                    None => options.data.push(other.into()),
                }
                continue;
            }
        };
        options.flags.set(flag, on);
    }
    options
}

fn propagation(word: &str) -> Option<MountPropagationFlags> {
    let (word, deep) = match word.strip_prefix('r') {
        Some(rest) => (rest, MountPropagationFlags::REC),
        None => (word, MountPropagationFlags::empty()),
    };
    let flags = match word {
        "private" => MountPropagationFlags::PRIVATE,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "shared" => MountPropagationFlags::SHARED,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(flags | deep)
}

fn apply(root: BorrowedFd<'_>, mount: &Mount) -> Result<(), Error> {
    let options = options(&mount.options);
    let bind = match (mount.r#type.as_str(), options.bind) {
        (_, Some(deep)) => Some(deep),
        ("bind", None) => Some(true),
        _ => None,
    };
    let is_file = bind.is_some() && !fs::metadata(&mount.source)?.is_dir();
    let target = find(root, Path::new(&mount.destination), is_file)?;
    let place = format!("/proc/self/fd/{}", target.as_raw_fd());
    if let Some(deep) = bind {
        if deep {
            rustix::mount::mount_bind_recursive(&mount.source, &place)?;
        } else {
            rustix::mount::mount_bind(&mount.source, &place)?;
        }
    } else {
        // The guest has cgroups of version 2 alone.
        let kind = match mount.r#type.as_str() {
            "cgroup" => "cgroup2",
            kind => kind,
        };
        let data = match kind {
            "cgroup2" => String::new(),
            _ => options.data.join(","),
        };
        let data = CString::new(data)?;
        rustix::mount::mount(&mount.source, &place, kind, options.flags, Some(&*data))?;
    }
    // What is mounted hides the place, so it is looked up once more.
    let mounted = find(root, Path::new(&mount.destination), is_file)?;
    let place = format!("/proc/self/fd/{}", mounted.as_raw_fd());
    if bind.is_some() && !options.flags.is_empty() {
        rustix::mount::mount_remount(&place, MountFlags::BIND | options.flags, c"")?;
    }
    for flags in options.propagation {
        rustix::mount::mount_change(&place, flags)?;
    }
    if options.all_readonly {
        sys::make_all_readonly(mounted.as_fd())?;
    }
    Ok(())
}

/// The file or folder at `path` below `root`, made if it is not there. Links are followed as if `root`
/// were the root of all files, and what they point to is made too.
fn find(root: BorrowedFd<'_>, path: &Path, is_file: bool) -> io::Result<OwnedFd> {
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

/// Makes a folder of the container's if there is nothing at `path`.
fn make_folder(path: &str) -> io::Result<()> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            find(open_root()?.as_fd(), Path::new(path), false).map(drop)
        }
        // Whether it can be entered is seen when it is.
        _ => Ok(()),
    }
}

/// The root that this process has.
fn open_root() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, "/", flags, Mode::empty())?)
}

fn make_devices(root: BorrowedFd<'_>, more: &[LinuxDevice]) -> Result<(), Error> {
    let dev = find(root, Path::new("/dev"), false)?;
    for (name, major, minor) in DEVICES {
        make_node(
            dev.as_fd(),
            name,
            FileType::CharacterDevice,
            0o666,
            (major, minor),
            (0, 0),
        )?;
    }
    for (target, name) in LINKS {
        match rustix::fs::symlinkat(target, &dev, name) {
            Err(Errno::EXIST) => {}
            made => made?,
        }
    }
    for device in more {
        let path = Path::new(&device.path);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(format!("{} is no place for a device", device.path).into());
        };
        let kind = match device.r#type.as_str() {
            "b" => FileType::BlockDevice,
            "c" | "u" => FileType::CharacterDevice,
            "p" => FileType::Fifo,
            other => {
                return Err(
                    format!("{}: there are no devices of type {other}", device.path).into(),
                );
            }
        };
        let number =
            |value: i64| u32::try_from(value).map_err(|_| format!("{}: {value}", device.path));
        let numbers = (number(device.major)?, number(device.minor)?);
        let folder = find(root, folder, false)?;
        let mode = if device.file_mode == 0 {
            0o666
        } else {
            device.file_mode
        };
        make_node(
            folder.as_fd(),
            &name.to_string_lossy(),
            kind,
            mode,
            numbers,
            (device.uid, device.gid),
        )?;
    }
    Ok(())
}

fn make_node(
    folder: BorrowedFd<'_>,
    name: &str,
    kind: FileType,
    mode: u32,
    (major, minor): (u32, u32),
    (uid, gid): (u32, u32),
) -> io::Result<()> {
    use rustix::fs::{AtFlags, Gid, Uid};
    let number = (major, minor);
    match rustix::fs::mknodat(
        folder,
        name,
        kind,
        Mode::from_raw_mode(mode),
        rustix::fs::makedev(major, minor),
    ) {
        // A mount may have put another there, as /dev/urandom for /dev/random; runc leaves it too.
        Err(Errno::EXIST) => return Ok(()),
        // It would be the host's.
        Err(Errno::PERM) => {
            let why = "its folder is on a share of the host's, which makes no devices; mount a tmpfs on /dev";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        made => made?,
    }
    // Where containers share the folder, another may have put something else there since.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    if !is_device(node.as_fd(), kind, number)? {
        return Err(io::Error::other(format!("{name} is not the device made")));
    }
    // What the mask took away.
    let path = format!("/proc/self/fd/{}", node.as_raw_fd());
    rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(&node, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    Ok(())
}

/// The container's null device. The image or a volume may have something else in its place, which
/// would be put over what is to be hidden (CVE-2025-31133).
fn null_device() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let null = rustix::fs::openat(CWD, "/dev/null", flags, Mode::empty())?;
    let [(_, major, minor), ..] = DEVICES;
    match is_device(null.as_fd(), FileType::CharacterDevice, (major, minor))? {
        true => Ok(null),
        false => Err(io::Error::other("this is not the null device")),
    }
}

fn is_device(fd: BorrowedFd<'_>, kind: FileType, (major, minor): (u32, u32)) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    let is_kind = FileType::from_raw_mode(stat.st_mode) == kind;
    let has_number = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    let is_number = !has_number || stat.st_rdev == rustix::fs::makedev(major, minor);
    Ok(is_kind && is_number)
}

/// Hides what is at `path`, if there is anything: a file behind `null`, a folder behind an empty one.
fn mask(path: &str, null: BorrowedFd<'_>) -> io::Result<()> {
    let hidden = match rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let mode = rustix::fs::fstat(&hidden)?.st_mode;
    if FileType::from_raw_mode(mode) == FileType::Directory {
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, c"size=0k")?;
        return Ok(());
    }
    bind(null, hidden.as_fd())
}

/// Mounts a file on another. Neither has a path that something else could be put at meanwhile.
fn bind(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let tree = rustix::mount::open_tree(
        source,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", target, "", flags)?)
}

fn make_readonly(path: &str) -> io::Result<()> {
    match rustix::mount::mount_bind_recursive(path, path) {
        Err(Errno::NOENT) => return Ok(()),
        bound => bound?,
    }
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    rustix::mount::mount_remount(path, flags, c"")?;
    Ok(())
}

/// Puts the slave of the container's terminal where consoles are.
pub(crate) fn mount_console(slave: BorrowedFd<'_>) -> io::Result<()> {
    let console = find(open_root()?.as_fd(), Path::new("/dev/console"), true)?;
    bind(slave, console.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_propagation_or_the_file_systems() {
        let words = [
            "rbind", "nosuid", "ro", "rw", "rslave", "size=64k", "rprivate", "mode=755",
        ];
        let options = options(&words.map(String::from));
        assert_eq!(
            options,
            Options {
                flags: MountFlags::NOSUID,
                propagation: vec![
                    MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
                    MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
                ],
                bind: Some(true),
                all_readonly: false,
                data: vec!["size=64k".into(), "mode=755".into()],
            }
        );
    }

    #[test]
    fn a_read_only_mount_is_so_below_if_that_is_asked_for() {
        let read_only = |word: &str| {
            let options = options(&["bind".into(), word.into()]);
            (options.flags, options.all_readonly)
        };
        assert_eq!(read_only("ro"), (MountFlags::RDONLY, false));
        assert_eq!(read_only("rro"), (MountFlags::RDONLY, true));
    }

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
