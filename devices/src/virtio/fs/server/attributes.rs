//! Requests about what a file is: owner, mode, size, times, extended attributes, link target.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::names::permissions;
use super::{Request, Server, next_text};
use crate::virtio::fs::abi::{
    AttrOut, GETATTR_FH, GetAttrIn, GetXattrIn, GetXattrOut, SETXATTR_ACL_KILL_SGID, SetAttrIn,
    SetXattrIn, SetXattrInExt, StatFsOut, init, valid,
};
use crate::virtio::fs::host::{self, Descriptors, Status};
use crate::virtio::fs::nodes::Place;

/// The longest extended attribute, and list of their names (Linux, xattr(7)).
const MAX_XATTR: usize = 64 << 10;

impl Server {
    pub(super) fn get_attr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: GetAttrIn = request.take()?;
        let status = if asked.flags & GETATTR_FH == 0 {
            host::status(&self.place(request.header.nodeid)?.fd)?
        } else {
            host::status(&self.handles.get(asked.fh)?.file)?
        };
        self.put_attr(request, &status)
    }

    pub(super) fn set_attr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: SetAttrIn = request.take()?;
        let place = self.place(request.header.nodeid)?;
        let wants = |bits: u32| asked.valid & bits != 0;
        if wants(valid::MODE) {
            if place.kind() == libc::S_IFLNK {
                return Err(Errno::OPNOTSUPP);
            }
            self.descriptors
                .change_mode(&place.fd, permissions(asked.mode))?;
        }
        if wants(valid::UID | valid::GID) {
            self.change_owner(&place, &asked)?;
        }
        if wants(valid::SIZE) {
            self.change_size(&place, &asked)?;
        }
        if wants(valid::ATIME | valid::MTIME) {
            let times = times(&asked)?;
            rustix::fs::utimensat(&place.fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let status = host::status(&place.fd)?;
        self.put_attr(request, &status)
    }

    pub(super) fn read_link(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let place = self.place(request.header.nodeid)?;
        let mut target = [0; libc::PATH_MAX as usize];
        let len = rustix::fs::readlinkat_raw(&place.fd, c"", &mut target[..])?;
        request.put_bytes(&target[..len])
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let place = self.place(request.header.nodeid)?;
        let statfs = rustix::fs::fstatvfs(&place.fd)?;
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        request.put(&StatFsOut {
            blocks: statfs.f_blocks,
            bfree: statfs.f_bfree,
            bavail: statfs.f_bavail,
            files: statfs.f_files,
            ffree: statfs.f_ffree,
            bsize: small(statfs.f_bsize),
            namelen: small(statfs.f_namemax),
            frsize: small(statfs.f_frsize),
            ..StatFsOut::default()
        })
    }

    pub(super) fn set_xattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let SetXattrIn { size, flags } = request.take()?;
        let mut more = SetXattrInExt::default();
        if self.agreed(init::SETXATTR_EXT) {
            more = request.take()?;
        }
        request.read_text()?;
        let mut text = &request.text[..];
        let name = xattr_name(&mut text)?;
        may_change(name)?;
        let value = text.get(..size as usize).ok_or(Errno::INVAL)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let place = self.place(request.header.nodeid)?;
        rustix::fs::setxattr(Descriptors::path(place.fd.as_fd()), name, value, flags)?;
        if more.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            let mode = host::status(&place.fd)?.attr.mode;
            if mode & libc::S_ISGID != 0 {
                self.descriptors
                    .change_mode(&place.fd, permissions(mode & !libc::S_ISGID))?;
            }
        }
        Ok(0)
    }

    pub(super) fn get_xattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let GetXattrIn { size, .. } = request.take()?;
        request.read_text()?;
        let name = xattr_name(&mut &request.text[..])?;
        let kind = Xattr::of(name.to_bytes());
        match kind {
            Xattr::Shared | Xattr::AccessControl => {}
            Xattr::OfHost => return Err(Errno::NODATA),
            Xattr::Meaningless => return Err(Errno::OPNOTSUPP),
        }
        // Linux asks for the lists before it lets a program in, and any other error keeps it out.
        let none = |error| match (kind, error) {
            (Xattr::AccessControl, Errno::OPNOTSUPP) => Errno::NODATA,
            (_, error) => error,
        };
        let place = self.place(request.header.nodeid)?;
        let path = Descriptors::path(place.fd.as_fd());
        if size == 0 {
            let size = rustix::fs::getxattr_query(path, name).map_err(none)?;
            return put_size(request, size);
        }
        let mut value = vec![0; MAX_XATTR.min(size as usize)];
        let len = rustix::fs::getxattr(path, name, &mut value).map_err(none)?;
        request.put_bytes(&value[..len])
    }

    pub(super) fn list_xattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let GetXattrIn { size, .. } = request.take()?;
        let place = self.place(request.header.nodeid)?;
        let path = Descriptors::path(place.fd.as_fd());
        if size == 0 {
            let size = rustix::fs::listxattr_query(path)?;
            return put_size(request, size);
        }
        let mut names = vec![0; MAX_XATTR.min(size as usize)];
        let len = rustix::fs::listxattr(path, &mut names)?;
        let names = &names[..len];
        let mut shown = Vec::with_capacity(len);
        for name in names.split_inclusive(|byte| *byte == 0) {
            if Xattr::of(name.strip_suffix(b"\0").unwrap_or(name)).is_guests() {
                shown.extend_from_slice(name);
            }
        }
        request.put_bytes(&shown)
    }

    pub(super) fn remove_xattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        request.read_text()?;
        let name = xattr_name(&mut &request.text[..])?;
        may_change(name)?;
        let place = self.place(request.header.nodeid)?;
        rustix::fs::removexattr(Descriptors::path(place.fd.as_fd()), name)?;
        Ok(0)
    }

    /// Clears what a write by a guest's process without CAP_FSETID clears in a file's mode: the
    /// set-user-ID bit, and the set-group-ID bit if the group may execute the file.
    pub(super) fn kill_privileges(&self, file: &OwnedFd) -> Result<(), Errno> {
        let mode = host::status(file)?.attr.mode;
        let group = match mode & libc::S_IXGRP {
            0 => 0,
            _ => libc::S_ISGID,
        };
        let left = mode & !(libc::S_ISUID | group);
        if left != mode {
            rustix::fs::fchmod(file, permissions(left))?;
        }
        Ok(())
    }

    fn change_owner(&self, place: &Place, asked: &SetAttrIn) -> Result<(), Errno> {
        let wanted = |bit: u32, id: u32| (asked.valid & bit != 0).then_some(id);
        let uid = wanted(valid::UID, asked.uid);
        let gid = wanted(valid::GID, asked.gid);
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        rustix::fs::chownat(&place.fd, c"", uid, gid, AtFlags::EMPTY_PATH)
    }

    fn change_size(&self, place: &Place, asked: &SetAttrIn) -> Result<(), Errno> {
        let kills = asked.valid & valid::KILL_SUIDGID != 0;
        let truncate = |file: &OwnedFd| {
            rustix::fs::ftruncate(file, asked.size)?;
            if kills {
                self.kill_privileges(file)?;
            }
            Ok(())
        };
        if asked.valid & valid::FH != 0 {
            return truncate(&self.handles.get(asked.fh)?.file);
        }
        match place.kind() {
            libc::S_IFREG => truncate(&self.descriptors.open_again(&place.fd, OFlags::WRONLY)?),
            libc::S_IFDIR => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    fn put_attr(&self, request: &mut Request<'_>, status: &Status) -> Result<usize, Errno> {
        request.put(&AttrOut {
            attr_valid: self.cache.seconds(),
            attr: status.attr,
            ..AttrOut::default()
        })
    }
}

fn put_size(request: &mut Request<'_>, size: usize) -> Result<usize, Errno> {
    let size = u32::try_from(size).map_err(|_| Errno::TOOBIG)?;
    request.put(&GetXattrOut { size, padding: 0 })
}

/// Whose an extended attribute is, by its name. The server has all rights on the host, so it must not
/// set what only those may set who are trusted there. docs/pods.md tells users of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Xattr {
    /// The guest's to set: what programs keep, capabilities of files, as images have them, and what an
    /// overlay in the guest notes of its layers. The host's kernel keeps the last apart from what an
    /// overlay of the host's notes itself.
    Shared,
    /// Belongs to the host's services and file systems. The guest sees none, as without privileges.
    OfHost,
    /// POSIX access control lists, by which the guest's kernel decides who may do what, as it does by
    /// owners and modes. The host's kernel keeps them and a file's mode in step, and gives files their
    /// folder's default.
    AccessControl,
    /// Belongs to the host's kernel: labels, measurements. They mean nothing to the guest's kernel.
    Meaningless,
}

