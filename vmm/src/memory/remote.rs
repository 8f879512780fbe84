//! Guest RAM whose pages are elsewhere until they are needed.

use std::io;
use std::ops::Range;

use super::{Ram, pages};
use crate::memory::handover::Mapping;
use crate::memory::userfault::Userfault;

/// The most runs that are made of RAM: each is a mapping of its own, to the host and to a handler.
const MOST_RUNS: usize = 64;
const FEW_BYTES: usize = 4 << 20;

impl Ram {
    /// Whether RAM is this process's alone and of small pages, so that pages can be put into it.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    /// Has what is `covered` of RAM, and `allowed`, come through `userfault`, and says where that is.
    /// RAM must be as new; the rest of it is zero.
    pub(crate) fn expect(
        &mut self,
        covered: &[Range<u64>],
        allowed: &[Range<u64>],
        userfault: &Userfault,
    ) -> io::Result<Vec<Mapping>> {
        let runs = pages::at_most(covered.to_vec(), MOST_RUNS);
        let runs = pages::within(&runs, allowed);
        let mut mappings = Vec::with_capacity(runs.len());
        for (range, region) in self.regions() {
            let host = region.as_ptr().addr() as u64;
            for run in pages::within(&runs, std::slice::from_ref(&range)) {
                let addresses = host + (run.start - range.start)..host + (run.end - range.start);
                userfault.register(addresses.clone())?;
                mappings.push(Mapping::of(&addresses, run.start));
            }
        }
        self.mapped = runs;
        Ok(mappings)
    }

    /// Has all pages come that have not yet. What `held` makes is held for each few of them.
    pub(crate) fn fetch<T>(&self, held: impl Fn() -> T) {
        for run in &self.mapped {
            for start in run.clone().step_by(FEW_BYTES) {
                let few = start..run.end.min(start + FEW_BYTES as u64);
                let _held = held();
                if let Err(error) = self.populate(std::slice::from_ref(&few)) {
                    log::debug!("have pages of RAM come before they are read: {error}");
                    return;
                }
            }
        }
    }
}
