//! `working-set-ID`: which pages of RAM a VM has touched since it was restored from the snapshot of that
//! id, so that the next one has them before it runs.
//!
//! Only a hint: a VM restored without it, or with another one, is the same. The file says of itself
//! whether it is whole ([`mod@format`]); what it says of RAM is checked, too.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::files;
use super::format::{self, Document};
use super::save::lock;
use super::{STATE, State, WORKING_SET};
use crate::machine::{Machine, Source};
use crate::memory::are_pages;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WorkingSet {
    /// The first byte of each run, in offsets of RAM, and the one after its last.
    runs: Vec<(u64, u64)>,
}

impl Document for WorkingSet {
    const MAGIC: &'static str = "podvmm working set";
    const VERSION: u32 = 1;
}

/// Why a working set is not recorded.
#[derive(Debug, Error)]
pub(crate) enum RecordError {
    #[error("the VM is of no snapshot: it was booted, and has written no incremental one")]
    Booted,
    #[error("the VM's RAM is a copy of its snapshot's, being shared or of huge pages")]
    Copied,
    #[error("the snapshot in {} is another one by now", .0.display())]
    Replaced(PathBuf),
    #[error("another podvmm writes a snapshot to {}", .0.display())]
    Busy(PathBuf),
    #[error("read which pages are there")]
    Pages(#[source] io::Error),
    #[error("{act} {}", .path.display())]
    File {
        act: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("write the working set down")]
    Encode(#[source] serde_json::Error),
}

/// Records, beside its snapshot, what `machine` has touched. Returns how many bytes that is.
pub(crate) fn record(machine: &Machine) -> Result<u64, RecordError> {
    let source = machine.source.as_ref().ok_or(RecordError::Booted)?;
    let touched = machine.ram.touched().map_err(RecordError::Pages)?;
    let runs = touched.ok_or(RecordError::Copied)?;
    let bytes = runs.iter().map(|run| run.end - run.start).sum();
    write(source, runs)?;
    log::info!("recorded {bytes} bytes of RAM as touched");
    Ok(bytes)
}

fn write(source: &Source, runs: Vec<Range<u64>>) -> Result<(), RecordError> {
    let Source { folder, id } = source;
    let failed = |act: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |source| RecordError::File { act, path, source }
    };
    // No other podvmm may write a snapshot there meanwhile: it would remove the files of other
    // snapshots.
    let lock = lock(folder)
        .map_err(failed("open", folder))?
        .ok_or_else(|| RecordError::Busy(folder.clone()))?;
    let state = folder.join(STATE);
    let there = files::read(&state).map_err(failed("read", &state))?;
    match format::decode::<State>(&there) {
        Ok(state) if state.id == *id => {}
        Ok(_) | Err(_) => return Err(RecordError::Replaced(folder.clone())),
    }
    let runs = runs.into_iter().map(|run| (run.start, run.end)).collect();
    let text = format::encode(&WorkingSet { runs }).map_err(RecordError::Encode)?;
    let draft = folder.join(format!(".{WORKING_SET}{id}"));
    let write = || {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    let path = folder.join(format!("{WORKING_SET}{id}"));
    let written = write().and_then(|()| fs::rename(&draft, &path));
    if written.is_err() {
        // It may not even be there.
        let _ = fs::remove_file(&draft);
    }
    written.map_err(failed("write", &path))?;
    lock.sync_all().map_err(failed("write", folder))
}

/// What was recorded of the snapshot, whose RAM has `ram_len` bytes. None if nothing was, or nothing
/// that can be used.
pub(super) fn read(source: &Source, ram_len: u64) -> Option<Vec<Range<u64>>> {
    let path = source.folder.join(format!("{WORKING_SET}{}", source.id));
    let bytes = match files::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            log::warn!("{} is not used: {error}", path.display());
            return None;
        }
    };
    match parse(&bytes, ram_len) {
        Ok(runs) => Some(runs),
        Err(why) => {
            log::warn!("{} is not used: {why}", path.display());
            None
        }
    }
}

fn parse(bytes: &[u8], ram_len: u64) -> Result<Vec<Range<u64>>, String> {
    let WorkingSet { runs } = format::decode(bytes).map_err(|error| error.to_string())?;
    let runs: Vec<_> = runs.into_iter().map(|(start, end)| start..end).collect();
    match are_pages(&runs, ram_len) {
        true => Ok(runs),
        false => Err(format!(
            "its runs are not within {ram_len} bytes of RAM, in order and whole pages"
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: u64 = 1 << 30;

    fn encoded(runs: &[(u64, u64)]) -> String {
        let runs = runs.to_vec();
        format::encode(&WorkingSet { runs }).unwrap()
    }

    #[test]
    fn runs_are_pages_of_ram_in_order() {
        let good = [(0, 4096), (8192, 16384), (LEN - 4096, LEN)];
        let parsed = parse(encoded(&good).as_bytes(), LEN).unwrap();
        assert_eq!(parsed, [0..4096, 8192..16384, LEN - 4096..LEN]);
        let bad = [
            &[(4096, 4096)][..],
            &[(8192, 4096)],
            &[(0, 4095)],
            &[(1, 4096)],
            &[(0, LEN + 4096)],
            &[(0, u64::MAX)],
            &[(4096, 8192), (0, 4096)],
            &[(0, 8192), (4096, 12288)],
        ];
        for runs in bad {
            let why = parse(encoded(runs).as_bytes(), LEN).unwrap_err();
            assert!(why.starts_with("its runs are not within"), "{runs:?} {why}");
        }
    }

    proptest! {
        #[test]
        fn a_byte_that_changed_is_found(at: prop::sample::Index, flip in 1..=255_u8) {
            let good = encoded(&[(0, 4096), (8192, 16384)]);
            let mut bytes = good.clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // Unless it is white space now, or the same in capitals.
            match parse(&bytes, LEN) {
                Err(_) => {}
                Ok(runs) => prop_assert_eq!(runs, [0..4096, 8192..16384]),
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            prop_assert!(parse(&bytes, LEN).is_err());
        }

        #[test]
        fn what_is_accepted_lies_in_ram(runs: Vec<(u64, u64)>) {
            if let Ok(runs) = parse(encoded(&runs).as_bytes(), LEN) {
                prop_assert!(runs.iter().all(|run| run.start < run.end && run.end <= LEN));
            }
        }
    }
}
