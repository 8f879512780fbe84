//! What the guest has open, by number. Looking one up takes no lock; opening and closing do.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::{ArcSwapOption, Guard};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Numbers come in blocks, so that few open files take little memory.
const BLOCK: usize = 256;
const BLOCKS: usize = 256;
/// The most handles that can be open, whatever the limit.
pub(super) const MOST: usize = BLOCK * BLOCKS;

/// An open file or folder.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) file: OwnedFd,
    /// Number of the node that is open.
    pub(super) nodeid: u64,
    /// How to open the file once more.
    pub(super) flags: OFlags,
    /// Held to read a folder: its position is the descriptor's.
    pub(super) reading: Mutex<()>,
}

impl Handle {
    pub(super) fn new(file: OwnedFd, nodeid: u64, flags: OFlags) -> Self {
        let reading = Mutex::new(());
        Self {
            file,
            nodeid,
            flags: flags & !OFlags::TRUNC,
            reading,
        }
    }
}

/// What was open in another life and cannot be opened in this one. The guest does not know, so its
/// number is not given to others until it is closed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lost {
    pub(super) nodeid: u64,
    pub(super) flags: OFlags,
}

type Block = Box<[ArcSwapOption<Handle>]>;

#[derive(Debug)]
pub(super) struct Handles {
    blocks: [OnceLock<Block>; BLOCKS],
    numbers: Mutex<Numbers>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Numbers {
    /// Numbers that were used and can be again.
    free: Vec<usize>,
    /// The first number from which on none was ever used.
    fresh: usize,
    lost: HashMap<usize, Lost>,
}

impl Handles {
    /// Handles of which at most `limit` can be open.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            blocks: [const { OnceLock::new() }; BLOCKS],
            numbers: Mutex::default(),
            limit: limit.min(MOST),
        }
    }

    pub(super) fn insert(&self, handle: Handle) -> Result<u64, Errno> {
        let mut numbers = self.numbers.lock().expect("a panic ends the process");
        let number = match numbers.free.pop() {
            Some(number) => number,
            None if numbers.fresh < self.limit => {
                numbers.fresh += 1;
                numbers.fresh - 1
            }
            None => return Err(Errno::NFILE),
        };
        self.slot(number).store(Some(Arc::new(handle)));
        Ok(number as u64)
    }

    /// Puts each where it was in another life, for nothing is open now. False if there is no such
    /// number, or it is there twice.
    pub(super) fn restore(
        &self,
        open: impl IntoIterator<Item = (u64, Result<Handle, Lost>)>,
    ) -> bool {
        let mut numbers = self.numbers.lock().expect("a panic ends the process");
        let mut taken = HashSet::new();
        for (number, handle) in open {
            let number = usize::try_from(number).ok().filter(|n| *n < self.limit);
            let Some(number) = number.filter(|number| taken.insert(*number)) else {
                return false;
            };
            numbers.fresh = numbers.fresh.max(number + 1);
            match handle {
                Ok(handle) => self.slot(number).store(Some(Arc::new(handle))),
                Err(lost) => {
                    numbers.lost.insert(number, lost);
                }
            }
        }
        numbers.free = (0..numbers.fresh)
            .filter(|number| !taken.contains(number))
            .collect();
        true
    }

    /// ESTALE if it is lost.
    pub(super) fn get(&self, number: u64) -> Result<Open, Errno> {
        let guard = self.existing(number).map(ArcSwapOption::load);
        match guard.filter(|guard| guard.is_some()) {
            Some(guard) => Ok(Open(guard)),
            None if self.is_lost(number) => Err(Errno::STALE),
            None => Err(Errno::BADF),
        }
    }

    fn is_lost(&self, number: u64) -> bool {
        let numbers = self.numbers.lock().expect("a panic ends the process");
        usize::try_from(number).is_ok_and(|number| numbers.lost.contains_key(&number))
    }

    pub(super) fn remove(&self, number: u64) -> Result<(), Errno> {
        let slot = self.existing(number);
        let number = usize::try_from(number).map_err(|_| Errno::BADF)?;
        let mut numbers = self.numbers.lock().expect("a panic ends the process");
        let was_open = slot.is_some_and(|slot| slot.swap(None).is_some());
        if !was_open && numbers.lost.remove(&number).is_none() {
            return Err(Errno::BADF);
        }
        numbers.free.push(number);
        Ok(())
    }

    pub(super) fn clear(&self) {
        let mut numbers = self.numbers.lock().expect("a panic ends the process");
        for number in 0..numbers.fresh {
            self.slot(number).store(None);
        }
        *numbers = Numbers::default();
    }

    /// Number, file and flags of each, those that are lost among them: a later life may have them.
    pub(super) fn all(&self) -> Vec<(u64, u64, OFlags)> {
        let numbers = self.numbers.lock().expect("a panic ends the process");
        let all = (0..numbers.fresh).filter_map(|number| {
            let (nodeid, flags) = match numbers.lost.get(&number) {
                Some(lost) => (lost.nodeid, lost.flags),
                None => {
                    let slot = self.slot(number).load();
                    let open = slot.as_deref()?;
                    (open.nodeid, open.flags)
                }
            };
            Some((number as u64, nodeid, flags))
        });
        all.collect()
    }

    fn slot(&self, number: usize) -> &ArcSwapOption<Handle> {
        let block = self.blocks[number / BLOCK]
            .get_or_init(|| (0..BLOCK).map(|_| ArcSwapOption::empty()).collect());
        &block[number % BLOCK]
    }

    fn existing(&self, number: u64) -> Option<&ArcSwapOption<Handle>> {
        let number = usize::try_from(number).ok()?;
        let block = self.blocks.get(number / BLOCK)?.get()?;
        Some(&block[number % BLOCK])
    }
}

