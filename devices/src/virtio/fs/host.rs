//! The host's file system, one name below one open folder at a time. Nothing here follows a
//! symbolic link of the share's, and `server` has checked that no name has a slash.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::abi::Attr;

/// Stands for a file wherever it is: not by its name.
const PLACE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Which file system a file is of: the numbers of its device.
pub(super) type Device = (u32, u32);

/// What tells one file from all others. The time of birth tells it from an earlier file whose
/// number it got, where the file system is on a device and knows it; the type of the file tells it
/// from one of another kind everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    /// The mount the file is seen through. Through another mount it is another file: folders have
    /// one parent.
    pub(super) mount: u64,
    pub(super) device: Device,
    inode: u64,
    birth: (i64, u32),
    /// The type bits of its mode, which never change.
    pub(super) kind: u32,
}

impl Identity {
    /// What of the identity another life of the VM finds again: mounts have other numbers then.
    pub(super) fn lasting(&self) -> LastingIdentity {
        LastingIdentity {
            device: self.device,
            inode: self.inode,
            birth: self.birth,
            kind: self.kind,
        }
    }
}

/// What tells one file from all others, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastingIdentity {
    device: Device,
    inode: u64,
    birth: (i64, u32),
    kind: u32,
}

/// What statx(2) says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Status {
    pub(super) identity: Identity,
    pub(super) attr: Attr,
}

impl Status {
    pub(super) fn is_folder(&self) -> bool {
        self.identity.kind == libc::S_IFDIR
    }

    fn of(statx: &Statx) -> Self {
        // An overlay tells that of the layer, and so another one once a file is copied up. It is on no
        // device, as are others that do not use numbers again.
        let on_device = statx.stx_dev_major != 0;
        let birth = if statx.stx_mask & StatxFlags::BTIME.bits() == 0 || !on_device {
            (0, 0)
        } else {
            (statx.stx_btime.tv_sec, statx.stx_btime.tv_nsec)
        };
        let seconds = |time: &StatxTimestamp| time.tv_sec.cast_unsigned();
        Self {
            identity: Identity {
                mount: statx.stx_mnt_id,
                device: (statx.stx_dev_major, statx.stx_dev_minor),
                inode: statx.stx_ino,
                birth,
                kind: u32::from(statx.stx_mode) & libc::S_IFMT,
            },
            attr: Attr {
                ino: statx.stx_ino,
                size: statx.stx_size,
                blocks: statx.stx_blocks,
                atime: seconds(&statx.stx_atime),
                mtime: seconds(&statx.stx_mtime),
                ctime: seconds(&statx.stx_ctime),
                atimensec: statx.stx_atime.tv_nsec,
                mtimensec: statx.stx_mtime.tv_nsec,
                ctimensec: statx.stx_ctime.tv_nsec,
                mode: statx.stx_mode.into(),
                nlink: statx.stx_nlink,
                uid: statx.stx_uid,
                gid: statx.stx_gid,
                rdev: encode_device(statx.stx_rdev_major, statx.stx_rdev_minor),
                blksize: statx.stx_blksize,
                flags: 0,
            },
        }
    }
}

/// What `name` in `folder` is.
pub(super) fn status_at(folder: impl AsFd, name: &CStr) -> Result<Status, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(folder, name, flags)
}

/// What an open file is, also one that stands for a place.
pub(super) fn status(file: impl AsFd) -> Result<Status, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH)
}

fn statx(folder: impl AsFd, name: &CStr, flags: AtFlags) -> Result<Status, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    Ok(Status::of(&rustix::fs::statx(folder, name, flags, mask)?))
}

/// The place of `name` in `folder`, whatever kind of file is there: opening it so has no effect.
pub(super) fn place_at(folder: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(folder, name, PLACE, Mode::empty())
}

/// Makes the thread's mask of permissions its own, and empty: the guest has applied its own.
pub(super) fn keep_permissions() -> Result<(), Errno> {
    #[expect(
        deprecated,
        reason = "its successor is unsafe because of flags not used here"
    )]
    rustix::thread::unshare(UnshareFlags::FS)?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// The process's descriptors as files, by which a place is opened for use.
#[derive(Debug)]
pub(super) struct Descriptors(OwnedFd);

impl Descriptors {
    pub(super) fn open() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, "/proc/self/fd", flags, Mode::empty()).map(Self)
    }

    /// Opens what `place` stands for if that is a regular file or a folder: opening anything else
    /// can block, or do something to the host. The guest's kernel has its own pipes, sockets and
    /// devices.
    pub(super) fn open_again(&self, place: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        // Asked of the descriptor that is opened, so whatever names have come to stand for.
        match status(&place)?.identity.kind {
            libc::S_IFREG | libc::S_IFDIR => {}
            libc::S_IFLNK => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(&self.0, DecInt::from_fd(place), flags, Mode::empty())
    }

    pub(super) fn change_mode(&self, place: impl AsFd, mode: Mode) -> Result<(), Errno> {
        rustix::fs::chmodat(&self.0, DecInt::from_fd(place), mode, AtFlags::empty())
    }

    /// Gives the file another name.
    pub(super) fn link(
        &self,
        place: impl AsFd,
        folder: impl AsFd,
        name: &CStr,
    ) -> Result<(), Errno> {
        let follow = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(&self.0, DecInt::from_fd(place), folder, name, follow)
    }

    /// A path by which calls that take nothing else reach the file, while `place` is open.
    pub(super) fn path(place: BorrowedFd<'_>) -> String {
        format!("/proc/self/fd/{}", place.as_raw_fd())
    }
}

/// A device number as Linux passes it to user space (new_encode_dev).
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}
