//! Clones for many pods that start at the same moment, in turns as shims take them where KVM emulates.
//! Without turns none of them might ever answer there: periodic work of so many guests, timer
//! interrupts above all, takes all processors. With them a start costs the same, however many guests
//! are there already.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::network::set_up;
use tests::template::{Template, Vm};

use super::vm::{self, Pod, net};

/// For each turn, which there is one of for two processors.
const CLONES: usize = 12;
/// No shim waits longer for a clone's agent.
const BOUND: Duration = Duration::from_secs(20);

/// A clone whose agent has answered, and how long it took.
struct Answered {
    _share: TempDir,
    vm: Vm,
    took: Duration,
}

pub(crate) fn check(template: &Template) {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let turns = (processors / 2).max(1);
    let next = AtomicUsize::new(0);
    let since = Instant::now();
    let work = || {
        let number = || next.fetch_add(1, Ordering::Relaxed);
        let numbers = std::iter::from_fn(|| Some(number()).filter(|it| *it < turns * CLONES));
        numbers
            .map(|number| answer(template, number))
            .collect::<Vec<_>>()
    };
    let clones: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..turns).map(|_| scope.spawn(work)).collect();
        let clones = workers.into_iter().map(|worker| worker.join().unwrap());
        clones.flatten().collect()
    });
    let most = clones.iter().map(|clone| clone.took).max().unwrap();
    let count = clones.len();
    eprintln!(
        "{count} clones in {turns} turns: pods after {:?}, their agents answered after at most {most:?}",
        since.elapsed()
    );
    assert!(most < BOUND);
    for clone in clones {
        vm::check(&clone.vm.agent());
        clone.vm.end();
    }
}

/// Restores one, has its agent answer, and makes it a pod.
fn answer(template: &Template, number: usize) -> Answered {
    let share = vm::share();
    let pod = Pod {
        hostname: format!("once-{number}"),
        mac: format!("02:00:00:00:03:{number:02x}"),
        address: format!("10.77.{number}.2"),
    };
    let tap = format!("once{number:02}");
    let since = Instant::now();
    let vm = template.restore(share.path(), &net(&tap, &pod.mac));
    let agent = vm.agent();
    vm::check(&agent);
    let took = since.elapsed();
    set_up(&tap, &format!("10.77.{number}.1/24"));
    pod.settle(&agent);
    Answered {
        _share: share,
        vm,
        took,
    }
}
