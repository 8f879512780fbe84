//! The mounts that programs expect, and how they end. Each costs the guest's kernel some
//! milliseconds where it is interpreted, so this is the list and nothing is mounted twice: what the
//! agent needs to find its way is moved along into the new root.

use std::ffi::{CStr, CString, c_ulong};
use std::io;
use std::os::unix::fs::{chroot, symlink};

use crate::sys::{self, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("mount {fstype} on {target}")]
    Mount {
        fstype: String,
        target: String,
        source: io::Error,
    },
    #[error("make {path}")]
    Make { path: String, source: io::Error },
    #[error("move {from} into the new root")]
    Move { from: String, source: io::Error },
    #[error("make {path} the root")]
    EnterRoot { path: String, source: io::Error },
}

/// A file system without a device.
struct Mount {
    fstype: &'static CStr,
    target: &'static CStr,
    flags: c_ulong,
    options: &'static CStr,
}

const fn mount(
    fstype: &'static CStr,
    target: &'static CStr,
    flags: c_ulong,
    options: &'static CStr,
) -> Mount {
    Mount {
        fstype,
        target,
        flags,
        options,
    }
}

/// What the agent itself needs.
const FIRST: [Mount; 3] = [
    mount(c"proc", c"/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, c""),
    mount(c"sysfs", c"/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, c""),
    mount(c"devtmpfs", c"/dev", MS_NOSUID, c"mode=0755"),
];

/// What programs expect besides.
const LATER: [Mount; 4] = [
    mount(
        c"devpts",
        c"/dev/pts",
        MS_NOSUID | MS_NOEXEC,
        c"mode=0620,gid=5,ptmxmode=0666",
    ),
    mount(c"tmpfs", c"/dev/shm", MS_NOSUID | MS_NODEV, c""),
    mount(c"tmpfs", c"/run", MS_NOSUID | MS_NODEV, c"mode=0755"),
    mount(
        c"cgroup2",
        c"/sys/fs/cgroup",
        MS_NOSUID | MS_NODEV | MS_NOEXEC,
        c"nsdelegate",
    ),
];

/// Mounted where the root file system itself cannot be written.
const SCRATCH: Mount = mount(c"tmpfs", c"/tmp", MS_NOSUID | MS_NODEV, c"");

const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

impl Mount {
    /// Mounts it, making the directory if it is not there.
    fn apply(&self) -> Result<(), Error> {
        let mount = || {
            sys::mount(
                self.fstype,
                self.target,
                self.fstype,
                self.flags,
                self.options,
            )
        };
        let result = match mount() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_directory(self.target)?;
                mount()
            }
            result => result,
        };
        result.map_err(|source| Error::Mount {
            fstype: self.fstype.to_string_lossy().into_owned(),
            target: self.target.to_string_lossy().into_owned(),
            source,
        })
    }
}

fn make_directory(path: &CStr) -> Result<(), Error> {
    let path = path.to_string_lossy();
    std::fs::create_dir(&*path).map_err(|source| Error::Make {
        path: path.into_owned(),
        source,
    })
}

/// Mounts what the agent needs to find its way.
pub(crate) fn first() -> Result<(), Error> {
    FIRST.iter().try_for_each(Mount::apply)
}

/// Mounts what programs expect besides. A root file system without a place for one of them, or a
/// kernel without it, does without.
pub(crate) fn later(root_is_read_only: bool) -> impl Iterator<Item = Error> {
    let links = DEVICE_LINKS.iter().map(|(target, path)| {
        symlink(target, path).map_err(|source| Error::Make {
            path: (*path).to_owned(),
            source,
        })
    });
    let scratch = root_is_read_only.then_some(&SCRATCH);
    LATER
        .iter()
        .chain(scratch)
        .map(Mount::apply)
        .chain(links)
        .filter_map(Result::err)
}

