//! A container's view of files, made in its own mount namespace. In which order its parts are made is said in
//! [`stage`](super::stage).

mod places;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use protocol::agent::oci::{Linux, LinuxDevice, Mount, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::sys;
use places::find;

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

/// Has no mount that is made here from now on seen by the agent and other containers.
pub(crate) fn part_from_others(linux: &Linux) -> Result<(), Error> {
    let propagation = match linux.rootfs_propagation.as_str() {
        // The guest shares its mounts with no other mount namespace, so a container has none to
        // share with.
        "" | "shared" | "rshared" | "slave" | "rslave" => MountPropagationFlags::DOWNSTREAM,
        "private" | "rprivate" => MountPropagationFlags::PRIVATE,
        other => return Err(format!("there is no propagation {other}").into()),
    };
    rustix::mount::mount_change("/", propagation | MountPropagationFlags::REC)?;
    Ok(())
}

/// Makes the container's root a mount, with all that is to be mounted and made there.
pub(crate) fn fill(spec: &Spec, links: Links) -> Result<OwnedFd, Error> {
    let path = spec.root.as_ref().map_or("", |root| root.path.as_str());
    let fill = || {
        let source = find_source(path, links)?;
        // Where it is found, whatever is at its path by then.
        rustix::mount::mount_bind_recursive(by_number(&source), by_number(&source))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(
            CWD,
            path,
            flags,
            Mode::empty(),
            links.resolve(),
        )?)
    };
    let root = fill().map_err(|error: io::Error| at(path, error))?;
    for mount in &spec.mounts {
        apply(root.as_fd(), mount, links).map_err(|error| -> Error {
            format!("mount {} on {}: {error}", mount.source, mount.destination).into()
        })?;
    }
    let devices = spec.linux.as_ref().map_or(&[][..], |linux| &linux.devices);
    make_devices(root.as_fd(), devices)?;
    Ok(root)
}

/// Makes `root` this process's, and leaves the guest's behind.
pub(crate) fn enter(root: &OwnedFd) -> Result<(), Error> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".").map_err(|errno| at("enter the root", errno.into()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Hides what the container is not to see.
pub(crate) fn mask_paths(linux: &Linux) -> Result<(), Error> {
    if linux.masked_paths.is_empty() {
        return Ok(());
    }
    let null = null_device().map_err(|error| at("/dev/null", error))?;
    for path in &linux.masked_paths {
        mask(path, null.as_fd()).map_err(|error| at(path, error))?;
    }
    Ok(())
}

/// Makes read-only what the container is not to change.
pub(crate) fn protect_paths(linux: &Linux) -> Result<(), Error> {
    for path in &linux.readonly_paths {
        make_readonly(path).map_err(|error| at(path, error))?;
    }
    Ok(())
}

/// Makes the root read-only, if it is to be.
pub(crate) fn protect_root(spec: &Spec) -> Result<(), Error> {
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        rustix::mount::mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")?;
    }
    Ok(())
}

fn at(what: &str, source: io::Error) -> Error {
    format!("{what}: {source}").into()
}

/// What becomes of symbolic links on the way to what is mounted for a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    Followed,
    /// By a policy for mounts a link is refused: the host could have put one into its share that leads out of it.
    Refused,
}

impl Links {
    fn resolve(self) -> ResolveFlags {
        match self {
            Self::Followed => ResolveFlags::empty(),
            Self::Refused => ResolveFlags::NO_SYMLINKS,
        }
    }
}

/// Opens what is to be mounted.
fn find_source(path: &str, links: Links) -> io::Result<OwnedFd> {
    let open = |flags| {
        let flags = OFlags::PATH | OFlags::CLOEXEC | flags;
        rustix::fs::openat2(CWD, path, flags, Mode::empty(), links.resolve())
    };
    // Asked for as a folder, the kernel mounts there what the host has mounted.
    match open(OFlags::DIRECTORY) {
        Err(Errno::NOTDIR) => Ok(open(OFlags::empty())?),
        found => Ok(found?),
    }
}

/// The path of an open file for calls that take none.
fn by_number(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// The type of a mount by its options and what it says.
pub(crate) fn mount_kind(mount: &Mount) -> &str {
    match options(&mount.options).bind {
        Some(_) => "bind",
        None => &mount.r#type,
    }
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

fn apply(root: BorrowedFd<'_>, mount: &Mount, links: Links) -> Result<(), Error> {
    let options = options(&mount.options);
    let bind = match (mount.r#type.as_str(), options.bind) {
        (_, Some(deep)) => Some(deep),
        ("bind", None) => Some(true),
        _ => None,
    };
    let source = bind
        .map(|_| find_source(&mount.source, links))
        .transpose()?;
    let is_file = match &source {
        Some(source) => !is_folder(source)?,
        None => false,
    };
    let target = find(root, Path::new(&mount.destination), is_file)?;
    let place = by_number(&target);
    if let Some(source) = &source {
        let source = by_number(source);
        if bind == Some(true) {
            rustix::mount::mount_bind_recursive(&source, &place)?;
        } else {
            rustix::mount::mount_bind(&source, &place)?;
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
    let place = by_number(&mounted);
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

/// Makes a folder of the container's if there is nothing at `path`.
pub(crate) fn make_folder(path: &str) -> io::Result<()> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            find(open_root()?.as_fd(), Path::new(path), false).map(drop)
        }
        // Whether it can be entered is seen when it is.
        _ => Ok(()),
    }
}

fn is_folder(file: &OwnedFd) -> io::Result<bool> {
    let mode = rustix::fs::fstat(file)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::Directory)
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
    let path = by_number(&node);
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
    if is_folder(&hidden)? {
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
}
