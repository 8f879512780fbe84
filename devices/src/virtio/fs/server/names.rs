//! Requests about names: what is there, what is to be made, moved or removed.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

use super::{Request, Server, is_proc, next_name, next_text};
use crate::virtio::fs::abi::{
    ATTR_SUBMOUNT, CreateIn, EntryOut, LinkIn, MkDirIn, MkNodIn, Rename2In, RenameIn, init,
};
use crate::virtio::fs::host::{self, Status};
use crate::virtio::fs::nodes::Place;

/// How often a file may come and go between our finding it and our not finding it.
const RACES: usize = 8;

impl Server {
    pub(super) fn lookup(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let folder = self.folder(request.header.nodeid)?;
        let entry = self.enter(request.header.nodeid, &folder, name)?;
        request.put(&entry)
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        request.read_text()?;
        let mut text = &request.text[..];
        let name = next_name(&mut text)?;
        let target = next_text(&mut text)?;
        let folder = self.folder(request.header.nodeid)?;
        rustix::fs::symlinkat(target, &folder.fd, name)?;
        let entry = self.adopt(request, &folder, name, 0)?;
        request.put(&entry)
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let MkNodIn {
            mode, rdev, umask, ..
        } = request.take()?;
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let kind = match mode & libc::S_IFMT {
            libc::S_IFDIR | libc::S_IFLNK => return Err(Errno::INVAL),
            0 => FileType::RegularFile,
            kind => FileType::from_raw_mode(kind),
        };
        if kind == FileType::Unknown {
            return Err(Errno::INVAL);
        }
        // A device would be the host's. What an overlay in the guest puts where a file of a lower
        // layer was is none.
        let is_whiteout = kind == FileType::CharacterDevice && rdev == 0;
        match kind {
            FileType::CharacterDevice | FileType::BlockDevice if !is_whiteout => {
                return Err(Errno::PERM);
            }
            _ => {}
        }
        let folder = self.folder(request.header.nodeid)?;
        self.masked(umask, || {
            rustix::fs::mknodat(&folder.fd, name, kind, permissions(mode), 0)
        })?;
        let entry = self.adopt(request, &folder, name, mode)?;
        request.put(&entry)
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let MkDirIn { mode, umask } = request.take()?;
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let folder = self.folder(request.header.nodeid)?;
        self.masked(umask, || {
            rustix::fs::mkdirat(&folder.fd, name, permissions(mode))
        })?;
        // Giving a folder away leaves its mode alone.
        let entry = self.adopt(request, &folder, name, 0)?;
        request.put(&entry)
    }

    pub(super) fn create(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: CreateIn = request.take()?;
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let nodeid = request.header.nodeid;
        let folder = self.folder(nodeid)?;
        let exclusive = OFlags::from_bits_retain(asked.flags).contains(OFlags::EXCL);
        let flags = self.open_flags(asked.flags)?;
        for _ in 0..RACES {
            match self.make(request, &folder, name, &asked, flags) {
                Err(Errno::EXIST) if !exclusive => {}
                made => {
                    let file = made?;
                    // What is open, whatever the name has come to stand for since.
                    let status = host::status(&file)?;
                    let entered = self.nodes().enter(nodeid, name, &status)?;
                    let entry = self.entry(entered, &status, folder.identity.mount);
                    return self.put_created(request, file, entry, flags);
                }
            }
            // It is there, perhaps since a moment ago.
            let entry = match self.enter(nodeid, &folder, name) {
                Err(Errno::NOENT) => continue,
                found => found?,
            };
            let opened = self.open_for(entry.nodeid, flags, asked.open_flags);
            let file = opened.inspect_err(|_| self.nodes().forget(entry.nodeid, 1))?;
            return self.put_created(request, file, entry, flags);
        }
        Err(Errno::STALE)
    }