impl Xattr {
    fn of(name: &[u8]) -> Self {
        match name {
            b"security.capability" => Self::Shared,
            b"system.posix_acl_access" | b"system.posix_acl_default" => Self::AccessControl,
            name if name.starts_with(b"user.") => Self::Shared,
            name if name.starts_with(b"trusted.overlay.") => Self::Shared,
            name if name.starts_with(b"trusted.") => Self::OfHost,
            _ => Self::Meaningless,
        }
    }

    /// Whether the guest may see and set it.
    fn is_guests(self) -> bool {
        matches!(self, Self::Shared | Self::AccessControl)
    }
}

fn may_change(name: &CStr) -> Result<(), Errno> {
    match Xattr::of(name.to_bytes()) {
        Xattr::Shared | Xattr::AccessControl => Ok(()),
        Xattr::OfHost => Err(Errno::PERM),
        Xattr::Meaningless => Err(Errno::OPNOTSUPP),
    }
}

/// The next text, which must be the name of an extended attribute.
fn xattr_name<'a>(text: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let name = next_text(text)?;
    match name.to_bytes() {
        b"" => Err(Errno::INVAL),
        long if long.len() > 255 => Err(Errno::RANGE),
        _ => Ok(name),
    }
}

fn times(asked: &SetAttrIn) -> Result<Timestamps, Errno> {
    let time = |bit: u32, now: u32, seconds: u64, nanos: u32| {
        let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        if asked.valid & bit == 0 {
            Ok(special(UTIME_OMIT))
        } else if asked.valid & now != 0 {
            Ok(special(UTIME_NOW))
        } else if nanos >= 1_000_000_000 {
            Err(Errno::INVAL)
        } else {
            Ok(Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: nanos.into(),
            })
        }
    };
    Ok(Timestamps {
        last_access: time(valid::ATIME, valid::ATIME_NOW, asked.atime, asked.atimensec)?,
        last_modification: time(valid::MTIME, valid::MTIME_NOW, asked.mtime, asked.mtimensec)?,
    })
}
