//! Clones that live at the same time: each becomes a pod, and says who it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::network::set_up;
use tests::pod::{spec, strings};
use tests::template::{Template, Vm};

use super::vm::{self, Pod, net, now};

const TOGETHER: usize = 20;
/// Containers that start at the same time.
const WORKERS: usize = 2;
/// How far clocks may be apart.
const APART: Duration = Duration::from_secs(2);

struct Clone {
    vm: Vm,
    share: TempDir,
    pod: Pod,
    host: TcpListener,
}

/// What a clone said of itself, and when that came.
struct Said {
    lines: BTreeMap<String, String>,
    at: Duration,
    since_resumed: Duration,
}

pub(crate) fn check(template: &Template) {
    let since = Instant::now();
    let clones: Vec<_> = (0..TOGETHER).map(|number| make(template, number)).collect();
    eprintln!("{TOGETHER} clones at once after {:?}", since.elapsed());
    let rest = Mutex::new(clones.iter().enumerate());
    let told = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let next = rest.lock().unwrap().next();
                    let Some((number, clone)) = next else {
                        return;
                    };
                    let began = Instant::now();
                    vm::yield_to_others(&clone.vm, false);
                    let said = identify(clone);
                    vm::yield_to_others(&clone.vm, true);
                    eprintln!("{}: {:?}", clone.pod.hostname, began.elapsed());
                    told.lock().unwrap().insert(number, said);
                }
            });
        }
    });
    let told = told.into_inner().unwrap();
    for (clone, said) in clones.iter().zip(told.values()) {
        judge(clone, said);
    }
    for key in ["random", "boot_id", "hostname", "mac"] {
        let different: BTreeSet<_> = told.values().map(|said| &said.lines[key]).collect();
        assert_eq!(different.len(), TOGETHER, "{key}");
    }
    ages(template, told.values());
    // None has ended meanwhile.
    for clone in clones {
        vm::check(&clone.vm.agent());
        clone.vm.end();
    }
    eprintln!("{TOGETHER} clones at once took {:?}", since.elapsed());
}

fn make(template: &Template, number: usize) -> Clone {
    let share = vm::share();
    let given = share.path().join("one/rootfs/given");
    fs::write(given, number.to_string()).unwrap();
    let pod = Pod {
        hostname: format!("clone-{number}"),
        mac: format!("02:00:00:00:01:{number:02x}"),
        address: format!("10.78.{number}.2"),
    };
    let tap = format!("clone{number:02}");
    let vm = template.restore(share.path(), &net(&tap, &pod.mac));
    // Where the guest's kernel is interpreted its ticks are work: those at rest would take as much of
    // the host's CPUs as those at work.
    vm::yield_to_others(&vm, true);
    let address = format!("10.78.{number}.1");
    set_up(&tap, &format!("{address}/24"));
    let host = TcpListener::bind((address.as_str(), 7000)).unwrap();
    Clone {
        vm,
        share,
        pod,
        host,
    }
}

/// Makes it its pod, and hears from a container who that is.
fn identify(clone: &Clone) -> Said {
    let agent = clone.vm.agent();
    clone.pod.settle(&agent);
    let mut says = spec("");
    says.mounts
        .retain(|mount| matches!(mount.r#type.as_str(), "proc" | "sysfs" | "tmpfs"));
    let host = clone.host.local_addr().unwrap().to_string();
    says.process.as_mut().unwrap().args = strings(&["guest_load", "identity", &host]);
    agent.create("says", says).unwrap();
    agent.start("says").unwrap();
    let (stream, _) = clone.host.accept().unwrap();
    let mut lines = BufReader::new(stream).lines().map(|line| line.unwrap());
    let mut said = Said {
        lines: BTreeMap::new(),
        at: Duration::ZERO,
        since_resumed: Duration::ZERO,
    };
    // The time is what it says first.
    let first = lines.next().unwrap();
    (said.at, said.since_resumed) = (now(), clone.vm.resumed.elapsed());
    for line in std::iter::once(first).chain(lines) {
        let (key, value) = line.split_once(' ').unwrap();
        said.lines.insert(key.into(), value.into());
    }
    let (err, out, status) = agent.outcome("says", "says");
    assert_eq!((out.as_str(), err.as_str(), status), ("", "", 0));
    said
}

fn judge(clone: &Clone, said: &Said) {
    let Said { lines, at, .. } = said;
    assert_eq!(lines["hostname"], clone.pod.hostname);
    assert_eq!(lines["mac"], clone.pod.mac);
    let number = clone.pod.hostname.rsplit_once('-').unwrap().1;
    assert_eq!(lines["given"], number);
    let made = fs::read_to_string(clone.share.path().join("one/rootfs/made")).unwrap();
    assert_eq!(made, clone.pod.hostname);
    let apart = at.abs_diff(seconds(&lines["time"]));
    assert!(apart < APART, "{}: {apart:?}", clone.pod.hostname);
}

/// The clock that never steps goes on where the template's stood.
fn ages<'a>(template: &Template, told: impl Iterator<Item = &'a Said>) {
    let ages: Vec<_> = told
        .map(|said| seconds(&said.lines["uptime"]) - said.since_resumed)
        .collect();
    let (least, most) = (*ages.iter().min().unwrap(), *ages.iter().max().unwrap());
    eprintln!(
        "the template's age as clones have it: {least:?} to {most:?}, of {:?}",
        template.age
    );
    assert!(most - least < APART, "{ages:?}");
    let [since_answered, since_started] = template.age;
    assert!(since_answered < least + APART && most < since_started + APART);
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs_f64(text.parse().unwrap())
}
