//! Requests about what is in a file.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Cache, MAX_TRANSFER, Request, Server};
use crate::virtio::fs::abi::{
    Attr, CopyFileRangeIn, FAllocateIn, FSYNC_FDATASYNC, FSyncIn, LSeekIn, LSeekOut,
    OPEN_KILL_SUIDGID, OpenIn, OpenOut, ReleaseIn, TransferIn, WRITE_CACHE, WRITE_KILL_SUIDGID,
    WriteOut, fopen, init,
};
use crate::virtio::fs::handles::Handle;
use crate::virtio::fs::host;
use crate::virtio::fs::nodes::Version;
use crate::virtio::{Counters, vectored};

/// Most bytes that are copied within the host at once: the thread is needed elsewhere.
const MAX_COPY: u64 = 64 << 20;
/// Bytes that are allocated, zeroed or punched out at once.
const ALLOCATION_PIECE: u64 = 1 << 30;
/// How long one request may allocate: less than a pause of the VM waits for it.
const MAX_ALLOCATION: Duration = Duration::from_secs(2);

/// Seconds after which a file that changes again has another ctime: file systems count them in steps of up
/// to 2 s (FAT).
const SETTLED: u64 = 3;

impl Server {
    pub(super) fn open(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: OpenIn = request.take()?;
        let nodeid = request.header.nodeid;
        let flags = self.open_flags(asked.flags)?;
        if self.place(nodeid)?.kind() == libc::S_IFDIR {
            return Err(Errno::ISDIR);
        }
        let file = self.open_for(nodeid, flags, asked.open_flags)?;
        let open = self.keep_open(file, nodeid, flags)?;
        request.put(&open)
    }

    /// Gives an open file a number, and says what the guest may do with the content.
    pub(super) fn keep_open(
        &self,
        file: OwnedFd,
        nodeid: u64,
        flags: OFlags,
    ) -> Result<OpenOut, Errno> {
        let is_folder = flags.contains(OFlags::DIRECTORY);
        let version = match (self.cache, is_folder) {
            (Cache::Auto, false) => version(&file)?,
            _ => None,
        };
        let fh = self.handles.insert(Handle::new(file, nodeid, flags))?;
        let open_flags = match (self.cache, is_folder) {
            (Cache::None, _) => fopen::DIRECT_IO,
            // Programs and libraries, mostly: what is cached of them is good.
            (Cache::Auto, false) if self.nodes().opened(nodeid, version) => fopen::KEEP_CACHE,
            (Cache::Auto, _) => 0,
            (Cache::Always, false) => fopen::KEEP_CACHE,
            (Cache::Always, true) => fopen::KEEP_CACHE | fopen::CACHE_DIR,
        };
        Ok(OpenOut {
            fh,
            open_flags,
            padding: 0,
        })
    }

