//! Bounds how often a guest has the host's file systems written to their disks as a whole.
//!
//! That takes the disk from everything else on the node, and writes what others changed too. So it is
//! done for one request at a time, not at all if the share was not changed since the last time, and
//! for no more than about half of the time.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::virtio::fs::host::Device;

/// The least and the longest pause after one, which else is as long as it took. The longest is what a
/// pause of the VM may have to wait for.
const PAUSE: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(500)];

#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// How often something was changed by way of the share.
    changes: AtomicU64,
    done: Mutex<Done>,
}

#[derive(Debug, Default)]
struct Done {
    /// How many changes each file system has on its disk. There are as many as the host has mounted.
    changes: HashMap<Device, u64>,
    /// Before this, there is to be no other.
    pause_until: Option<Instant>,
}

impl Syncs {
    /// Something was changed, and the guest is not told so yet.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Calls `sync`, which is to write the file system `device` to its disk, unless all changes are
    /// there already.
    pub(super) fn sync(
        &self,
        device: Device,
        sync: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut done = self.done.lock().expect("a panic ends the process");
        // Those that come while it works are for the next time.
        let changes = self.changes.load(Ordering::SeqCst);
        if done.changes.get(&device) == Some(&changes) {
            return Ok(());
        }
        if let Some(until) = done.pause_until {
            thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        let started = Instant::now();
        let result = sync();
        let [least, longest] = PAUSE;
        done.pause_until = Some(Instant::now() + started.elapsed().clamp(least, longest));
        if result.is_ok() {
            done.changes.insert(device, changes);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Device = (8, 1);

    /// How often the host's file system is synchronised by `count` requests, with a change before each
    /// if there is `change`.
    fn syncs(syncs: &Syncs, device: Device, count: u32, change: bool) -> u32 {
        let mut called = 0;
        for _ in 0..count {
            if change {
                syncs.changed();
            }
            let sync = || {
                called += 1;
                Ok(())
            };
            syncs.sync(device, sync).unwrap();
        }
        called
    }

    #[test]
    fn what_was_not_changed_since_is_not_synchronised_again() {
        let all = Syncs::default();
        assert_eq!(syncs(&all, DISK, 100, false), 1);
        all.changed();
        assert_eq!(syncs(&all, DISK, 100, false), 1);
        assert_eq!(syncs(&all, (8, 2), 100, false), 1, "another file system");
    }

    #[test]
    fn one_that_failed_is_tried_again() {
        let all = Syncs::default();
        assert_eq!(all.sync(DISK, || Err(Errno::IO)), Err(Errno::IO));
        assert_eq!(syncs(&all, DISK, 2, false), 1);
    }

    #[test]
    fn a_change_during_one_is_for_the_next() {
        let all = Syncs::default();
        let change = || {
            all.changed();
            Ok(())
        };
        all.sync(DISK, change).unwrap();
        assert_eq!(syncs(&all, DISK, 2, false), 1);
    }

    #[test]
    fn a_guest_that_never_stops_leaves_half_of_the_time_to_others() {
        let all = Syncs::default();
        let started = Instant::now();
        let mut busy = Duration::ZERO;
        for _ in 0..4 {
            all.changed();
            let sync = || {
                let started = Instant::now();
                thread::sleep(Duration::from_millis(20));
                busy += started.elapsed();
                Ok(())
            };
            all.sync(DISK, sync).unwrap();
        }
        // The pause after the last one is yet to come.
        let pauses = started.elapsed() - busy;
        assert!(pauses >= busy * 3 / 4 - Duration::from_millis(5));
        assert!(syncs(&all, DISK, 3, true) == 3);
    }
}