/// Makes the file system mounted on `new_root` the root and moves the first mounts there. The
/// initramfs cannot be unmounted: it is hidden instead, and so cannot be left by pivot_root(2).
pub(crate) fn enter_root(new_root: &CStr) -> Result<(), Error> {
    for mount in &FIRST {
        let target = [new_root.to_bytes(), mount.target.to_bytes()].concat();
        let target = CString::new(target).expect("made of strings without NUL");
        move_mount(mount.target, &target)?;
    }
    let failed = |source| Error::EnterRoot {
        path: new_root.to_string_lossy().into_owned(),
        source,
    };
    std::env::set_current_dir(&*new_root.to_string_lossy()).map_err(failed)?;
    sys::mount(c".", c"/", c"", MS_MOVE, c"").map_err(failed)?;
    chroot(".").map_err(failed)
}

fn move_mount(from: &CStr, target: &CStr) -> Result<(), Error> {
    let result = match sys::mount(from, target, c"", MS_MOVE, c"") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_directory(target)?;
            sys::mount(from, target, c"", MS_MOVE, c"")
        }
        result => result,
    };
    result.map_err(|source| Error::Move {
        from: from.to_string_lossy().into_owned(),
        source,
    })
}

/// Unmounts writable disks, or makes them read-only where they are still in use, as the root file
/// system is: when this returns without an error, what was written to them has reached the host.
pub(crate) fn settle_disks() -> io::Result<()> {
    let mounts = sys::read_file("/proc/self/mounts").inspect_err(|_| sys::sync())?;
    let disks: Vec<CString> = writable_disks(&mounts).collect();
    if disks.is_empty() {
        return Ok(());
    }
    let mut result = Ok(());
    for target in disks.iter().rev() {
        if sys::unmount(target).is_err()
            && let Err(error) = sys::mount(c"", target, c"", MS_REMOUNT | MS_RDONLY, c"")
        {
            result = Err(error);
        }
    }
    sys::sync();
    result
}

/// The mount points of writable block devices in the text of /proc/PID/mounts (proc_pid_mounts(5),
/// fstab(5)), in the order they were mounted.
fn writable_disks(mounts: &[u8]) -> impl Iterator<Item = CString> {
    mounts.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let (device, target) = (fields.next()?, fields.next()?);
        let options = fields.nth(1)?;
        let is_writable = options
            .split(|&byte| byte == b',')
            .any(|option| option == b"rw");
        (device.starts_with(b"/dev/") && is_writable).then(|| unescape(target))
    })
}

/// Undoes the octal escapes of /proc/PID/mounts: space, tab, newline and backslash.
fn unescape(field: &[u8]) -> CString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let escape = tail.first_chunk::<3>().filter(|_| byte == b'\\');
        let code = escape
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        rest = if code.is_some() { &tail[3..] } else { tail };
        bytes.push(code.unwrap_or(byte));
    }
    CString::new(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(mounts: &str) -> Vec<CString> {
        writable_disks(mounts.as_bytes()).collect()
    }

    #[test]
    fn only_writable_block_devices_are_settled() {
        let mounts = "\
            /dev/vda / erofs ro,relatime 0 0\n\
            proc /proc proc rw,nosuid 0 0\n\
            devtmpfs /dev devtmpfs rw 0 0\n\
            /dev/vdb /data ext4 rw,relatime,errors=ro 0 0\n\
            overlay /merged overlay rw,lowerdir=/dev/x 0 0\n\
            /dev/vdc /data/inner xfs rw 0 0\n";
        assert_eq!(
            disks(mounts),
            [c"/data".to_owned(), c"/data/inner".to_owned()]
        );
    }

    #[test]
    fn a_mount_point_may_have_any_name() {
        let mounts = "/dev/vdb /with\\040space\\134\\011x ext4 rw 0 0\n";
        assert_eq!(disks(mounts), [c"/with space\\\tx".to_owned()]);
    }

    #[test]
    fn lines_cut_short_are_passed_over() {
        assert_eq!(
            disks("/dev/vdb\n/dev/vdb /x\n/dev/vdb /x ext4\n\n").len(),
            0
        );
    }
}
