//! The failures of a template's clones, and what follows from them.
//!
//! One failed clone proves nothing: its pod boots, and the next pod tries again. After
//! [`MAX_FAILURES`] without a success in between, the snapshot is *set aside*: pods boot, and one of
//! them makes a new snapshot on the way. The first time that is the next pod. If the clones of the
//! new snapshot fail as well, making another has to wait, each time twice as long as the last. So a
//! template that never works costs a bounded number of pods an attempt.
//!
//! The state is one file beside the snapshot, to which each failure appends a line and which a
//! success removes. Both are single system calls, so any number of shims can do them at once and be
//! killed at any time. A line names the snapshot that the clone was made of: a new snapshot starts
//! with no failures.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Stamp;

/// How many failures in a row set a snapshot aside.
pub(super) const MAX_FAILURES: usize = 3;
/// How long no third snapshot is made, after the first two were set aside.
const FIRST_PAUSE: Duration = Duration::from_secs(10 * 60);
const MAX_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// Longest reason that is kept, in characters.
const MAX_REASON_LEN: usize = 500;
const FILE: &str = "failures";

/// The failures since the last success, oldest first.
#[derive(Debug, Default)]
pub(super) struct Failures(Vec<Failure>);

/// A clone that did not become a pod's guest.
#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    snapshot: Stamp,
    /// When the clone failed, in seconds since the host booted, time asleep included. A template is
    /// never older than that, and no one can set this clock.
    at_s: u64,
    why: String,
}

impl Failures {
    /// What cannot be read counts as no failure: a line that a full disk cut short, for one.
    pub(super) fn read(folder: &Path) -> Self {
        let text = fs::read(folder.join(FILE)).unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n');
        let failures = lines.filter_map(|line| serde_json::from_slice(line).ok());
        Self(failures.collect())
    }

    /// Adds one, for all shims to see.
    pub(super) fn add(folder: &Path, snapshot: &Stamp, why: &str) -> io::Result<()> {
        let failure = Failure {
            snapshot: snapshot.clone(),
            at_s: now().as_secs(),
            why: why.chars().take(MAX_REASON_LEN).collect(),
        };
        let text = serde_json::to_string(&failure).expect("paths and numbers are JSON");
        let mut options = File::options();
        let options = options.create(true).append(true).mode(0o600);
        // The line before may have been cut short, so this one brings its own start.
        let line = format!("\n{text}\n");
        options.open(folder.join(FILE))?.write_all(line.as_bytes())
    }

