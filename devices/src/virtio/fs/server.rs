//! Answers the guest's FUSE requests, from any of its threads.
//!
//! One file for each kind of request: [`names`] look up, make and remove, [`attributes`] tell and
//! set what a file is, [`data`] opens, reads and writes, [`folder`] lists. [`syncs`] bounds what the
//! guest can have the host's disks do.

mod attributes;
mod data;
mod folder;
mod names;
mod syncs;

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use self::names::permissions;
use self::syncs::Syncs;
use super::FsError;
use super::abi::{
    self, BatchForgetIn, ForgetIn, ForgetOne, InHeader, InitIn, InitInExt, InitOut, Op, OutHeader,
    init,
};
use super::handles::{Handles, MOST};
use super::host::Descriptors;
use super::nodes::{Limits, Nodes, Place};
use crate::host::user_of_files;
use crate::virtio::limiter::Cost;
use crate::virtio::{Chain, Counters, GuestRam, Segments};

/// Most bytes of one READ or WRITE.
const MAX_TRANSFER: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Most bytes of one request with the room for its answer: so many pages of the largest kind there is,
/// and what comes with them.
pub(super) const MAX_REQUEST: usize = MAX_PAGES as usize * (64 << 10) + (1 << 20);
/// Most files that one BATCH_FORGET is followed for: no other request finds a file meanwhile. Linux
/// makes none of them for virtio-fs.
const MAX_FORGETS: u32 = 4096;
/// Most bytes of names, link targets and attributes in one request.
const MAX_TEXT: usize = 70 << 10;
/// Requests Linux may have under way that no program waits for.
const MAX_BACKGROUND: u16 = 64;
/// The most nodes, of up to 768 bytes each: 300 MiB of the host's memory, or with the longest names 600, for
/// gigabytes of the guest's.
const MAX_NODES: usize = 1 << 20;
const MAX_PLACES: usize = 1024;

/// What the guest may keep of the share without asking again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: for folders that others change, and want to be seen at once.
    None,
    /// Names and attributes for a second, content until it is seen to have changed.
    Auto,
    /// Everything: for folders that only the guest changes.
    Always,
}

impl Cache {
    /// Seconds for which a name or attributes hold.
    fn seconds(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Auto => 1,
            Self::Always => 24 * 60 * 60,
        }
    }
}

/// A shared folder.
#[derive(Debug)]
pub(super) struct Server {
    descriptors: Descriptors,
    nodes: Mutex<Nodes>,
    pub(super) handles: Handles,
    syncs: Syncs,
    readonly: bool,
    cache: Cache,
    writeback: bool,
    /// Whom files made here belong to.
    own: (u32, u32),
    /// Whether files made here may be given to another user.
    gives: bool,
    /// FUSE features agreed on.
    session: AtomicU64,
}

/// What a request brings besides its header.
struct Request<'a> {
    header: InHeader,
    ram: &'a GuestRam,
    /// What is left of it.
    input: &'a mut Segments,
    /// The room for its answer, after the header.
    output: &'a mut Segments,
    /// Room for names.
    text: &'a mut Vec<u8>,
    /// What it takes of the share's tokens.
    cost: &'a mut Cost,
}

/// Room that a thread keeps from one request to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    text: Vec<u8>,
    header: Segments,
}

impl Request<'_> {
    fn take<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        take(self.ram, self.input)
    }

    /// Reads the rest of the request as text.
    fn read_text(&mut self) -> Result<(), Errno> {
        let len = self.input.len();
        if len > MAX_TEXT {
            return Err(Errno::INVAL);
        }
        self.text.resize(len, 0);
        self.input
            .read(self.ram, self.text)
            .map_err(|_| Errno::FAULT)
    }

    /// Answers with `value`. Returns its length.
    fn put<T: IntoBytes + zerocopy::Immutable>(&mut self, value: &T) -> Result<usize, Errno> {
        self.put_bytes(value.as_bytes())
    }

    fn put_bytes(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        let written = self.output.write(self.ram, bytes);
        written.map_err(|_| Errno::OVERFLOW)?;
        Ok(bytes.len())
    }
}

