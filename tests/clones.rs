//! Clones of a Linux guest in which the agent waits for a pod: many one after the other, many in
//! turns, many at once, and clones of one that is busy. Made from the kept template: none of it is
//! about booting.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

#[path = "clones/at_once.rs"]
mod at_once;
#[path = "clones/busy.rs"]
mod busy;
#[path = "clones/together.rs"]
mod together;
#[path = "clones/vm.rs"]
mod vm;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use protocol::agent::messages::{GuestDetailsRequest, GuestDetailsResponse};
use tests::guest;
use tests::network::{alone, links};
use tests::podvmm::kvm_is_here;
use tests::template::Template;

use vm::net;

/// How many are made in turn; PODVMM_TEST_CLONES says otherwise. One of some hundred was once seen to
/// die (an emulated host, most likely); thousands in a row show that none does.
fn in_turn_count() -> usize {
    std::env::var("PODVMM_TEST_CLONES").map_or(100, |count| {
        let count = count.parse().expect("PODVMM_TEST_CLONES is a number");
        assert!(count > 0, "PODVMM_TEST_CLONES is at least 1");
        count
    })
}

#[test]
fn clones_are_each_a_guest_of_their_own() {
    if !kvm_is_here() {
        return;
    }
    let turn = guest::one_at_a_time();
    let template = Template::kept(&turn).unwrap_or_else(|| Template::own(&turn));
    alone(move || {
        in_turn(&template);
        at_once::check(&template);
        together::check(&template);
        busy::check(&template);
    });
}

/// One after the other, of which nothing is left.
fn in_turn(template: &Template) {
    let share = vm::share();
    let before = leftovers();
    let count = in_turn_count();
    let mut took: Vec<Duration> = (0..count)
        .map(|_| {
            let since = Instant::now();
            let net = net("clone", "02:00:00:00:00:01");
            let vm = template.restore(share.path(), &net);
            let agent = vm.agent();
            let details: GuestDetailsResponse = agent
                .ask("GetGuestDetails", &GuestDetailsRequest::default())
                .unwrap();
            assert!(details.agent_details.unwrap().init_daemon);
            let took = since.elapsed();
            drop(agent);
            vm.end();
            took
        })
        .collect();
    took.sort();
    let (least, median, most) = (took[0], took[count / 2], took[count - 1]);
    eprintln!(
        "{count} clones in turn, from exec to the agent's answer: least {least:?}, median {median:?}, most {most:?}"
    );
    // Threads that read for a connection end a moment after it.
    let patience = Instant::now() + Duration::from_secs(10);
    while leftovers() != before && Instant::now() < patience {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(leftovers(), before);
}

/// What there is of VMs: processes of this test, its descriptors and threads, links and sockets of
/// its network, and files of its folders.
fn leftovers() -> Vec<String> {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let children = fs::read_dir("/proc/self/task").unwrap().map(|task| {
        let children = task.unwrap().path().join("children");
        fs::read_to_string(children).unwrap_or_default()
    });
    let children: String = children.collect();
    let sockets = fs::read_to_string("/proc/thread-self/net/unix").unwrap();
    let links = links();
    let links = links.lines().filter_map(|line| line.split_once(':'));
    vec![
        format!("processes {children}"),
        format!("descriptors {}", count("/proc/self/fd")),
        format!("threads {}", count("/proc/self/task")),
        format!("sockets {}", sockets.lines().count()),
        format!(
            "links {:?}",
            links
                .map(|(name, _)| name.trim().to_owned())
                .collect::<Vec<_>>()
        ),
    ]
}
