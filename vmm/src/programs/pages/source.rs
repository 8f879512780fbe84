//! Where the pages of a snapshot are.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::compressed::Compressed;
use crate::memory::within;
use crate::snapshot::{self, MemoryFile, RestoreError, unusable};

/// A snapshot's RAM.
#[derive(Debug)]
pub(super) struct Source {
    len: u64,
    /// The files of RAM: each lies over those before it.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    /// Which ranges of RAM the file is.
    ranges: Vec<Range<u64>>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Plain(File),
    Compressed(Compressed),
}

impl Source {
    /// Opens the RAM of the snapshot in `folder`, from compressed files where there are some.
    pub(super) fn open(folder: &Path) -> Result<Self, RestoreError> {
        let (len, files) = snapshot::memory_files(folder)?;
        let open = |file: MemoryFile| {
            let bytes = match file.open_compressed()? {
                None => Bytes::Plain(file.open()?),
                Some((path, compressed)) => {
                    let opened = Compressed::open(compressed, len);
                    Bytes::Compressed(opened.map_err(|error| unusable(&path, error))?)
                }
            };
            let ranges = file.ranges;
            Ok(Layer { ranges, bytes })
        };
        let layers = files.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { len, layers })
    }

    /// A source of one file.
    #[cfg(test)]
    pub(super) fn of(len: u64, ranges: Vec<Range<u64>>, file: File) -> Self {
        let bytes = Bytes::Plain(file);
        Self {
            len,
            layers: vec![Layer { ranges, bytes }],
        }
    }

    /// Bytes of RAM.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Reads RAM from `offset` on.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        let wanted = offset..offset + bytes.len() as u64;
        for layer in &self.layers {
            for run in within(std::slice::from_ref(&wanted), &layer.ranges) {
                let part = |at: u64| usize::try_from(at - offset).expect("it is within `bytes`");
                let part = &mut bytes[part(run.start)..part(run.end)];
                match &layer.bytes {
                    Bytes::Plain(file) => file.read_exact_at(part, run.start)?,
                    Bytes::Compressed(file) => file.read(run.start, part)?,
                }
            }
        }
        Ok(())
    }
}