fn take<T: FromBytes + IntoBytes>(ram: &GuestRam, input: &mut Segments) -> Result<T, Errno> {
    let mut value = T::new_zeroed();
    let read = input.read(ram, value.as_mut_bytes());
    read.map_err(|_| Errno::INVAL)?;
    Ok(value)
}

/// The next of the NUL-terminated texts in `text`.
fn next_text<'a>(text: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let first = CStr::from_bytes_until_nul(text).map_err(|_| Errno::INVAL)?;
    *text = &text[first.count_bytes() + 1..];
    Ok(first)
}

/// The next text, which must be a name of one file.
fn next_name<'a>(text: &mut &'a [u8]) -> Result<&'a CStr, Errno> {
    let name = next_text(text)?;
    match name.to_bytes() {
        long if long.len() > 255 => Err(Errno::NAMETOOLONG),
        bytes if is_name(bytes) => Ok(name),
        _ => Err(Errno::INVAL),
    }
}

/// Whether `bytes` can be what a file is called in its folder.
pub(super) fn is_name(bytes: &[u8]) -> bool {
    !matches!(bytes, b"" | b"." | b"..") && bytes.len() <= 255 && !bytes.contains(&b'/')
}

/// How a server is to be.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) readonly: bool,
    pub(super) cache: Cache,
    pub(super) writeback: bool,
    /// Descriptors it may hold.
    pub(super) descriptors: usize,
}

impl Server {
    /// Shares `folder`.
    pub(super) fn new(folder: &Path, options: &Options) -> Result<Self, FsError> {
        let Options {
            readonly,
            cache,
            writeback,
            descriptors,
        } = *options;
        let open = |source: Errno| FsError::Open {
            folder: PathBuf::from(folder),
            source: source.into(),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, folder, flags, Mode::empty()).map_err(open)?;
        if is_proc(&root).map_err(open)? {
            return Err(FsError::Proc(folder.into()));
        }
        let limits = Limits {
            nodes: MAX_NODES,
            places: (descriptors / 4).clamp(1, MAX_PLACES),
            orphans: (descriptors / 4).max(1),
        };
        let nodes = Nodes::new(Arc::new(root), limits).map_err(open)?;
        let own = user_of_files();
        Ok(Self {
            descriptors: Descriptors::open().map_err(|source| FsError::NoProc(source.into()))?,
            nodes: Mutex::new(nodes),
            handles: Handles::new((descriptors / 2).clamp(1, MOST)),
            syncs: Syncs::default(),
            readonly,
            cache,
            writeback,
            own,
            gives: own.0 == 0,
            session: AtomicU64::new(0),
        })
    }

    /// Forgets the guest.
    pub(super) fn clear(&self) {
        self.agree(0);
        self.handles.clear();
        self.nodes().clear();
    }

    pub(super) fn session(&self) -> u64 {
        self.session.load(Ordering::Relaxed)
    }

    pub(super) fn agree(&self, session: u64) {
        self.session.store(session, Ordering::Relaxed);
    }

