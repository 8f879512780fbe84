//! A file of RAM, compressed: LZ4 blocks, and where each is.
//!
//! ```text
//! blocks    one after the other, each a chunk of RAM; one that LZ4 cannot shorten is there as it is
//! entries   for each block: number of its chunk (8 bytes), offset (8), length (4), CRC-32 of the chunk (4)
//! trailer   length of RAM (8), number of entries (8), CRC-32 of the entries (4), version (4), magic (8)
//! ```
//!
//! Numbers have their lowest byte first. What of RAM has no block is zero.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use thiserror::Error;

/// RAM is compressed, and given, by so many bytes: a fault costs far more than the pages around it,
/// of which the guest is likely to need some.
pub(super) const CHUNK: usize = 64 << 10;
pub(super) const CHUNK_BYTES: u64 = CHUNK as u64;

const MAGIC: [u8; 8] = *b"podvmmZ\n";
const VERSION: u32 = 1;
const ENTRY: usize = 24;
const TRAILER: usize = 32;

/// Why a file is no compressed RAM.
#[derive(Debug, Error)]
pub(super) enum CompressedError {
    #[error("read it")]
    Read(#[from] io::Error),
    #[error("it is truncated, or no compressed RAM of podvmm's")]
    Magic,
    #[error("its format is version {0}, this podvmm reads {VERSION}")]
    Version(u32),
    #[error("it is of {found} bytes of RAM, its snapshot of {expected}")]
    OtherRam { expected: u64, found: u64 },
    #[error("it is damaged: the checksum of its index is another")]
    Checksum,
    #[error("its index makes no sense")]
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    chunk: u64,
    offset: u64,
    len: u32,
    /// CRC-32 (IEEE) of the chunk.
    crc32: u32,
}

impl Entry {
    fn of(bytes: &[u8; ENTRY]) -> Self {
        Self {
            chunk: u64::from_le_bytes(part(bytes, 0)),
            offset: u64::from_le_bytes(part(bytes, 8)),
            len: u32::from_le_bytes(part(bytes, 16)),
            crc32: u32::from_le_bytes(part(bytes, 20)),
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.chunk.to_le_bytes());
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.crc32.to_le_bytes());
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("it is as long")
}

/// A file that can be read.
#[derive(Debug)]
pub(super) struct Compressed {
    file: File,
    /// The entries of the chunks that the file has, by chunk.
    entries: Vec<Entry>,
}

impl Compressed {
    /// Opens one of RAM of `ram_len` bytes. Looks at no block.
    pub(super) fn open(file: File, ram_len: u64) -> Result<Self, CompressedError> {
        let len = file.metadata()?.len();
        let trailer_at = len.checked_sub(TRAILER as u64);
        let trailer_at = trailer_at.ok_or(CompressedError::Magic)?;
        let mut trailer = [0; TRAILER];
        file.read_exact_at(&mut trailer, trailer_at)?;
        if part(&trailer, 24) != MAGIC {
            return Err(CompressedError::Magic);
        }
        match u32::from_le_bytes(part(&trailer, 20)) {
            VERSION => {}
            other => return Err(CompressedError::Version(other)),
        }
        let found = u64::from_le_bytes(part(&trailer, 0));
        if found != ram_len {
            let expected = ram_len;
            return Err(CompressedError::OtherRam { expected, found });
        }
        let count = u64::from_le_bytes(part(&trailer, 8));
        let index_len = count.checked_mul(ENTRY as u64);
        let index_at = index_len.and_then(|len| trailer_at.checked_sub(len));
        let index_at = index_at.ok_or(CompressedError::Index)?;
        let index_len = usize::try_from(trailer_at - index_at);
        let mut index = vec![0; index_len.map_err(|_| CompressedError::Index)?];
        file.read_exact_at(&mut index, index_at)?;
        if crc32fast::hash(&index) != u32::from_le_bytes(part(&trailer, 16)) {
            return Err(CompressedError::Checksum);
        }
        let entries: Vec<_> = index.as_chunks().0.iter().map(Entry::of).collect();
        let fits = |entry: &Entry| {
            let end = entry.offset.checked_add(entry.len.into());
            entry.chunk < ram_len.div_ceil(CHUNK_BYTES)
                && (1..=CHUNK_BYTES).contains(&entry.len.into())
                && end.is_some_and(|end| end <= index_at)
        };
        let in_order = entries.is_sorted_by(|entry, next| entry.chunk < next.chunk);
        match in_order && entries.iter().all(fits) {
            true => Ok(Self { file, entries }),
            false => Err(CompressedError::Index),
        }
    }

