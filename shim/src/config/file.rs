//! Files of the administrator's, in TOML.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Longest file, in bytes.
const MAX_LEN: u64 = 64 << 10;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}", .path.display())]
    Parse {
        path: PathBuf,
        source: toml::de::Error,
    },
    #[error("{}: {what}", .path.display())]
    Unfit { path: PathBuf, what: String },
}

/// For what is wrong with the file at `path` though it is TOML.
pub(super) fn unfit(path: &Path) -> impl Fn(String) -> FileError {
    move |what| FileError::Unfit {
        path: path.into(),
        what,
    }
}

/// Reads the file at `path`.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let mut text = String::new();
    // One byte more tells that there are too many.
    let read = File::open(path).and_then(|file| file.take(MAX_LEN + 1).read_to_string(&mut text));
    read.map_err(|source| FileError::Read {
        path: path.into(),
        source,
    })?;
    if text.len() as u64 > MAX_LEN {
        return Err(unfit(path)(format!("it has more than {MAX_LEN} bytes")));
    }
    toml::from_str(&text).map_err(|source| FileError::Parse {
        path: path.into(),
        source,
    })
}
