//! Guests that say far too much.

use std::thread;
use std::time::Duration;

use prost::Message;
use protocol::agent::messages::OomEvent;

use crate::answers::{stats, stays_small};
use crate::pod::Pod;

/// Each container that runs out of memory all the time, or is none of the pod's.
pub(crate) fn of_ooms() {
    let said = |container: &str| {
        let event = OomEvent {
            container_id: container.into(),
        };
        let bytes: String = event
            .encode_to_vec()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("says:{bytes}")
    };
    let strange = ["", "../..", "a\nb", "\0", "other"].map(said);
    let lies = format!(
        "GetOOMEvent={},{},large,{}*",
        strange.join(","),
        said("oom"),
        said("oom")
    );
    let pod = Pod::running("oom", &lies);
    let before = pod.holds();
    thread::sleep(Duration::from_secs(5));
    // Of one that is too long it hears no more.
    assert_eq!(pod.events("/tasks/oom", "oom"), 1);
    stays_small("ooms", &pod, before);
    pod.end();
    let pod = Pod::running("oom", &format!("GetOOMEvent={}*", said("oom")));
    thread::sleep(Duration::from_secs(5));
    let told = pod.events("/tasks/oom", "oom");
    assert!((1..=30).contains(&told), "{told}");
    pod.end();
}

/// A million answers that were not asked for.
pub(crate) fn of_answers() {
    let pod = Pod::running("answers", "StatsContainer=flood:1000000,honest");
    let before = pod.holds();
    stats(&pod).unwrap();
    stats(&pod).unwrap();
    stays_small("answers", &pod, before);
    pod.end();
}

/// The console of the guest, in lines without an end, and one line without an end.
pub(crate) fn of_console_lines() {
    for lie in ["lines", "line"] {
        let pod = Pod::running(lie, &format!("console={lie}"));
        let before = pod.holds();
        thread::sleep(Duration::from_secs(3));
        stays_small(lie, &pod, before);
        let said = pod
            .log()
            .iter()
            .filter(|line| line.contains("guest: "))
            .count();
        // What the log cannot take at once is lost.
        assert!((1..=520).contains(&said), "{lie}: {said}");
        pod.end();
    }
}