    /// Reads RAM from `offset` on.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let mut chunk = [0; CHUNK];
        for number in offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
            self.chunk(number, &mut chunk)?;
            let start = number * CHUNK_BYTES;
            let run = offset.max(start)..end.min(start + CHUNK_BYTES);
            bytes[within(&run, offset)].copy_from_slice(&chunk[within(&run, start)]);
        }
        Ok(())
    }

    fn chunk(&self, number: u64, chunk: &mut [u8; CHUNK]) -> io::Result<()> {
        let found = self
            .entries
            .binary_search_by_key(&number, |entry| entry.chunk);
        let Ok(index) = found else {
            chunk.fill(0);
            return Ok(());
        };
        let entry = self.entries[index];
        let mut block = [0; CHUNK];
        let len = usize::try_from(entry.len).map_err(io::Error::other)?;
        let block = &mut block[..len];
        self.file.read_exact_at(block, entry.offset)?;
        let whole = match len {
            CHUNK => {
                chunk.copy_from_slice(block);
                true
            }
            _ => decompress_into(block, chunk).is_ok_and(|len| len == CHUNK),
        };
        match whole && crc32fast::hash(chunk) == entry.crc32 {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the compressed block is damaged",
            )),
        }
    }
}

/// Where bytes are among those from `start` on, all of which are in memory.
fn within(run: &Range<u64>, start: u64) -> Range<usize> {
    let index = |at: u64| usize::try_from(at - start).expect("it is in memory");
    index(run.start)..index(run.end)
}

/// Compresses `ranges` of `plain`, a file of RAM of `ram_len` bytes, into one at `path`, which is there
/// when all of it is. Returns its length.
pub(super) fn compress(
    plain: &File,
    ranges: &[Range<u64>],
    ram_len: u64,
    path: &Path,
) -> io::Result<u64> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let draft = path.with_file_name(format!(".{}", name.display()));
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(&draft)?;
    let written = write(plain, ranges, ram_len, &file)
        .and_then(|len| file.sync_all().map(|()| len))
        .and_then(|len| fs::rename(&draft, path).map(|()| len));
    if written.is_err() {
        // An incomplete file is of no use.
        let _ = fs::remove_file(&draft);
    }
    written
}

fn write(plain: &File, ranges: &[Range<u64>], ram_len: u64, file: &File) -> io::Result<u64> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut block = vec![0; get_maximum_output_size(CHUNK)];
    let (mut offset, mut entries) = (0, Vec::new());
    for number in chunks(ranges) {
        let chunk = read(plain, ranges, number)?;
        if chunk.iter().all(|byte| *byte == 0) {
            continue;
        }
        let len = compress_into(&chunk, &mut block).map_err(io::Error::other)?;
        let block = if len < CHUNK { &block[..len] } else { &chunk };
        out.write_all(block)?;
        entries.push(Entry {
            chunk: number,
            offset,
            len: u32::try_from(block.len()).expect("it is a chunk at most"),
            crc32: crc32fast::hash(&chunk),
        });
        offset += block.len() as u64;
    }
    let index = index(&entries, ram_len);
    out.write_all(&index)?;
    out.flush()?;
    Ok(offset + index.len() as u64)
}

/// Entries and trailer.
fn index(entries: &[Entry], ram_len: u64) -> Vec<u8> {
    let mut index = Vec::with_capacity(entries.len() * ENTRY + TRAILER);
    entries.iter().for_each(|entry| entry.write(&mut index));
    let crc32 = crc32fast::hash(&index);
    index.extend_from_slice(&ram_len.to_le_bytes());
    index.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    index.extend_from_slice(&crc32.to_le_bytes());
    index.extend_from_slice(&VERSION.to_le_bytes());
    index.extend_from_slice(&MAGIC);
    index
}

/// The chunks that `ranges` touch, in order.
fn chunks(ranges: &[Range<u64>]) -> impl Iterator<Item = u64> {
    let mut next = 0;
    ranges.iter().flat_map(move |range| {
        let first = (range.start / CHUNK_BYTES).max(next);
        next = range.end.div_ceil(CHUNK_BYTES);
        first..next
    })
}

