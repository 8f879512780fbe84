//! What may be done in a mount, whatever its file system would let be done (mount_setattr(2)).

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How much of a mount is changed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Depth {
    /// The mount alone.
    Top,
    /// The mount with all that is mounted below it.
    All,
}

/// Makes a mount read-only.
pub(super) fn make_readonly(place: &Path, depth: Depth) -> io::Result<()> {
    change_readonly(place, depth, true)
}

/// Makes a mount read-only, or writable again.
pub(super) fn change_readonly(place: &Path, depth: Depth, is_readonly: bool) -> io::Result<()> {
    match is_readonly {
        true => change(place, depth, libc::MOUNT_ATTR_RDONLY, 0),
        false => change(place, depth, 0, libc::MOUNT_ATTR_RDONLY),
    }
}

/// Has no device be opened in a mount, by its nodes there, and nothing run on the host, as whatever user. The
/// share's server does neither; this is the host's kernel's word beside its own.
pub(super) fn keep_harmless(place: &Path) -> io::Result<()> {
    let refused = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    change(place, Depth::All, refused, 0)
}

fn change(place: &Path, depth: Depth, set: u64, clear: u64) -> io::Result<()> {
    let path = CString::new(place.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = match depth {
        Depth::Top => 0,
        Depth::All => libc::AT_RECURSIVE,
    };
    // SAFETY: path and attributes outlive the call, and the size is that of what is pointed to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