    pub(super) fn tmpfile(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: CreateIn = request.take()?;
        let folder = self.folder(request.header.nodeid)?;
        let flags = self.open_flags(asked.flags)? & !OFlags::TRUNC;
        // Writable, or the host has no use for one without a name.
        let flags = flags & !OFlags::RWMODE | OFlags::RDWR;
        let kind = OFlags::TMPFILE | OFlags::CLOEXEC;
        let here = self
            .descriptors
            .open_again(&folder.fd, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let file = self.masked(asked.umask, || {
            rustix::fs::openat(&here, c".", flags | kind, permissions(asked.mode))
        })?;
        self.give_file(request, &folder, &file, asked.mode)?;
        let status = host::status(&file)?;
        let place = self.descriptors.open_again(&file, OFlags::PATH)?;
        let nodeid = self.nodes().enter_orphan(place, &status)?;
        let entry = self.entry(nodeid, &status, folder.identity.mount);
        self.put_created(request, file, entry, flags)
    }

    pub(super) fn link(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let LinkIn { oldnodeid } = request.take()?;
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let nodeid = request.header.nodeid;
        let file = self.place(oldnodeid)?;
        let folder = self.folder(nodeid)?;
        self.descriptors.link(&file.fd, &folder.fd, name)?;
        let entry = self.enter(nodeid, &folder, name)?;
        request.put(&entry)
    }

    pub(super) fn remove(&self, request: &mut Request<'_>, flags: AtFlags) -> Result<usize, Errno> {
        request.read_text()?;
        let name = next_name(&mut &request.text[..])?;
        let parent = request.header.nodeid;
        let mut nodes = self.nodes();
        let folder = nodes.place(parent)?;
        let known = nodes.prepare_loss(parent, &folder.fd, name);
        rustix::fs::unlinkat(&folder.fd, name, flags)?;
        nodes.lose(known);
        Ok(0)
    }

    pub(super) fn rename(&self, request: &mut Request<'_>, flagged: bool) -> Result<usize, Errno> {
        let Rename2In { newdir, flags, .. } = if flagged {
            request.take()?
        } else {
            let RenameIn { newdir } = request.take()?;
            Rename2In {
                newdir,
                ..Rename2In::default()
            }
        };
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        request.read_text()?;
        let mut text = &request.text[..];
        let old = next_name(&mut text)?;
        let new = next_name(&mut text)?;
        let olddir = request.header.nodeid;
        // Under the lock all through, so that what is known of names follows what happened to them.
        let mut nodes = self.nodes();
        let from = nodes.place(olddir)?;
        let to = nodes.place(newdir)?;
        let source = host::status_at(&from.fd, old)?.identity;
        let target = host::status_at(&to.fd, new).ok().map(|s| s.identity);
        let overwrites = !flags.contains(RenameFlags::EXCHANGE) && target != Some(source);
        let lost = match overwrites {
            true => nodes.prepare_loss(newdir, &to.fd, new),
            false => None,
        };
        rustix::fs::renameat_with(&from.fd, old, &to.fd, new, flags)?;
        nodes.lose(lost);
        if target == Some(source) {
            // Two names of one file: nothing happened.
            return Ok(0);
        }
        nodes.moved(&source, newdir, new);
        if let (Some(target), true) = (target, flags.contains(RenameFlags::EXCHANGE)) {
            nodes.moved(&target, olddir, old);
        }
        Ok(0)
    }

    /// The place of a folder.
    pub(super) fn folder(&self, nodeid: u64) -> Result<Place, Errno> {
        let place = self.place(nodeid)?;
        match place.kind() {
            libc::S_IFDIR => Ok(place),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// Tells the guest of `name` in a folder.
    pub(super) fn enter(
        &self,
        parent: u64,
        folder: &Place,
        name: &CStr,
    ) -> Result<EntryOut, Errno> {
        let status = host::status_at(&folder.fd, name)?;
        let mount = folder.identity.mount;
        if status.identity.mount != mount && is_proc(&host::place_at(&folder.fd, name)?)? {
            return Err(Errno::ACCESS);
        }
        let nodeid = self.nodes().enter(parent, name, &status)?;
        Ok(self.entry(nodeid, &status, mount))
    }

    fn entry(&self, nodeid: u64, status: &Status, parent_mount: u64) -> EntryOut {
        let mut attr = status.attr;
        if status.identity.mount != parent_mount
            && status.is_folder()
            && self.agreed(init::SUBMOUNTS)
        {
            attr.flags |= ATTR_SUBMOUNT;
        }
        EntryOut {
            nodeid,
            entry_valid: self.cache.seconds(),
            attr_valid: self.cache.seconds(),
            attr,
            ..EntryOut::default()
        }
    }

    /// Gives what was just made as `name` to whom it should belong, and tells the guest of it.
    /// `mode` is what giving it away may have taken from it, and 0 if it has none to lose.
    fn adopt(
        &self,
        request: &Request<'_>,
        folder: &Place,
        name: &CStr,
        mode: u32,
    ) -> Result<EntryOut, Errno> {
        if let Some((uid, gid)) = self.owner(request, folder)? {
            let given =
                rustix::fs::chownat(&folder.fd, name, Some(uid), gid, AtFlags::SYMLINK_NOFOLLOW);
            let given = given.and_then(|()| {
                if mode & SPECIAL == 0 {
                    return Ok(());
                }
                let place = host::place_at(&folder.fd, name)?;
                let left = host::status(&place)?.attr.mode;
                self.descriptors
                    .change_mode(&place, permissions(left | mode & SPECIAL))
            });
            if let Err(error) = given {
                // Not to be left behind with the wrong owner. A folder is empty yet.
                let _ = rustix::fs::unlinkat(&folder.fd, name, AtFlags::empty())
                    .or_else(|_| rustix::fs::unlinkat(&folder.fd, name, AtFlags::REMOVEDIR));
                return Err(error);
            }
        }
        self.enter(request.header.nodeid, folder, name)
    }

    /// Makes a regular file that was not there.
    fn make(
        &self,
        request: &Request<'_>,
        folder: &Place,
        name: &CStr,
        asked: &CreateIn,
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let make = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let flags = flags & !OFlags::TRUNC | make;
        let file = self.masked(asked.umask, || {
            rustix::fs::openat(&folder.fd, name, flags, permissions(asked.mode))
        })?;
        self.give_file(request, folder, &file, asked.mode)
            .inspect_err(|_| {
                let _ = rustix::fs::unlinkat(&folder.fd, name, AtFlags::empty());
            })?;
        Ok(file)
    }

    fn give_file(
        &self,
        request: &Request<'_>,
        folder: &Place,
        file: &OwnedFd,
        mode: u32,
    ) -> Result<(), Errno> {
        if let Some((uid, gid)) = self.owner(request, folder)? {
            rustix::fs::fchown(file, Some(uid), gid)?;
            if mode & SPECIAL != 0 {
                let left = host::status(file)?.attr.mode;
                rustix::fs::fchmod(file, permissions(left | mode & SPECIAL))?;
            }
        }
        Ok(())
    }

    /// Whom a new file in `folder` should belong to, unless it does already. Its group is that of
    /// the folder if that says so (S_ISGID).
    fn owner(
        &self,
        request: &Request<'_>,
        folder: &Place,
    ) -> Result<Option<(Uid, Option<Gid>)>, Errno> {
        let (uid, gid) = (request.header.uid, request.header.gid);
        if (uid, gid) == self.own || !self.gives {
            return Ok(None);
        }
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let inherits = host::status(&folder.fd)?.attr.mode & libc::S_ISGID != 0;
        let gid = (!inherits).then(|| Gid::from_raw(gid));
        Ok(Some((Uid::from_raw(uid), gid)))
    }

    fn put_created(
        &self,
        request: &mut Request<'_>,
        file: OwnedFd,
        entry: EntryOut,
        flags: OFlags,
    ) -> Result<usize, Errno> {
        let opened = self.keep_open(file, entry.nodeid, flags);
        let open = opened.inspect_err(|_| self.nodes().forget(entry.nodeid, 1))?;
        Ok(request.put(&entry)? + request.put(&open)?)
    }
}

/// Bits that are lost when a file is given away.
const SPECIAL: u32 = libc::S_ISUID | libc::S_ISGID;

/// The bits of a mode besides the type.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
