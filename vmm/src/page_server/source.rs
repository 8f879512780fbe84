//! Where the pages of a snapshot are.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::memory::within;
use crate::snapshot::{self, RestoreError};

/// A snapshot's RAM.
#[derive(Debug)]
pub(super) struct Source {
    len: u64,
    /// Each lies over those before it.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    /// What of RAM it is.
    ranges: Vec<Range<u64>>,
    file: Arc<File>,
}

impl Source {
    pub(super) fn open(folder: &Path) -> Result<Self, RestoreError> {
        let (len, layers) = snapshot::layers(folder)?;
        let layers = layers.into_iter().map(|layer| Layer {
            ranges: layer.ranges(),
            file: layer.file,
        });
        Ok(Self {
            len,
            layers: layers.collect(),
        })
    }

    /// One of one file.
    #[cfg(test)]
    pub(super) fn of(len: u64, ranges: Vec<Range<u64>>, file: File) -> Self {
        let file = Arc::new(file);
        Self {
            len,
            layers: vec![Layer { ranges, file }],
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
                layer.file.read_exact_at(part, run.start)?;
            }
        }
        Ok(())
    }
}
