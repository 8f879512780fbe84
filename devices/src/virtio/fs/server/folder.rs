//! Requests that list folders.

use std::mem::MaybeUninit;

use rustix::fs::{OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::{MAX_TRANSFER, Request, Server};
use crate::virtio::fs::abi::{Dirent, EntryOut, TransferIn};

/// Bytes of names read from the host at once.
const BATCH: usize = 8 << 10;

impl Server {
    pub(super) fn open_dir(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let nodeid = request.header.nodeid;
        let place = self.folder(nodeid)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.descriptors.open_again(&place.fd, flags)?;
        let open = self.keep_open(file, nodeid, flags)?;
        request.put(&open)
    }

    /// Lists from the offset on as much as there is room for; with `plus` the guest is told of each
    /// file, as by a lookup.
    pub(super) fn read_dir(&self, request: &mut Request<'_>, plus: bool) -> Result<usize, Errno> {
        let asked: TransferIn = request.take()?;
        let open = self.handles.get(asked.fh)?;
        let folder = match plus {
            true => Some(self.folder(open.nodeid)?),
            false => None,
        };
        let size = asked.size.min(MAX_TRANSFER) as usize;
        let room = request.output.len().min(size);
        let _reading = open.reading.lock().expect("a panic ends the process");
        rustix::fs::seek(&open.file, SeekFrom::Start(asked.offset))?;
        let mut batch = [MaybeUninit::uninit(); BATCH];
        let mut entries = RawDir::new(&open.file, &mut batch);
        let mut written = 0;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let bytes = name.to_bytes();
            let head = match plus {
                true => size_of::<EntryOut>() + size_of::<Dirent>(),
                false => size_of::<Dirent>(),
            };
            let len = (head + bytes.len()).next_multiple_of(8);
            if written + len > room {
                break;
            }
            if let Some(folder) = &folder {
                let told = if matches!(bytes, b"." | b"..") {
                    Ok(EntryOut::default())
                } else {
                    self.enter(open.nodeid, folder, name)
                };
                // A file that went, or that cannot be told of, is listed by name alone.
                request.put(&told.unwrap_or_default())?;
            }
            let dirent = Dirent {
                ino: entry.ino(),
                off: entry.next_entry_cookie(),
                namelen: u32::try_from(bytes.len()).expect("a name"),
                kind: entry.file_type().as_raw_mode() >> 12,
            };
            request.put_bytes(dirent.as_bytes())?;
            request.put_bytes(bytes)?;
            request.put_bytes(&[0; 8][..len - head - bytes.len()])?;
            written += len;
        }
        Ok(written)
    }
}