/// A chunk of a file, and zeros where it is not of `ranges`.
fn read(plain: &File, ranges: &[Range<u64>], number: u64) -> io::Result<[u8; CHUNK]> {
    let start = number * CHUNK_BYTES;
    let mut chunk = [0; CHUNK];
    let all = start..start + CHUNK_BYTES;
    for run in crate::memory::within(std::slice::from_ref(&all), ranges) {
        plain.read_exact_at(&mut chunk[within(&run, start)], run.start)?;
    }
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAM: u64 = 32 * CHUNK_BYTES;

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn written(plain: &File, ranges: &[Range<u64>]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let len = write(plain, ranges, RAM, &file).unwrap();
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len);
        bytes
    }

    /// RAM, chunk by chunk of each kind: bytes that repeat, that do not, and zeros; and what of it
    /// counts.
    fn some_ram() -> (Vec<u8>, Vec<Range<u64>>) {
        let mut state = 1_u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let ram = (0..RAM).map(|at| match at / CHUNK_BYTES % 3 {
            0 => 7,
            1 => noise(),
            _ => 0,
        });
        (
            ram.collect(),
            vec![0..5 * CHUNK_BYTES, 6 * CHUNK_BYTES + 4096..RAM],
        )
    }

    #[test]
    fn what_was_compressed_is_there_again() {
        let (mut ram, ranges) = some_ram();
        let bytes = written(&file(&ram), &ranges);
        let read = Compressed::open(file(&bytes), RAM).unwrap();
        let hole = 5 * CHUNK..6 * CHUNK + 4096;
        ram[hole].fill(0);
        let mut found = vec![1; ram.len()];
        read.read(0, &mut found).unwrap();
        assert!(found == ram);
        // Zeros take no room, and neither does what repeats.
        let (noise, len) = (11 * CHUNK, bytes.len());
        assert!((noise..noise + 4096).contains(&len), "{len}");
        // Any part of it.
        let mut page = [1; 4096];
        read.read(CHUNK_BYTES - 4096, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn what_is_no_compressed_ram_is_refused() {
        let (ram, ranges) = some_ram();
        let good = written(&file(&ram), &ranges);
        let refusal = |spoil: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            spoil(&mut bytes);
            Compressed::open(file(&bytes), RAM).unwrap_err().to_string()
        };
        let truncated = "it is truncated, or no compressed RAM of podvmm's";
        let at = good.len() - TRAILER;
        assert_eq!(refusal(&|it| it.truncate(at)), truncated);
        assert_eq!(refusal(&|it| it.truncate(3)), truncated);
        assert_eq!(
            refusal(&|it| it[at + 20] = 9),
            "its format is version 9, this podvmm reads 1"
        );
        assert_eq!(
            refusal(&|it| it[at] = 1),
            "it is of 2097153 bytes of RAM, its snapshot of 2097152"
        );
        assert_eq!(refusal(&|it| it[at + 15] = 1), "its index makes no sense");
        let checksum = "it is damaged: the checksum of its index is another";
        assert_eq!(refusal(&|it| it[at - 1] ^= 1), checksum);
        assert_eq!(refusal(&|it| it[at + 8] -= 1), checksum);
    }

    /// A file of so many bytes of blocks.
    fn indexed(blocks: usize, entries: &[(u64, u64, u32)]) -> File {
        let entry = |(chunk, offset, len): &(u64, u64, u32)| Entry {
            chunk: *chunk,
            offset: *offset,
            len: *len,
            crc32: 0,
        };
        let entries: Vec<_> = entries.iter().map(entry).collect();
        let mut bytes = vec![1; blocks];
        bytes.extend_from_slice(&index(&entries, RAM));
        file(&bytes)
    }

    #[test]
    fn an_index_that_makes_no_sense_is_refused() {
        assert!(Compressed::open(indexed(90, &[(1, 0, 50), (31, 50, 40)]), RAM).is_ok());
        let bad = [
            &[(32, 0, 50)][..],
            &[(1, 0, 0)],
            &[(1, 0, 91)],
            &[(1, 90, 1)],
            &[(1, u64::MAX, 1)],
            &[(2, 0, 1), (1, 1, 1)],
            &[(1, 0, 1), (1, 1, 1)],
        ];
        for entries in bad {
            let why = Compressed::open(indexed(90, entries), RAM).unwrap_err();
            assert_eq!(why.to_string(), "its index makes no sense", "{entries:?}");
        }
        let long = [(1, 0, 0x1_0001)];
        assert!(Compressed::open(indexed(0x2_0000, &long), RAM).is_err());
    }

    #[test]
    fn a_block_that_is_damaged_is_not_given() {
        let (ram, ranges) = some_ram();
        let mut bytes = written(&file(&ram), &ranges);
        let read = |bytes: &[u8], chunk| {
            let file = Compressed::open(file(bytes), RAM).unwrap();
            file.read(chunk * CHUNK_BYTES, &mut [0; 4096])
        };
        // In one that was shortened, and in one that was not.
        for (at, chunk) in [(3, 0), (1000, 1)] {
            read(&bytes, chunk).unwrap();
            bytes[at] ^= 1;
            let why = read(&bytes, chunk).unwrap_err();
            assert_eq!(why.to_string(), "the compressed block is damaged");
        }
        read(&bytes, 3).unwrap();
    }

    proptest! {
        /// An index that says anything, under a checksum that is right.
        #[test]
        fn any_index_is_survived(
            entries in proptest::collection::vec((0..40_u64, 0..400_u64, 0..300_u32), 0..6),
        ) {
            if let Ok(read) = Compressed::open(indexed(300, &entries), RAM) {
                let mut ram = vec![0; usize::try_from(RAM).unwrap()];
                // No damaged block passes.
                prop_assert_eq!(read.read(0, &mut ram).is_ok(), entries.is_empty());
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            prop_assert!(Compressed::open(file(&bytes), RAM).is_err());
        }

        #[test]
        fn each_chunk_comes_once(
            runs in proptest::collection::vec((0..40_u64, 1..40_u64), 0..8),
        ) {
            let mut end = 0;
            let ranges: Vec<_> = runs.iter().map(|(gap, len)| {
                let start = end + (gap << 12);
                end = start + (len << 12);
                start..end
            }).collect();
            let found: Vec<_> = chunks(&ranges).collect();
            let touched = |chunk: &u64| {
                let all = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
                ranges.iter().any(|range| range.start < all.end && all.start < range.end)
            };
            let expected: Vec<_> = (0..60).filter(touched).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
