//! FUSE as it goes through the queues: protocol 7.38, as in Linux's <linux/fuse.h>. The guest's
//! numbers are little-endian on every architecture this builds for.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 38;
/// The oldest that has everything these structures have: 7.31 of Linux 5.4, the first with
/// virtio-fs.
pub(super) const OLDEST_MINOR: u32 = 31;

/// The node that is the share itself.
pub(super) const ROOT: u64 = 1;

macro_rules! operations {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// What the guest asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Op { $($name),* }

        impl Op {
            pub(super) fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

operations! {
    Lookup = 1, Forget = 2, GetAttr = 3, SetAttr = 4, ReadLink = 5, Symlink = 6, MkNod = 8,
    MkDir = 9, Unlink = 10, RmDir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16,
    StatFs = 17, Release = 18, FSync = 20, SetXattr = 21, GetXattr = 22, ListXattr = 23,
    RemoveXattr = 24, Init = 26, OpenDir = 27, ReadDir = 28, ReleaseDir = 29, FSyncDir = 30,
    Create = 35, Interrupt = 36, Destroy = 38, BatchForget = 42, FAllocate = 43, ReadDirPlus = 44,
    Rename2 = 45, LSeek = 46, CopyFileRange = 47, SyncFs = 50, TmpFile = 51,
}

impl Op {
    /// Whether the operation waits for a disk by its nature.
    pub(super) fn waits(self) -> bool {
        use Op::*;
        matches!(self, FSync | FSyncDir | SyncFs | FAllocate | CopyFileRange)
    }

    /// Whether the operation changes the share, and so is refused on one that is read-only. Opening
    /// is not among them: that depends on how.
    pub(super) fn writes(self) -> bool {
        use Op::*;
        match self {
            SetAttr | Symlink | MkNod | MkDir | Unlink | RmDir | Rename | Rename2 | Link
            | SetXattr | RemoveXattr | Create | FAllocate | CopyFileRange | TmpFile | Write => true,
            Lookup | Forget | GetAttr | ReadLink | Open | Read | StatFs | Release | FSync
            | GetXattr | ListXattr | Init | OpenDir | ReadDir | ReleaseDir | FSyncDir
            | Interrupt | Destroy | BatchForget | ReadDirPlus | LSeek | SyncFs => false,
        }
    }
}

macro_rules! wire {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type),* }
    )*};
}

wire! {
    /// The header before each request.
    struct InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        extensions: u16, padding: u16,
    }
    /// Before each answer; `error` is 0 or a negative errno.
    struct OutHeader { len: u32, error: i32, unique: u64 }

    struct Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32,
    }
    struct EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    struct AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }

    struct InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// Follows [`InitIn`] if that has [`init::EXT`].
    struct InitInExt { flags2: u32, unused: [u32; 11] }
    struct InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, unused: [u32; 7],
    }

    struct ForgetIn { lookups: u64 }
    struct BatchForgetIn { count: u32, dummy: u32 }
    struct ForgetOne { nodeid: u64, lookups: u64 }

    struct GetAttrIn { flags: u32, dummy: u32, fh: u64 }
    struct SetAttrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    struct MkNodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
    struct MkDirIn { mode: u32, umask: u32 }
    struct RenameIn { newdir: u64 }
    struct Rename2In { newdir: u64, flags: u32, padding: u32 }
    struct LinkIn { oldnodeid: u64 }
    struct OpenIn { flags: u32, open_flags: u32 }
    struct OpenOut { fh: u64, open_flags: u32, padding: u32 }
    struct CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    struct ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// READ, WRITE, READDIR and READDIRPLUS.
    struct TransferIn {
        fh: u64, offset: u64, size: u32, transfer_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    struct WriteOut { size: u32, padding: u32 }
    struct StatFsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    }
    struct FSyncIn { fh: u64, flags: u32, padding: u32 }
    struct SetXattrIn { size: u32, flags: u32 }
    /// Follows [`SetXattrIn`] where [`init::SETXATTR_EXT`] was agreed on.
    struct SetXattrInExt { setxattr_flags: u32, padding: u32 }
    /// GETXATTR and LISTXATTR.
    struct GetXattrIn { size: u32, padding: u32 }
    struct GetXattrOut { size: u32, padding: u32 }
    struct FAllocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    struct LSeekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
    struct LSeekOut { offset: u64 }
    struct CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// Before each name of READDIR, padded to 8 bytes.
    struct Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
}

/// Flags of [`InitIn`] and [`InitOut`], those of `flags2` above bit 32.
pub(super) mod init {
    pub(in super::super) const ASYNC_READ: u64 = 1;
    pub(in super::super) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(in super::super) const BIG_WRITES: u64 = 1 << 5;
    pub(in super::super) const DONT_MASK: u64 = 1 << 6;
    pub(in super::super) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(in super::super) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in super::super) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(in super::super) const ASYNC_DIO: u64 = 1 << 15;
    pub(in super::super) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(in super::super) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in super::super) const POSIX_ACL: u64 = 1 << 20;
    pub(in super::super) const MAX_PAGES: u64 = 1 << 22;
    pub(in super::super) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in super::super) const SUBMOUNTS: u64 = 1 << 27;
    pub(in super::super) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(in super::super) const SETXATTR_EXT: u64 = 1 << 29;
    pub(in super::super) const EXT: u64 = 1 << 30;
    pub(in super::super) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// Bits of [`SetAttrIn::valid`].
pub(super) mod valid {
    pub(in super::super) const MODE: u32 = 1;
    pub(in super::super) const UID: u32 = 1 << 1;
    pub(in super::super) const GID: u32 = 1 << 2;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const FH: u32 = 1 << 6;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
    pub(in super::super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Bits of [`OpenOut::open_flags`].
pub(super) mod fopen {
    pub(in super::super) const DIRECT_IO: u32 = 1;
    pub(in super::super) const KEEP_CACHE: u32 = 1 << 1;
    pub(in super::super) const CACHE_DIR: u32 = 1 << 3;
}

/// A bit of [`OpenIn::open_flags`] and [`CreateIn::open_flags`].
pub(super) const OPEN_KILL_SUIDGID: u32 = 1;
/// A bit of [`SetXattrInExt::setxattr_flags`].
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// A bit of [`GetAttrIn::flags`].
pub(super) const GETATTR_FH: u32 = 1;
/// A bit of [`TransferIn::transfer_flags`] of WRITE: from the guest's page cache.
pub(super) const WRITE_CACHE: u32 = 1;
/// A bit of [`TransferIn::transfer_flags`] of WRITE.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// A bit of [`FSyncIn::flags`].
pub(super) const FSYNC_FDATASYNC: u32 = 1;
/// [`Attr::flags`]: a mount of the host's begins here.
pub(super) const ATTR_SUBMOUNT: u32 = 1;