    /// Forgets all of them, and returns whether there were any.
    pub(super) fn forget(folder: &Path) -> io::Result<bool> {
        match fs::remove_file(folder.join(FILE)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn count(&self, snapshot: &Stamp) -> usize {
        let is_of = |failure: &&Failure| failure.snapshot == *snapshot;
        self.0.iter().filter(is_of).count()
    }

    pub(super) fn sets_aside(&self, snapshot: &Stamp) -> bool {
        self.count(snapshot) >= MAX_FAILURES
    }

    /// How many snapshots in a row were set aside.
    fn set_aside(&self) -> u32 {
        let mut snapshots: Vec<&Stamp> = Vec::new();
        for Failure { snapshot, .. } in &self.0 {
            if !snapshots.contains(&snapshot) && self.sets_aside(snapshot) {
                snapshots.push(snapshot);
            }
        }
        u32::try_from(snapshots.len()).unwrap_or(u32::MAX)
    }

    /// How long from `now` no other snapshot is to be made.
    pub(super) fn pause_at(&self, now: Duration) -> Duration {
        let Some(last) = self.0.last() else {
            return Duration::ZERO;
        };
        let pause = match self.set_aside() {
            0 | 1 => Duration::ZERO,
            count => FIRST_PAUSE
                .saturating_mul(2_u32.saturating_pow(count - 2))
                .min(MAX_PAUSE),
        };
        (Duration::from_secs(last.at_s) + pause).saturating_sub(now)
    }

    pub(super) fn pause(&self) -> Duration {
        self.pause_at(now())
    }

    /// Why the last clone failed.
    pub(super) fn reason(&self) -> Option<&str> {
        self.0.last().map(|failure| failure.why.as_str())
    }
}

/// The time since the host booted, time asleep included.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::try_from(now).expect("it has counted up from zero")
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn snapshot(number: u64) -> Stamp {
        Stamp {
            path: "/t/state.json".into(),
            inode: number,
            len: 1,
            changed_s: 1,
            changed_ns: 1,
        }
    }

    /// Failures of the snapshots of these numbers, one each second.
    fn of(snapshots: &[u64]) -> Failures {
        let failures = snapshots.iter().zip(1..).map(|(number, at_s)| Failure {
            snapshot: snapshot(*number),
            at_s,
            why: format!("number {at_s}"),
        });
        Failures(failures.collect())
    }

    #[test]
    fn the_third_failure_of_one_snapshot_sets_it_aside() {
        let aside = |failures: &[u64]| of(failures).sets_aside(&snapshot(7));
        let cases = [
            &[][..],
            &[7],
            &[7, 7],
            &[7, 7, 7],
            &[7, 8, 8, 7],
            &[7, 8, 7, 7],
        ];
        assert_eq!(cases.map(aside), [false, false, false, true, false, true]);
    }

    #[test]
    fn the_next_pod_makes_another_snapshot_and_later_ones_take_longer_each_time() {
        let pause = |snapshots: u64| {
            let failures: Vec<_> = (0..snapshots).flat_map(|number| [number; 4]).collect();
            let last = Duration::from_secs(4 * snapshots);
            of(&failures).pause_at(last).as_secs() / 60
        };
        let pauses = [0, 1, 2, 3, 4, 9, 10, 100].map(pause);
        assert_eq!(pauses, [0, 0, 10, 20, 40, 1280, 1440, 1440]);
        // Two failures are not enough to set a snapshot aside.
        let failures = of(&[1, 1, 1, 2, 2]);
        assert_eq!(failures.pause_at(Duration::ZERO).as_secs(), 5);
        let failures = of(&[1, 1, 1, 2, 2, 2]);
        assert_eq!(failures.pause_at(Duration::from_secs(606)).as_secs(), 0);
        assert_eq!(failures.pause_at(Duration::from_secs(605)).as_secs(), 1);
    }

    #[test]
    fn failures_of_many_shims_at_once_are_all_counted() {
        let folder = tempfile::tempdir().unwrap();
        let reason = "long enough that a buffer would be split ".repeat(100);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        Failures::add(folder.path(), &snapshot(1), &reason).unwrap();
                    }
                });
            }
        });
        let failures = Failures::read(folder.path());
        assert_eq!(failures.count(&snapshot(1)), 400);
        assert_eq!(failures.reason().unwrap().len(), MAX_REASON_LEN);
        assert!(Failures::forget(folder.path()).unwrap());
        assert!(!Failures::forget(folder.path()).unwrap());
        assert_eq!(Failures::read(folder.path()).count(&snapshot(1)), 0);
    }

    #[test]
    fn a_line_that_was_cut_short_hides_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        Failures::add(folder.path(), &snapshot(1), "one\nand a half").unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, [&whole[..], &whole[..cut]].concat()).unwrap();
            Failures::add(folder.path(), &snapshot(1), "last").unwrap();
            let failures = Failures::read(folder.path());
            // Without its last byte, the end of the line, a line is whole.
            let count = if cut + 1 == whole.len() { 3 } else { 2 };
            assert_eq!(failures.count(&snapshot(1)), count, "cut at {cut}");
            assert_eq!(failures.reason(), Some("last"));
        }
        fs::write(&path, [0xff, 0, b'\n']).unwrap();
        assert_eq!(Failures::read(folder.path()).count(&snapshot(1)), 0);
    }
}
