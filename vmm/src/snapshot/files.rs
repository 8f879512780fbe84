//! A snapshot's files as they are read: regular ones, of a size that can be believed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Longest state that is read, in bytes: far more than the largest VM's.
const MOST_STATE_BYTES: u64 = 256 << 20;

/// Reads all of a file.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_rest(open(path)?)
}

/// Reads all that is left of a file.
pub(super) fn read_rest(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MOST_STATE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a regular file. A file of another kind might make its reader wait.
pub(super) fn open(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    File::open(path)
}