    /// Opens a file that may lose privileges by being truncated.
    pub(super) fn open_for(
        &self,
        nodeid: u64,
        flags: OFlags,
        open_flags: u32,
    ) -> Result<OwnedFd, Errno> {
        let file = self.open_node(nodeid, flags)?;
        if flags.contains(OFlags::TRUNC) {
            self.syncs.changed();
        }
        if open_flags & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.kill_privileges(&file)?;
        }
        Ok(file)
    }

    /// What of the guest's flags the host is to honour. Appending is done write by write: the
    /// guest's cache is written where it belongs whatever the flags.
    pub(in super::super) fn open_flags(&self, asked: u32) -> Result<OFlags, Errno> {
        let asked = OFlags::from_bits_retain(asked);
        let honoured = OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
        let mut flags = asked & honoured;
        if flags.contains(OFlags::RWMODE) {
            return Err(Errno::INVAL);
        }
        let writes = flags.intersects(OFlags::RWMODE | OFlags::TRUNC);
        if writes && self.readonly {
            return Err(Errno::ROFS);
        }
        if self.agreed(init::WRITEBACK_CACHE) && flags & OFlags::RWMODE == OFlags::WRONLY {
            // The guest reads what it writes only in part.
            flags = flags & !OFlags::RWMODE | OFlags::RDWR;
        }
        Ok(flags)
    }

    pub(super) fn read(
        &self,
        request: &mut Request<'_>,
        counters: &Counters,
    ) -> Result<usize, Errno> {
        let asked: TransferIn = request.take()?;
        let open = self.handles.get(asked.fh)?;
        let len = asked.size.min(MAX_TRANSFER) as usize;
        let len = len.min(request.output.len());
        let read = vectored::read_at(&open.file, request.ram, request.output, len, asked.offset);
        let read = read.map_err(errno)?;
        counters.bytes_in.add(read as u64);
        request.cost.bytes = read as u64;
        Ok(read)
    }

    pub(super) fn write(
        &self,
        request: &mut Request<'_>,
        counters: &Counters,
    ) -> Result<usize, Errno> {
        let asked: TransferIn = request.take()?;
        let open = self.handles.get(asked.fh)?;
        let len = asked.size.min(MAX_TRANSFER) as usize;
        if len > request.input.len() {
            return Err(Errno::INVAL);
        }
        let cached = asked.transfer_flags & WRITE_CACHE != 0;
        let appends = OFlags::from_bits_retain(asked.flags).contains(OFlags::APPEND) && !cached;
        if asked.transfer_flags & WRITE_KILL_SUIDGID != 0 {
            // This comes first, as in Linux: no process may run the new content with the file's old
            // privileges.
            self.kill_privileges(&open.file)?;
        }
        let (ram, input) = (request.ram, &mut *request.input);
        let written = if appends {
            vectored::append(&open.file, ram, input, len)
        } else {
            vectored::write_at(&open.file, ram, input, len, asked.offset)
        };
        let written = written.map_err(errno)?;
        counters.bytes_out.add(written as u64);
        request.cost.bytes = written as u64;
        let size = u32::try_from(written).expect("at most MAX_TRANSFER");
        request.put(&WriteOut { size, padding: 0 })
    }

    pub(super) fn release(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: ReleaseIn = request.take()?;
        self.handles.remove(asked.fh)?;
        Ok(0)
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: FSyncIn = request.take()?;
        let open = self.handles.get(asked.fh)?;
        if asked.flags & FSYNC_FDATASYNC == 0 {
            rustix::fs::fsync(&open.file)?;
        } else {
            rustix::fs::fdatasync(&open.file)?;
        }
        Ok(0)
    }

    pub(super) fn syncfs(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let place = self.place(request.header.nodeid)?;
        let sync = || {
            let file = self.descriptors.open_again(&place.fd, OFlags::RDONLY)?;
            rustix::fs::syncfs(&file)
        };
        self.syncs.sync(place.identity.device, sync)?;
        Ok(0)
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: FAllocateIn = request.take()?;
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits_retain(asked.mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let open = self.handles.get(asked.fh)?;
        let deadline = Instant::now() + MAX_ALLOCATION;
        allocate(&open.file, mode, asked.offset, asked.length, deadline)?;
        Ok(0)
    }

    pub(super) fn lseek(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: LSeekIn = request.take()?;
        let to = match asked.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(asked.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(asked.offset),
            _ => return Err(Errno::INVAL),
        };
        let open = self.handles.get(asked.fh)?;
        let offset = rustix::fs::seek(&open.file, to)?;
        request.put(&LSeekOut { offset })
    }

    pub(super) fn copy_file_range(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let asked: CopyFileRangeIn = request.take()?;
        let from = self.handles.get(asked.fh_in)?;
        let to = self.handles.get(asked.fh_out)?;
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let (mut off_in, mut off_out) = (asked.off_in, asked.off_out);
        let len = usize::try_from(asked.len.min(MAX_COPY)).expect("at most MAX_COPY");
        let copied = rustix::fs::copy_file_range(
            &from.file,
            Some(&mut off_in),
            &to.file,
            Some(&mut off_out),
            len,
        )?;
        // The host reads it and writes it.
        request.cost.bytes = 2 * copied as u64;
        let size = u32::try_from(copied).expect("at most MAX_COPY");
        request.put(&WriteOut { size, padding: 0 })
    }
}

