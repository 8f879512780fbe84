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

/// Has all threads of a process, and those they make later, run on these CPUs alone; empty for all.
pub(crate) fn pin_process(pid: u32, cpus: &[usize]) -> io::Result<()> {
    let all: Vec<_> = (0..CpuSet::MAX_CPU).collect();
    let cpus = if cpus.is_empty() { &all } else { cpus };
    // A thread that was made meanwhile is there the second time.
    for _ in 0..2 {
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = entry?.file_name();
            let thread = thread.to_str().and_then(|name| name.parse().ok());
            match pin(thread.and_then(Pid::from_raw), cpus) {
                // It has ended.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                pinned => pinned?,
            }
        }
    }
    Ok(())
}

/// The CPUs of several lists together; none, for all, if one of them has none, or there is no list.
pub(crate) fn together(lists: &[String]) -> Vec<usize> {
    let lists = lists
        .iter()
        .map(|text| list(text).filter(|cpus| !cpus.is_empty()));
    let lists: Option<Vec<_>> = lists.collect();
    let mut cpus = lists.unwrap_or_default().concat();
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

/// The CPUs of a list such as `0-3,8` (cpuset(7), List format), in order. `None` if it is none.
pub(crate) fn list(text: &str) -> Option<Vec<usize>> {
    let mut is_listed = [false; CpuSet::MAX_CPU];
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        is_listed[first..=last].fill(true);
    }
    let listed = is_listed.iter().enumerate().filter(|(_, is)| **is);
    Some(listed.map(|(cpu, _)| cpu).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::sched_getaffinity;
    use std::process::Command;

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
            let host = crate::config::Size::of_host().vcpus;
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
    fn a_process_is_held_to_its_cpus_and_let_go() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let count = || sched_getaffinity(pid).unwrap().count();
        let before = count();
        let first = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| first.is_set(*cpu)).unwrap();
        pin_process(child.id(), &[first]).unwrap();
        let held = count();
        pin_process(child.id(), &[]).unwrap();
        let free = count();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(held == 1 && free >= before, "{before}, {held}, {free}");
        assert!(pin_process(child.id(), &[first]).is_err(), "it is gone");
    }

    #[test]
    fn a_pod_has_the_cpus_of_its_containers_or_all() {
        let together = |lists: &[&str]| {
            let lists: Vec<_> = lists.iter().map(|&text| text.into()).collect();
            together(&lists)
        };
        assert_eq!(together(&["2-3", "0,2"]), [0, 2, 3]);
        assert_eq!((together(&["2-3", ""]), together(&[])), (vec![], vec![]));
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
