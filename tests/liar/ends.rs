//! Guests that do not end, or not what they are told to.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use protocol::containerd::task::PidResponse;
use serde_json::json;
use tests::node::eventually;

use crate::answers::{drain, resize_terminal, stays_small, update};
use crate::pod::{DEADLINE, Pod, fifo};

/// The shim ends a guest's VM so long after a SIGKILL that ends no process.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// The shim ends a guest's VM that has said nothing for so long: it looks each 10 s, and then waits for 30.
const SILENCE: Duration = Duration::from_secs(40);

/// A pod ends with a SIGKILL, though its guest keeps the process, or does not tell its end.
pub(crate) fn that_ignore_kills() {
    let lies = [
        ("undying", "death=it*"),
        ("silent-wait", "WaitProcess=never*"),
        ("false-wait", "WaitProcess=garbage*"),
        ("refused-wait", "WaitProcess=refused*"),
        ("open-output", "ReadStdout=never*"),
        ("false-signal", "SignalProcess=garbage*"),
        ("refused-signal", "SignalProcess=refused*"),
        ("missing-signal", "SignalProcess=missing*"),
        ("endless-signal", "SignalProcess=endless"),
    ];
    each(&lies, |pod| {
        // A guest may refuse it, as one that has forgotten the process does.
        let _ = pod.kill(&pod.id, "", 9);
        let status = pod.wait(&pod.id, "", LAST_PATIENCE + DEADLINE);
        assert_eq!(status, 137, "{}", pod.id);
        pod.end();
    });
}

/// A signal that is not answered in time, or not at all, is the end of the VM.
pub(crate) fn that_do_not_answer_kills() {
    let lies = [
        ("no-signal", "SignalProcess=never*"),
        ("late-signal", "SignalProcess=late:7000"),
        ("announced-signal", "SignalProcess=announced"),
        ("half-signal", "SignalProcess=half"),
        ("closed-signal", "SignalProcess=closed"),
        ("deaf-signal", "SignalProcess=deaf"),
    ];
    each(&lies, |pod| {
        pod.kill(&pod.id, "", 9).unwrap();
        assert_eq!(pod.wait(&pod.id, "", DEADLINE), 137, "{}", pod.id);
        pod.end();
    });
}

/// A guest that says nothing any more, or hangs up, is found out without being asked.
pub(crate) fn that_fall_silent() {
    let lies = [
        // It does not follow the clock, and is asked how it is instead.
        ("heart", "GetGuestDetails=says:;Check=honest,never*"),
        ("hung-up", "TtyWinResize=closed"),
        ("swallowed", "TtyWinResize=announced"),
        ("flooded", "TtyWinResize=endless"),
        ("gone-deaf", "TtyWinResize=deaf"),
    ];
    each(&lies, |pod| {
        thread::scope(|scope| {
            scope.spawn(|| resize_terminal(&pod, SILENCE + DEADLINE));
            assert_eq!(pod.wait(&pod.id, "", SILENCE + DEADLINE), 137, "{}", pod.id);
        });
        eventually("its end is told", || pod.exits().len() == 1);
        pod.end();
    });
}

/// The last words of a guest are not waited for long.
pub(crate) fn that_do_not_say_farewell() {
    let lies = [
        ("never", "DestroySandbox=never"),
        ("garbage", "DestroySandbox=garbage"),
        ("refused", "DestroySandbox=refused"),
        ("announced", "DestroySandbox=announced"),
        ("endless", "DestroySandbox=endless"),
        ("closed", "DestroySandbox=closed"),
        ("half", "DestroySandbox=half"),
        ("late", "DestroySandbox=late:5000"),
        ("deaf", "DestroySandbox=deaf"),
    ];
    each(&lies, |pod| {
        let began = Instant::now();
        pod.end();
        assert!(began.elapsed() < DEADLINE);
    });
}

/// A guest that reads nothing any more, with as much on the way to it as there is room for, does not keep its pod
/// from being killed.
pub(crate) fn that_do_not_read() {
    let lies = [
        ("deaf-killed", "WriteStdin=deaf"),
        ("deaf-shut", "WriteStdin=deaf"),
    ];
    each(&lies, |pod| {
        let mut inputs = Vec::new();
        for number in 0..12 {
            let path = pod.folder().join(format!("in{number}"));
            inputs.push((fifo(&path), path));
        }
        for (number, (_, path)) in inputs.iter().enumerate() {
            pod.exec(&format!("reads{number}"), [path.to_str().unwrap(), ""])
                .unwrap();
        }
        for (input, _) in &mut inputs {
            input.write_all(&[b'x'; 60 << 10]).unwrap();
        }
        thread::sleep(Duration::from_secs(1));
        if pod.id == "deaf-shut" {
            return pod.shut_down();
        }
        pod.kill(&pod.id, "", 9).unwrap();
        assert_eq!(pod.wait(&pod.id, "", DEADLINE), 137);
        pod.end();
    });
}

