//! The host's CPUs: how many there are, and which of them a process may use.

use std::fs;
use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// How many CPUs of the host are online. What this process may use of them says nothing of a VM: the
/// shim inherits containerd's affinity, and is in a pod's cgroup.
pub(crate) fn online() -> usize {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let counted = list(text.trim()).map_or(0, |cpus| cpus.len());
    match counted {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        counted => counted,
    }
}

/// Lets this thread, and what it starts, run on all CPUs that its cgroup has.
pub(crate) fn unpin() {
    if let Err(error) = pin(None, &(0..CpuSet::MAX_CPU).collect::<Vec<_>>()) {
        log::debug!("run on all CPUs: {error}");
    }
}

/// Lets a thread run on these CPUs alone, as far as its cgroup has them; `None` is this one.
pub(crate) fn pin(thread: Option<Pid>, cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    let known = cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU);
    known.for_each(|cpu| set.set(*cpu));
    Ok(sched_setaffinity(thread, &set)?)
}

/// The CPUs of a list such as `0-3,8` (cpuset(7), List format), in order. `None` if it is none.
pub(crate) fn list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::sched_getaffinity;

    #[test]
    fn a_thread_that_may_use_one_cpu_counts_all_and_starts_what_uses_all() {
        let pinned = std::thread::spawn(|| {
            let before = sched_getaffinity(None).unwrap();
            let first = (0..CpuSet::MAX_CPU)
                .find(|cpu| before.is_set(*cpu))
                .unwrap();
            pin(None, &[first]).unwrap();
            let one = sched_getaffinity(None).unwrap().count();
            let counted = online();
            let host = crate::size::Size::of_host().vcpus;
            unpin();
            let after = sched_getaffinity(None).unwrap().count();
            (one, before.count() <= after, counted, usize::from(host))
        });
        let (one, is_unpinned, counted, host) = pinned.join().unwrap();
        let text = fs::read_to_string("/proc/cpuinfo").unwrap();
        let online = text.lines().filter(|line| line.starts_with("processor"));
        assert_eq!((one, is_unpinned), (1, true));
        assert_eq!((counted, host), (online.count(), counted));
    }

    #[test]
    fn lists_of_cpus_are_numbers_and_ranges() {
        assert_eq!(list("0-2,8"), Some(vec![0, 1, 2, 8]));
        assert_eq!(list("5,1-2,2"), Some(vec![1, 2, 5]));
        assert_eq!(list(""), Some(Vec::new()));
        for bad in ["x", "3-1", "1-", "0-99999", "-1"] {
            assert_eq!(list(bad), None, "{bad}");
        }
    }
}
