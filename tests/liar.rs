//! A guest that lies: each answer of its agent to the shim is wrong in turn, huge, late or never comes. The shim is
//! the real one; in the place of podvmm is a program without a VM (`src/bin/lying_podvmm`), and in containerd's place
//! the test. Whatever the guest does, the shim answers in time, stays small, and its pod can be killed and leaves
//! nothing. Needs root.

#![expect(clippy::unwrap_used, reason = "its cases are functions of their own")]

#[path = "liar/answers.rs"]
mod answers;
#[path = "liar/births.rs"]
mod births;
#[path = "liar/ends.rs"]
mod ends;
#[path = "liar/floods.rs"]
mod floods;
#[path = "liar/pod.rs"]
mod pod;

use std::any::type_name;
use std::process::Command;
use std::thread;

use tests::node::step;

/// A case's path, and what it does.
type Case = (&'static str, Box<dyn FnOnce() + Send>);

fn case<C: FnOnce() + Send + 'static>(case: C) -> Case {
    (type_name::<C>(), Box::new(case))
}

/// Runs cases at the same time, where what they mount is seen by no other process of the host.
fn alone(cases: Vec<Case>) {
    let all = thread::spawn(move || {
        // SAFETY: it changes nothing but which mounts this thread sees, and those it starts.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        assert_eq!(result, 0, "mounts of their own need root");
        let mount = |words: &[&str]| {
            let status = Command::new("mount").args(words).status();
            assert!(status.unwrap().success(), "mount {words:?}");
        };
        mount(&["--make-rprivate", "/"]);
        // The shim is not to wait for the turns of other pods on this host.
        mount(&["-t", "tmpfs", "none", "/sys/module"]);
        let start = |(path, case)| (path, thread::spawn(move || step(path, case)));
        let threads: Vec<_> = cases.into_iter().map(start).collect();
        let ended = threads
            .into_iter()
            .map(|(path, thread)| (path, thread.join()));
        let failed = ended.filter(|(_, result)| result.is_err());
        let failed: Vec<_> = failed.map(|(path, _)| path).collect();
        assert!(failed.is_empty(), "{failed:?}");
    });
    if let Err(panic) = all.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_pod_ends_whatever_its_guest_does() {
    alone(vec![
        case(ends::that_ignore_kills),
        case(ends::that_do_not_answer_kills),
        case(ends::that_fall_silent),
        case(ends::that_do_not_say_farewell),
        case(ends::that_do_not_read),
        case(ends::that_hang_while_they_grow),
        case(ends::that_hang_while_they_start),
        case(ends::that_leave_an_heir),
        case(ends::that_take_no_input),
        case(ends::that_print_for_ever),
    ]);
}

#[test]
fn answers_that_are_wrong_fail_their_call_alone() {
    alone(vec![
        case(answers::of_orders),
        case(answers::of_containers),
        case(answers::of_removals),
        case(answers::of_streams),
        case(answers::of_statuses),
        case(answers::of_figures),
    ]);
}

#[test]
fn no_pod_is_made_of_a_guest_that_lies() {
    alone(vec![
        case(births::from_failing_guests),
        case(births::from_stalling_guests),
        case(births::from_guests_that_come_late),
    ]);
}

#[test]
fn the_shim_stays_small_in_a_flood() {
    alone(vec![
        case(floods::of_ooms),
        case(floods::of_answers),
        case(floods::of_console_lines),
    ]);
}