/// A handle in use: it stays open until this is dropped, also if the guest closes it.
#[derive(Debug)]
pub(super) struct Open(Guard<Option<Arc<Handle>>>);

impl std::ops::Deref for Open {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.0
            .as_deref()
            .expect("an Open is made of one that is there")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const LOST: Lost = Lost {
        nodeid: 1,
        flags: OFlags::RDONLY,
    };

    fn handle() -> Handle {
        let file = File::open("/dev/null").unwrap();
        Handle::new(file.into(), 1, OFlags::RDONLY)
    }

    #[test]
    fn no_more_are_open_than_the_limit() {
        let handles = Handles::new(3);
        let numbers: Vec<_> = (0..3).map(|_| handles.insert(handle()).unwrap()).collect();
        assert_eq!(handles.insert(handle()).unwrap_err(), Errno::NFILE);
        handles.remove(numbers[1]).unwrap();
        assert_eq!(handles.insert(handle()), Ok(numbers[1]));
    }

    #[test]
    fn numbers_the_guest_was_never_given_are_refused() {
        let handles = Handles::new(1000);
        handles.insert(handle()).unwrap();
        for number in [1, 255, 256, MOST as u64, u64::MAX] {
            assert_eq!(handles.get(number).unwrap_err(), Errno::BADF);
            assert_eq!(handles.remove(number), Err(Errno::BADF));
        }
    }

    #[test]
    fn what_is_in_use_outlives_its_closing() {
        let handles = Handles::new(1000);
        let number = handles.insert(handle()).unwrap();
        let open = handles.get(number).unwrap();
        handles.remove(number).unwrap();
        handles.get(number).unwrap_err();
        rustix::fs::fstat(&open.file).unwrap();
    }

    #[test]
    fn a_restored_number_is_taken_and_those_before_it_are_free() {
        let handles = Handles::new(1000);
        assert!(handles.restore([(300, Ok(handle())), (7, Err(LOST))]));
        let numbers: Vec<_> = (0..300)
            .map(|_| handles.insert(handle()).unwrap())
            .collect();
        assert!(!numbers.contains(&300) && !numbers.contains(&7));
        assert_eq!(handles.all().len(), 302);
        assert_eq!(handles.get(7).unwrap_err(), Errno::STALE);
        handles.remove(7).unwrap();
        assert_eq!(handles.remove(7), Err(Errno::BADF));
        assert_eq!(handles.insert(handle()), Ok(7));
        handles.clear();
        assert_eq!(handles.all().len(), 0);
    }

    #[test]
    fn numbers_the_guest_cannot_have_had_are_not_restored() {
        let restore = |numbers: &[u64]| {
            let open = numbers.iter().map(|number| (*number, Err(LOST)));
            Handles::new(1000).restore(open)
        };
        assert!(restore(&[3, 999]));
        assert!(!restore(&[3, 3]));
        assert!(!restore(&[1000]));
        assert!(!restore(&[u64::MAX]));
    }
}