/// Does to a range what fallocate(2) does, in pieces. At the deadline what is left is not done, and the
/// guest's program is told that a signal came, after which it may try again.
fn allocate(
    file: &OwnedFd,
    mode: FallocateFlags,
    offset: u64,
    length: u64,
    deadline: Instant,
) -> Result<(), Errno> {
    let end = offset.checked_add(length).ok_or(Errno::FBIG)?;
    let last = offset.max(end.saturating_sub(1) / ALLOCATION_PIECE * ALLOCATION_PIECE);
    let (mut done, in_place) = (offset, mode | FallocateFlags::KEEP_SIZE);
    if last > offset {
        // First the last piece: what is too large for the file system is refused before anything is
        // allocated.
        rustix::fs::fallocate(file, in_place, last, end - last)?;
    }
    while done < last {
        let next = (done / ALLOCATION_PIECE + 1) * ALLOCATION_PIECE;
        rustix::fs::fallocate(file, in_place, done, next.min(last) - done)?;
        done = next.min(last);
        if Instant::now() >= deadline {
            return Err(Errno::INTR);
        }
    }
    // Once more where it is the end that may change the size.
    if last == offset || in_place != mode {
        rustix::fs::fallocate(file, mode, last, end - last)?;
    }
    Ok(())
}

/// Which version of its content a file has, if a change of it would have another.
fn version(file: &OwnedFd) -> Result<Option<Version>, Errno> {
    let Attr {
        ctime, ctimensec, ..
    } = host::status(file)?.attr;
    // By the C library's clock: rustix would first ask the kernel where its own is, which a thread that
    // serves files may not.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let is_settled = now.is_ok_and(|now| now.as_secs() >= ctime.saturating_add(SETTLED));
    Ok(is_settled.then_some((ctime, ctimensec)))
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

    /// A file that takes no room, and has a byte at each offset.
    fn file(len: u64, bytes: &[u64]) -> OwnedFd {
        let file: File = TempFile::new().unwrap().into_file();
        file.set_len(len).unwrap();
        for offset in bytes {
            rustix::io::pwrite(&file, b"x", *offset).unwrap();
        }
        file.into()
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    #[test]
    fn a_range_of_many_pieces_is_done_up_to_its_ends() {
        let ends = [0, 100 << 20, (3 << 30) + 1, 5 << 30];
        let file = file(6 << 30, &ends);
        let (start, end) = (4096, 5 << 30);
        allocate(&file, HOLE, start, end - start, later()).unwrap();
        let byte = |offset| {
            let mut byte = [0];
            rustix::io::pread(&file, &mut byte, offset).unwrap();
            byte[0]
        };
        assert_eq!(ends.map(byte), [b'x', 0, 0, b'x']);
    }

    #[test]
    fn the_size_is_that_of_the_whole_range_or_kept() {
        let file = file(0, &[]);
        let len = (1 << 20) + 5;
        allocate(&file, FallocateFlags::KEEP_SIZE, 0, len, later()).unwrap();
        let size = || {
            File::from(file.try_clone().unwrap())
                .metadata()
                .unwrap()
                .size()
        };
        assert_eq!(size(), 0);
        allocate(&file, FallocateFlags::empty(), 0, len, later()).unwrap();
        assert_eq!(size(), len);
    }

    #[test]
    fn a_deadline_ends_it_between_two_pieces() {
        let file = file(4 << 30, &[0, 3 << 30]);
        let late = allocate(&file, HOLE, 0, 4 << 30, Instant::now());
        assert_eq!(late, Err(Errno::INTR));
        allocate(&file, HOLE, 0, 1 << 30, Instant::now()).unwrap();
    }

    #[test]
    fn ranges_that_no_file_has_are_refused_at_once() {
        let file = file(0, &[]);
        for (offset, length) in [
            (0, 0),
            (1 << 63, 1),
            (0, u64::MAX),
            (u64::MAX, 2),
            (0, i64::MAX.cast_unsigned()),
        ] {
            allocate(&file, FallocateFlags::empty(), offset, length, later()).unwrap_err();
        }
        let blocks = File::from(file).metadata().unwrap().blocks();
        assert_eq!(blocks, 0, "nothing was allocated");
    }
}
