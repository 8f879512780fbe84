//! The jail's files: an empty tree, with what the VM needs where the host has it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use api::{Access, HostPath};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};

use super::stream;

/// Where the tree is made: a folder that each host has, and in which the VM has no file.
const PLACE: &str = "/proc";

/// Has this process, which has a mount namespace of its own, see a tree that has nothing but `paths`.
pub(super) fn enter(paths: &[HostPath]) -> io::Result<()> {
    let here = std::env::current_dir()?;
    // What is mounted here is seen nowhere else.
    let downstream = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", downstream)?;
    let nothing = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("podvmm", PLACE, "tmpfs", nothing, c"mode=755,size=1m")?;
    paths.iter().try_for_each(bind)?;
    let proc = inside(Path::new("/proc"));
    fs::create_dir_all(&proc)?;
    // By a process's descriptors a share's files are opened again. Kernels before 5.8 know no `subset`.
    let processes = mount("proc", &proc, "proc", nothing, c"subset=pid");
    processes.or_else(|_| mount("proc", &proc, "proc", nothing | MountFlags::RDONLY, None))?;
    // Relative paths mean what they meant.
    let there = inside(&here);
    fs::create_dir_all(&there)?;
    mount_remount(PLACE, MountFlags::BIND | MountFlags::RDONLY | nothing, c"")?;
    chdir(PLACE)?;
    // Puts the old root over the new one, from where it is taken away (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir(&here).or_else(|_| chdir("/"))?;
    Ok(())
}

/// Shows `path` in the tree.
fn bind(HostPath { path, access }: &HostPath) -> io::Result<()> {
    let place = inside(path);
    // By the jail's own /proc it leads to the same.
    if let Some(target) = stream(path) {
        fs::create_dir_all(place.parent().unwrap_or_else(|| Path::new(PLACE)))?;
        return std::os::unix::fs::symlink(target, place);
    }
    let kind = fs::metadata(path)?.file_type();
    if kind.is_dir() {
        fs::create_dir_all(&place)?;
    } else {
        fs::create_dir_all(place.parent().unwrap_or_else(|| Path::new(PLACE)))?;
        if !place.exists() {
            File::create(&place)?;
        }
    }
    mount_bind_recursive(path, &place)?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    // Devices are opened at the path of one, such as a disk's, and below /dev.
    let is_device = kind.is_block_device() || kind.is_char_device();
    if !is_device && !path.starts_with("/dev") {
        attributes |= libc::MOUNT_ATTR_NODEV;
    }
    if *access == Access::Read {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    restrict(&place, attributes)
}

/// Gives a mount attributes, and all that is mounted below it (mount_setattr(2)). What the host mounts there later
/// is not seen: it is the shim's to show.
fn restrict(place: &Path, attributes: u64) -> io::Result<()> {
    let path = CString::new(place.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: path and attributes outlive the call, and the size is that of what is pointed to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where in the tree that is being made `path` is.
fn inside(path: &Path) -> PathBuf {
    let names = path
        .components()
        .filter(|it| matches!(it, Component::Normal(_)));
    names.fold(PathBuf::from(PLACE), |place, name| place.join(name))
}