    pub(super) fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().expect("a panic ends the process")
    }

    fn place(&self, nodeid: u64) -> Result<Place, Errno> {
        self.nodes().place(nodeid)
    }

    /// Whether a request waits for the host's disk, whatever is in the host's memory.
    pub(super) fn waits(ram: &GuestRam, chain: &Chain) -> bool {
        let mut front = [0; 8];
        if chain.readable.peek(ram, &mut front).is_err() {
            return false;
        }
        let [_, _, _, _, opcode @ ..] = front;
        Op::of(u32::from_le_bytes(opcode)).is_some_and(Op::waits)
    }

    /// Answers one request. Returns how many bytes of the chain were written, and what the request
    /// takes of the share's tokens.
    pub(super) fn answer(
        &self,
        ram: &GuestRam,
        chain: &mut Chain,
        scratch: &mut Scratch,
        counters: &Counters,
    ) -> (u32, Cost) {
        let Chain {
            readable, writable, ..
        } = chain;
        let mut cost = Cost::of_bytes(0);
        let Ok(header) = take::<InHeader>(ram, readable) else {
            counters.bad_chains.increment();
            return (0, cost);
        };
        let op = Op::of(header.opcode);
        let body = (header.len as usize).checked_sub(size_of::<InHeader>());
        let body = body.filter(|body| *body <= readable.len());
        readable.truncate(body.unwrap_or(0));
        if let Some(op @ (Op::Forget | Op::BatchForget | Op::Interrupt)) = op {
            counters.requests.increment();
            // The guest waits for no answer to these, so a mistake is not reported.
            let _ = self.forget(op, header.nodeid, ram, readable, &mut cost);
            return (0, cost);
        }
        let Scratch { text, header: room } = scratch;
        if writable.split_front(size_of::<OutHeader>(), room).is_err() {
            counters.bad_chains.increment();
            return (0, cost);
        }
        let request = Request {
            header,
            ram,
            input: readable,
            output: writable,
            text,
            cost: &mut cost,
        };
        let done = match (op, body) {
            (_, None) => Err(Errno::INVAL),
            (None, _) => Err(Errno::NOSYS),
            (Some(op), _) if self.readonly && op.writes() => Err(Errno::ROFS),
            (Some(op), _) => {
                let done = self.carry_out(op, request, counters);
                if op.writes() {
                    self.syncs.changed();
                }
                done
            }
        };
        let (len, error) = match done {
            Ok(len) => {
                counters.requests.increment();
                (len, 0)
            }
            Err(errno) => {
                // A name that is not there is an answer like any other.
                if errno == Errno::NOENT || errno == Errno::NOSYS {
                    counters.requests.increment();
                } else {
                    counters.errors.increment();
                }
                (0, -errno.raw_os_error())
            }
        };
        let len = u32::try_from(size_of::<OutHeader>() + len).expect("at most MAX_TRANSFER");
        let out = OutHeader {
            len,
            error,
            unique: header.unique,
        };
        match room.write(ram, out.as_bytes()) {
            Ok(()) => (len, cost),
            Err(_) => (0, cost),
        }
    }

    fn carry_out(
        &self,
        op: Op,
        mut request: Request<'_>,
        counters: &Counters,
    ) -> Result<usize, Errno> {
        let request = &mut request;
        match op {
            Op::Init => self.init(request),
            Op::Destroy => {
                self.clear();
                Ok(0)
            }
            Op::Lookup => self.lookup(request),
            Op::GetAttr => self.get_attr(request),
            Op::SetAttr => self.set_attr(request),
            Op::ReadLink => self.read_link(request),
            Op::Symlink => self.symlink(request),
            Op::MkNod => self.mknod(request),
            Op::MkDir => self.mkdir(request),
            Op::Unlink => self.remove(request, rustix::fs::AtFlags::empty()),
            Op::RmDir => self.remove(request, rustix::fs::AtFlags::REMOVEDIR),
            Op::Rename | Op::Rename2 => self.rename(request, op == Op::Rename2),
            Op::Link => self.link(request),
            Op::Open => self.open(request),
            Op::Create => self.create(request),
            Op::TmpFile => self.tmpfile(request),
            Op::Read => self.read(request, counters),
            Op::Write => self.write(request, counters),
            Op::StatFs => self.statfs(request),
            Op::Release | Op::ReleaseDir => self.release(request),
            Op::FSync | Op::FSyncDir => self.fsync(request),
            Op::SyncFs => self.syncfs(request),
            Op::SetXattr => self.set_xattr(request),
            Op::GetXattr => self.get_xattr(request),
            Op::ListXattr => self.list_xattr(request),
            Op::RemoveXattr => self.remove_xattr(request),
            Op::OpenDir => self.open_dir(request),
            Op::ReadDir => self.read_dir(request, false),
            Op::ReadDirPlus => self.read_dir(request, true),
            Op::FAllocate => self.fallocate(request),
            Op::LSeek => self.lseek(request),
            Op::CopyFileRange => self.copy_file_range(request),
            Op::Forget | Op::BatchForget | Op::Interrupt => Ok(0),
        }
    }

    fn init(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: InitIn = request.take()?;
        if asked.major < abi::MAJOR {
            return Err(Errno::PROTO);
        }
        let mut answer = InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            ..InitOut::default()
        };
        if asked.major > abi::MAJOR {
            // It asks again, for what we have.
            return request.put(&answer);
        }
        if asked.minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let mut offered: u64 = asked.flags.into();
        if offered & init::EXT != 0 {
            let more: InitInExt = request.take()?;
            offered |= u64::from(more.flags2) << 32;
        }
        // A guest that begins anew knows nothing of what was.
        self.clear();
        let agreed = offered & self.wanted();
        self.agree(agreed);
        let [low, high] = [agreed & u64::from(u32::MAX), agreed >> 32];
        answer.max_readahead = asked.max_readahead;
        answer.flags = u32::try_from(low).expect("masked");
        answer.flags2 = u32::try_from(high).expect("shifted");
        answer.max_background = MAX_BACKGROUND;
        answer.congestion_threshold = MAX_BACKGROUND / 4 * 3;
        answer.max_write = MAX_TRANSFER;
        answer.max_pages = MAX_PAGES;
        answer.time_gran = 1;
        request.put(&answer)
    }

    pub(super) fn wanted(&self) -> u64 {
        // ASYNC_DIO: direct requests of one program do not wait for one another. Unlike those that read
        // ahead (below) they hold the program's open file, and with it its file system, until they are
        // complete, and the file is then released by a request that is waited for
        // (fuse_aio_complete and fuse_file_release of Linux 6.12, fs/fuse/file.c).
        let always = init::ATOMIC_O_TRUNC
            | init::ASYNC_DIO
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::SUBMOUNTS
            | init::HANDLE_KILLPRIV_V2
            | init::POSIX_ACL
            | init::DONT_MASK
            | init::SETXATTR_EXT
            | init::EXT
            | init::DIRECT_IO_ALLOW_MMAP;
        let cache = match self.cache {
            Cache::None => 0,
            Cache::Auto => init::AUTO_INVAL_DATA,
            // Only here, where no mount below the share goes away: a file whose process ends while it is
            // read ahead is let go of by a request of Linux's own, which holds its inode and not its
            // file system. That of a container's mount goes with the container, and the guest's kernel
            // oopses (seen with 6.12).
            Cache::Always => init::CACHE_SYMLINKS | init::ASYNC_READ,
        };
        let writeback = if self.writeback {
            init::WRITEBACK_CACHE
        } else {
            0
        };
        always | cache | writeback
    }

    /// Makes a file. Where its folder has an access control list for new files, that decides their
    /// mode, and a program's umask does not. The host's kernel knows which; a guest that keeps such
    /// lists leaves it to the server (`DONT_MASK`).
    fn masked<T>(&self, umask: u32, make: impl FnOnce() -> T) -> T {
        if umask == 0 || !self.agreed(init::DONT_MASK) {
            return make();
        }
        // The thread's own: see keep_permissions.
        rustix::process::umask(permissions(umask));
        let made = make();
        rustix::process::umask(Mode::empty());
        made
    }

    fn agreed(&self, feature: u64) -> bool {
        self.session() & feature != 0
    }

    fn forget(
        &self,
        op: Op,
        nodeid: u64,
        ram: &GuestRam,
        input: &mut Segments,
        cost: &mut Cost,
    ) -> Result<(), Errno> {
        match op {
            Op::Forget => {
                let ForgetIn { lookups } = take(ram, input)?;
                self.nodes().forget(nodeid, lookups);
            }
            Op::BatchForget => {
                let BatchForgetIn { count, .. } = take(ram, input)?;
                let mut nodes = self.nodes();
                for _ in 0..count.min(MAX_FORGETS) {
                    // Each file is as much work as one FORGET.
                    cost.requests += 1;
                    let ForgetOne { nodeid, lookups } = take(ram, input)?;
                    nodes.forget(nodeid, lookups);
                }
            }
            // Requests that wait for others do not exist, so there is nothing to interrupt.
            _ => {}
        }
        Ok(())
    }

    /// Opens the file or folder `nodeid` as `flags` say.
    pub(super) fn open_node(&self, nodeid: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        let place = self.place(nodeid)?;
        self.descriptors.open_again(&place.fd, flags)
    }
}

/// Whether `file` is of a proc file system, whose files are not data but the host itself.
fn is_proc(file: &OwnedFd) -> Result<bool, Errno> {
    const PROC_SUPER_MAGIC: u64 = 0x9fa0;
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok(u64::try_from(kind) == Ok(PROC_SUPER_MAGIC))
}
