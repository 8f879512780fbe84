//! Which pages of guest RAM hold something, as the host's kernel knows it
//! (Linux, admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page is of a file, or of shared memory.
const FILE: u64 = 1 << 61;

const ENTRY_BYTES: usize = 8;
const ENTRIES: usize = 64 << 10;

/// What about a page is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// The page is there, whatever it is a page of.
    Used,
    /// The page is this process's own: of no file, or a written copy of a file's.
    Written,
}

impl Pages {
    fn has(self, entry: u64) -> bool {
        let used = entry & (PRESENT | SWAPPED) != 0;
        match self {
            Self::Used => used,
            Self::Written => used && entry & FILE == 0,
        }
    }
}

/// The runs of such pages among `len` bytes at `host`, as byte offsets from there.
pub(super) fn runs(host: *const u8, len: u64, pages: Pages) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let first = host.addr() as u64 / PAGE_BYTES;
    let count = len / PAGE_BYTES;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut buffer = vec![0; ENTRIES * ENTRY_BYTES];
    let mut at = 0;
    while at < count {
        let most = usize::try_from(count - at).unwrap_or(ENTRIES).min(ENTRIES);
        let entries = &mut buffer[..most * ENTRY_BYTES];
        pagemap.read_exact_at(entries, (first + at) * ENTRY_BYTES as u64)?;
        for (page, entry) in (at..).zip(entries.as_chunks::<ENTRY_BYTES>().0) {
            if pages.has(u64::from_ne_bytes(*entry)) {
                push(&mut runs, page * PAGE_BYTES..(page + 1) * PAGE_BYTES, 0);
            }
        }
        at += most as u64;
    }
    Ok(runs)
}

/// The runs of bytes that `file`, which backs shared RAM, has among its first `len`.
pub(super) fn data(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let seek = |from: u64, whence| -> io::Result<Option<u64>> {
        let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
        // SAFETY: touches no memory.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
        match u64::try_from(at) {
            Ok(at) => Ok(Some(at.min(len))),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    let mut runs = Vec::new();
    let mut at = 0;
    while at < len
        && let Some(start) = seek(at, libc::SEEK_DATA)?
    {
        at = seek(start, libc::SEEK_HOLE)?.unwrap_or(len);
        if start < at {
            runs.push(start..at);
        }
    }
    Ok(runs)
}

/// Whether `runs`, from a file or a socket, are whole pages within `len` bytes, in order.
pub(crate) fn are_pages(runs: &[Range<u64>], len: u64) -> bool {
    let whole = |run: &Range<u64>| {
        run.start < run.end
            && run.end <= len
            && run.start.is_multiple_of(PAGE_BYTES)
            && run.end.is_multiple_of(PAGE_BYTES)
    };
    runs.iter().all(whole) && runs.is_sorted_by(|run, next| run.end <= next.start)
}

/// Appends `run`, to the last one if no more than `gap` bytes lie between.
pub(super) fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>, gap: u64) {
    match runs.last_mut() {
        Some(last) if run.start <= last.end + gap => last.end = last.end.max(run.end),
        _ => runs.push(run),
    }
}

/// Joins `runs` over what lies between them until there are no more than `most`.
pub(super) fn at_most(mut runs: Vec<Range<u64>>, most: usize) -> Vec<Range<u64>> {
    let mut gap = PAGE_BYTES;
    while runs.len() > most {
        let mut fewer = Vec::with_capacity(runs.len());
        runs.into_iter().for_each(|run| push(&mut fewer, run, gap));
        runs = fewer;
        gap *= 2;
    }
    runs
}

/// What of `runs` lies within `allowed`. Both are in order.
pub(crate) fn within(runs: &[Range<u64>], allowed: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut both = Vec::new();
    let mut rest = allowed;
    for run in runs {
        while let [first, others @ ..] = rest
            && first.end <= run.start
        {
            rest = others;
        }
        for allowed in rest.iter().take_while(|it| it.start < run.end) {
            both.push(run.start.max(allowed.start)..run.end.min(allowed.end));
        }
    }
    both
}

/// All of `runs`, in order.
pub(crate) fn union(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.sort_by_key(|run| run.start);
    let mut union = Vec::with_capacity(runs.len());
    for run in runs {
        push(&mut union, run, 0);
    }
    union
}

/// What of `all` is not in `runs`, which are in order.
pub(super) fn without(all: &[Range<u64>], runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    for part in all {
        let mut at = part.start;
        for run in runs
            .iter()
            .filter(|run| run.end > part.start && run.start < part.end)
        {
            if at < run.start {
                rest.push(at..run.start);
            }
            at = at.max(run.end);
        }
        if at < part.end {
            rest.push(at..part.end);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(runs: &[Range<u64>]) -> Vec<u64> {
        runs.iter().cloned().flatten().collect()
    }

    fn some_runs() -> impl Strategy<Value = Vec<Range<u64>>> {
        let run = (0..60_u64, 1..9_u64).prop_map(|(start, len)| start..start + len);
        proptest::collection::vec(run, 0..9).prop_map(union)
    }

    proptest! {
        #[test]
        fn runs_are_as_sets(a in some_runs(), b in some_runs()) {
            let (in_a, in_b) = (set(&a), set(&b));
            let both: Vec<_> = in_a.iter().copied().filter(|it| in_b.contains(it)).collect();
            let rest: Vec<_> = in_a.iter().copied().filter(|it| !in_b.contains(it)).collect();
            prop_assert_eq!(set(&within(&a, &b)), both);
            prop_assert_eq!(set(&without(&a, &b)), rest);
        }
    }

    #[test]
    fn runs_near_one_another_become_one() {
        let mut runs = Vec::new();
        [0..1, 3..4, 8..9]
            .into_iter()
            .for_each(|run| push(&mut runs, run, 2));
        assert_eq!(runs, [0..4, 8..9]);
        let pages = (0..100).map(|page| page * 3 * PAGE_BYTES..(page * 3 + 1) * PAGE_BYTES);
        let fewer = at_most(pages.chain(std::iter::once(1 << 40..1 << 41)).collect(), 5);
        assert_eq!(fewer, [0..298 * PAGE_BYTES, 1 << 40..1 << 41]);
    }
}
