//! The requests that a guest's kernel makes of a share.

use std::path::PathBuf;

use rustix::fs::OFlags;
use vmm_sys_util::tempdir::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use super::super::abi::*;
use super::super::*;
use super::{QUEUE, config};
use crate::virtio::testing::{Buffer, Guest};

/// A share and the guest that has mounted it.
pub(super) struct Client {
    pub(super) guest: Guest,
    pub(super) folder: TempDir,
    unique: u64,
    /// Who asks.
    pub(super) owner: (u32, u32),
}

impl Client {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(super) fn with(change: impl FnOnce(&mut FsConfig)) -> Self {
        let folder = TempDir::new().unwrap();
        let mut config = config(folder.as_path());
        change(&mut config);
        let mut client = Self {
            guest: Guest::live(Fs::new(config).unwrap()),
            folder,
            unique: 0,
            owner: (0, 0),
        };
        client.init();
        client
    }

    pub(super) fn init(&mut self) -> InitOut {
        self.init_with(u32::MAX)
    }

    pub(super) fn init_with(&mut self, flags: u32) -> InitOut {
        let asked = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags,
        };
        let more = InitInExt {
            flags2: u32::MAX,
            unused: [0; 11],
        };
        let body = [asked.as_bytes(), more.as_bytes()].concat();
        self.ask(Op::Init, 0, &body).unwrap()
    }

    /// The path of `name` on the host.
    pub(super) fn host(&self, name: &str) -> PathBuf {
        self.folder.as_path().join(name)
    }

    /// The answer's bytes, or its errno.
    pub(super) fn call(&mut self, op: Op, nodeid: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode: NUMBERS
                .into_iter()
                .find(|n| Op::of(*n) == Some(op))
                .unwrap(),
            unique: self.unique,
            nodeid,
            uid: self.owner.0,
            gid: self.owner.1,
            ..InHeader::default()
        };
        let request = Buffer::Out([header.as_bytes(), body].concat());
        let answer = self
            .guest
            .request(QUEUE, &[request, Buffer::In(16), Buffer::In(0x1_0000)]);
        let answer = answer.expect("every request comes back");
        if answer.is_empty() {
            return Ok(answer);
        }
        let (out, rest) = OutHeader::read_from_prefix(&answer).unwrap();
        assert_eq!((out.unique, out.len as usize), (self.unique, answer.len()));
        match out.error {
            0 => Ok(rest.to_vec()),
            error => {
                assert!(rest.is_empty());
                Err(-error)
            }
        }
    }

    pub(super) fn ask<T: FromBytes>(&mut self, op: Op, nodeid: u64, body: &[u8]) -> Result<T, i32> {
        let answer = self.call(op, nodeid, body)?;
        Ok(T::read_from_prefix(&answer)
            .expect("the answer is long enough")
            .0)
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.ask(Op::Lookup, parent, &text(&[name]))
    }

    pub(super) fn attr(&mut self, nodeid: u64) -> Result<Attr, i32> {
        let asked = GetAttrIn::default();
        let answer: AttrOut = self.ask(Op::GetAttr, nodeid, asked.as_bytes())?;
        Ok(answer.attr)
    }

    pub(super) fn set(&mut self, nodeid: u64, asked: SetAttrIn) -> Result<Attr, i32> {
        let answer: AttrOut = self.ask(Op::SetAttr, nodeid, asked.as_bytes())?;
        Ok(answer.attr)
    }

    pub(super) fn open(&mut self, nodeid: u64, flags: OFlags) -> Result<u64, i32> {
        let asked = OpenIn {
            flags: flags.bits(),
            open_flags: 0,
        };
        let answer: OpenOut = self.ask(Op::Open, nodeid, asked.as_bytes())?;
        Ok(answer.fh)
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: OFlags,
    ) -> Result<(EntryOut, u64), i32> {
        let asked = CreateIn {
            flags: (flags | OFlags::CREATE).bits(),
            mode: libc::S_IFREG | 0o640,
            ..CreateIn::default()
        };
        let body = [asked.as_bytes(), &text(&[name])].concat();
        let answer = self.call(Op::Create, parent, &body)?;
        let (entry, rest) = EntryOut::read_from_prefix(&answer).unwrap();
        Ok((entry, OpenOut::read_from_bytes(rest).unwrap().fh))
    }

    pub(super) fn read(&mut self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let asked = TransferIn {
            fh,
            offset,
            size,
            ..TransferIn::default()
        };
        self.call(Op::Read, 0, asked.as_bytes())
    }

    pub(super) fn write(
        &mut self,
        fh: u64,
        offset: u64,
        bytes: &[u8],
        flags: OFlags,
    ) -> Result<u32, i32> {
        let asked = TransferIn {
            fh,
            offset,
            size: u32::try_from(bytes.len()).unwrap(),
            flags: flags.bits(),
            ..TransferIn::default()
        };
        let body = [asked.as_bytes(), bytes].concat();
        let answer: WriteOut = self.ask(Op::Write, 0, &body)?;
        Ok(answer.size)
    }

    pub(super) fn release(&mut self, fh: u64) -> Result<(), i32> {
        let asked = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(Op::Release, 0, asked.as_bytes()).map(drop)
    }

    pub(super) fn named(&mut self, op: Op, parent: u64, name: &str) -> Result<(), i32> {
        self.call(op, parent, &text(&[name])).map(drop)
    }

    pub(super) fn mkdir(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let asked = MkDirIn {
            mode: 0o755,
            umask: 0,
        };
        let body = [asked.as_bytes(), &text(&[name])].concat();
        self.ask(Op::MkDir, parent, &body)
    }

    pub(super) fn mknod(
        &mut self,
        parent: u64,
        name: &str,
        mode: u32,
        rdev: u32,
    ) -> Result<EntryOut, i32> {
        let asked = MkNodIn {
            mode,
            rdev,
            ..MkNodIn::default()
        };
        let body = [asked.as_bytes(), &text(&[name])].concat();
        self.ask(Op::MkNod, parent, &body)
    }

    pub(super) fn rename(
        &mut self,
        from: (u64, &str),
        to: (u64, &str),
        flags: u32,
    ) -> Result<(), i32> {
        let asked = Rename2In {
            newdir: to.0,
            flags,
            padding: 0,
        };
        let body = [asked.as_bytes(), &text(&[from.1, to.1])].concat();
        self.call(Op::Rename2, from.0, &body).map(drop)
    }

    pub(super) fn link(&mut self, nodeid: u64, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let asked = LinkIn { oldnodeid: nodeid };
        let body = [asked.as_bytes(), &text(&[name])].concat();
        self.ask(Op::Link, parent, &body)
    }

    pub(super) fn symlink(
        &mut self,
        parent: u64,
        name: &str,
        target: &str,
    ) -> Result<EntryOut, i32> {
        self.ask(Op::Symlink, parent, &text(&[name, target]))
    }

    pub(super) fn set_xattr(&mut self, nodeid: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        self.set_xattr_with(nodeid, name, value, 0)
    }

    pub(super) fn set_xattr_with(
        &mut self,
        nodeid: u64,
        name: &str,
        value: &[u8],
        setxattr_flags: u32,
    ) -> Result<(), i32> {
        let asked = SetXattrIn {
            size: u32::try_from(value.len()).unwrap(),
            flags: 0,
        };
        let more = SetXattrInExt {
            setxattr_flags,
            padding: 0,
        };
        let body = [asked.as_bytes(), more.as_bytes(), &text(&[name]), value].concat();
        self.call(Op::SetXattr, nodeid, &body).map(drop)
    }

    pub(super) fn get_xattr(&mut self, nodeid: u64, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        let asked = GetXattrIn { size, padding: 0 };
        let body = [asked.as_bytes(), &text(&[name])].concat();
        self.call(Op::GetXattr, nodeid, &body)
    }

    pub(super) fn list_xattrs(&mut self, nodeid: u64) -> Vec<u8> {
        let asked = GetXattrIn {
            size: 999,
            padding: 0,
        };
        self.call(Op::ListXattr, nodeid, asked.as_bytes()).unwrap()
    }

    pub(super) fn forget(&mut self, nodeid: u64, lookups: u64) {
        let asked = ForgetIn { lookups };
        self.call(Op::Forget, nodeid, asked.as_bytes()).unwrap();
    }

    /// Names and numbers that a folder lists, in as many answers as it takes.
    pub(super) fn list(&mut self, nodeid: u64, op: Op, size: u32) -> Vec<(String, u64)> {
        let open = OpenIn::default();
        let OpenOut { fh, .. } = self.ask(Op::OpenDir, nodeid, open.as_bytes()).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let asked = TransferIn {
                fh,
                offset,
                size,
                ..TransferIn::default()
            };
            let answer = self.call(op, nodeid, asked.as_bytes()).unwrap();
            if answer.is_empty() {
                self.release(fh).unwrap();
                return names;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let mut node = 0;
                if op == Op::ReadDirPlus {
                    let (entry, after) = EntryOut::read_from_prefix(rest).unwrap();
                    (node, rest) = (entry.nodeid, after);
                }
                let (dirent, after) = Dirent::read_from_prefix(rest).unwrap();
                let len = dirent.namelen as usize;
                names.push((String::from_utf8(after[..len].to_vec()).unwrap(), node));
                offset = dirent.off;
                rest = &after[len.next_multiple_of(8).min(after.len())..];
            }
        }
    }
}

const NUMBERS: std::ops::RangeInclusive<u32> = 1..=51;

pub(super) fn text(parts: &[&str]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|part| [part.as_bytes(), b"\0"].concat())
        .collect()
}
