//! Turns, on a host whose KVM emulates: how many pods have their guests started at the same time.
//!
//! There a timer interrupt takes a guest 12 000 interpreted instructions, 8 ms of a processor. It comes
//! by the clock, however small the guest's share of a processor is, and most of the guest's other
//! periodic work does as well. When enough guests are at work at once, that takes all of the
//! processors, and none ever gets to what it is asked to do. So starts of VMs and containers take
//! turns, one for every two processors. Idle guests cost little.
//!
//! A turn is a locked file, which the host's kernel unlocks when its shim ends, however that ends.
//! On other hosts every start has its turn at once.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::host::cpus;
use crate::host::place::make_private;

/// The module of a KVM that emulates.
const EMULATING: &str = "/sys/module/kvm_pvm";
/// The folder of the turns, apart from the pods' folder, which goes with the last pod.
const FOLDER: &str = "/run/podvmm-turns";
/// Processors for each turn. The others are for guests that run already, and for the host.
const PROCESSORS: usize = 2;
/// After so long a start goes ahead without a turn: those that have one may hang, and containerd's
/// clients give up after two minutes.
const PATIENCE: Duration = Duration::from_secs(100);
/// The time between looks for a turn that is free.
const PAUSE: Duration = Duration::from_millis(10);

/// The right to have a guest work, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Option<File>);

impl Turn {
    /// Waits for a turn.
    pub(crate) fn wait() -> Self {
        if !Path::new(EMULATING).exists() {
            return Self(None);
        }
        let count = (cpus::online() / PROCESSORS).max(1);
        let since = Instant::now();
        let turn = within(Path::new(FOLDER), count, PATIENCE);
        let waited = since.elapsed();
        match &turn {
            Ok(Some(_)) if waited > PAUSE => log::info!("waited {waited:?} for a turn to start"),
            Ok(Some(_)) => {}
            Ok(None) => log::warn!("start without a turn, none was free for {PATIENCE:?}"),
            Err(error) => log::warn!("start without a turn: {error}"),
        }
        Self(turn.ok().flatten())
    }
}

/// A turn that is given back after some time, or when this is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    /// It is held, not used.
    _holds: Option<Sender<()>>,
}

impl Turn {
    /// Gives the turn back after `most`, though what it was for is not over: a guest that stalls would keep it from
    /// other pods.
    pub(crate) fn for_at_most(self, most: Duration) -> Lease {
        if self.0.is_none() {
            return Lease { _holds: None };
        }
        let (holds, ended) = channel();
        let hold = move || {
            // Nothing is sent: the other end is dropped.
            let _ = ended.recv_timeout(most);
            drop(self);
        };
        // Without a thread the turn is given back now.
        let thread = thread::Builder::new().name("turn".into());
        let _ = thread.stack_size(64 << 10).spawn(hold);
        Lease {
            _holds: Some(holds),
        }
    }
}

/// One of `count` turns, which all that name the same folder share. `None` if none is free in time.
fn within(folder: &Path, count: usize, patience: Duration) -> io::Result<Option<File>> {
    let deadline = Instant::now() + patience;
    make_private(folder)?;
    loop {
        for number in 0..count {
            let mut options = File::options();
            let options = options.create(true).write(true).truncate(false);
            let file = options.open(folder.join(number.to_string()))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(file)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn no_more_have_a_turn_than_there_are_and_all_get_one() {
        const COUNT: usize = 3;
        let folder = tempfile::tempdir().unwrap();
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let turn = within(folder.path(), COUNT, Duration::from_secs(60));
                    let turn = turn.unwrap().unwrap();
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(20));
                    now.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                });
            }
        });
        assert_eq!(most.into_inner(), COUNT);
    }

    #[test]
    fn a_turn_is_lent_for_some_time_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let long = Duration::from_secs(60);
        let take = |patience| within(folder.path(), 1, patience).unwrap();
        let lease = Turn(take(long)).for_at_most(Duration::from_millis(20));
        let next = take(long).expect("it is given back in time");
        drop(lease);
        let lease = Turn(Some(next)).for_at_most(long);
        assert!(take(Duration::from_millis(30)).is_none());
        drop(lease);
        assert!(take(long).is_some());
    }

    #[test]
    fn a_turn_that_is_never_given_back_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let take = || within(folder.path(), 1, Duration::from_millis(30)).unwrap();
        let turn = take().unwrap();
        assert!(take().is_none());
        drop(turn);
        assert!(take().is_some());
    }
}