/// What hangs while the VM's size changes does not keep the pod from its end.
pub(crate) fn that_hang_while_they_grow() {
    let lies = [
        ("grows-shut", "OnlineCPUMem=never"),
        ("grows-killed", "OnlineCPUMem=never"),
    ];
    each(&lies, |pod| {
        let mut vmm = None;
        thread::scope(|scope| {
            let grown = scope
                .spawn(|| update(&pod, &json!({"cpu": {"quota": 400_000, "period": 100_000}})));
            thread::sleep(Duration::from_millis(500));
            assert!(!grown.is_finished());
            if pod.id == "grows-killed" {
                pod.kill(&pod.id, "", 9).unwrap();
                assert_eq!(pod.wait(&pod.id, "", DEADLINE), 137);
                pod.delete(&pod.id, "").unwrap();
            }
            vmm = pod.order_shutdown();
            grown.join().unwrap().unwrap_err();
        });
        pod.leaves_nothing(vmm);
    });
}

/// A process that is being started when it is killed.
pub(crate) fn that_hang_while_they_start() {
    let pod = Pod::start("starts", "StartContainer=never");
    pod.create(&pod.id).unwrap();
    let start = || {
        let request = pod.process(&pod.id, "");
        pod.ask_within::<PidResponse>("Start", &request, LAST_PATIENCE + DEADLINE)
    };
    thread::scope(|scope| {
        let started = scope.spawn(start);
        thread::sleep(Duration::from_millis(300));
        pod.kill(&pod.id, "", 9).unwrap();
        // It has not started, and has been killed.
        let status = pod.wait(&pod.id, "", LAST_PATIENCE + DEADLINE);
        assert!([127, 137].contains(&status), "{status}");
        started.join().unwrap().unwrap_err();
    });
    pod.end();
}

/// A process that holds the console of its VMM open after that has ended.
pub(crate) fn that_leave_an_heir() {
    let pod = Pod::running("heir", "console=heir");
    pod.kill(&pod.id, "", 9).unwrap();
    pod.end();
}

/// Execs whose guest tells their end, but takes no input, leave nothing with the shim.
pub(crate) fn that_take_no_input() {
    let pod = Pod::running("greedy", "WriteStdin=never*");
    let before = pod.holds();
    for number in 0..20 {
        let path = pod.folder().join(format!("in{number}"));
        let mut input = fifo(&path);
        input.write_all(b"some").unwrap();
        let exec = format!("exit{number}");
        pod.exec(&exec, [path.to_str().unwrap(), ""]).unwrap();
        pod.wait(&pod.id, &exec, DEADLINE);
        pod.delete(&pod.id, &exec).unwrap();
    }
    stays_small("input", &pod, before);
    pod.end();
}

/// Output without an end, whether it is read or not.
pub(crate) fn that_print_for_ever() {
    let lies = "ReadStdout=honest,bytes:32768*";
    each(
        &[("printing-read", lies), ("printing-unread", lies)],
        |pod| {
            let before = pod.holds();
            let path = pod.folder().join("out");
            let output = fifo(&path);
            let unread = match pod.id.as_str() {
                "printing-read" => {
                    drain(output);
                    None
                }
                _ => Some(output),
            };
            pod.exec("prints", ["", path.to_str().unwrap()]).unwrap();
            thread::sleep(Duration::from_secs(1));
            stays_small(&pod.id, &pod, before);
            pod.kill(&pod.id, "prints", 9).unwrap();
            let status = pod.wait(&pod.id, "prints", LAST_PATIENCE + DEADLINE);
            assert_eq!(status, 137);
            drop(unread);
            pod.end();
        },
    );
}

/// Starts a pod for each of the names and lies at the same time, and does the same with all.
fn each(lies: &[(&str, &str)], act: impl Fn(Pod) + Sync) {
    thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = lies
            .iter()
            .map(|(id, lies)| scope.spawn(move || act(Pod::running(id, lies))))
            .collect();
        let ended = threads.into_iter().map(thread::ScopedJoinHandle::join);
        let failed = ended.filter(Result::is_err).count();
        assert_eq!(failed, 0, "of {} guests", lies.len());
    });
}
