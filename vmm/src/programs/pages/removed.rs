//! Addresses that a VM has given back, which hold zeros for it from then on.

use std::collections::BTreeMap;
use std::ops::Range;

/// Many more runs than memory that is given back falls into. Their number is the VM's to choose, and the
/// memory for them is not.
const MOST_RUNS: usize = 1 << 20;

/// Runs of addresses that neither overlap nor touch: their ends by their starts.
#[derive(Debug, Default)]
pub(super) struct Removed(BTreeMap<u64, u64>);

impl Removed {
    /// Adds `run`. False if that is one too many.
    pub(super) fn add(&mut self, run: Range<u64>) -> bool {
        let Range { mut start, mut end } = run;
        if start >= end {
            return true;
        }
        while let Some((&from, &to)) = self.0.range(..=end).next_back()
            && to >= start
        {
            self.0.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.0.insert(start, end);
        self.0.len() <= MOST_RUNS
    }

    /// Whether what is at `address` is of them.
    pub(super) fn has(&self, address: u64) -> bool {
        let before = self.0.range(..=address).next_back();
        before.is_some_and(|(_, end)| address < *end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_as_a_set(runs in prop::collection::vec((0..64_u64, 0..16_u64), 0..24)) {
            let mut removed = Removed::default();
            let mut set = std::collections::HashSet::new();
            for (start, len) in runs {
                prop_assert!(removed.add(start..start + len));
                set.extend(start..start + len);
            }
            for address in 0..96 {
                prop_assert_eq!(removed.has(address), set.contains(&address));
            }
            let runs: Vec<_> = removed.0.into_iter().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }

    #[test]
    fn a_vm_cannot_have_us_remember_any_number_of_runs() {
        let mut removed = Removed::default();
        let runs = (0..).map(|number| number * 2..number * 2 + 1);
        let taken = runs.take_while(|run| removed.add(run.clone())).count();
        assert_eq!(taken, MOST_RUNS);
    }
}
