//! What happens to a VM, as it happens: a line of JSON for each event, for the program that watches
//! a pod.
//!
//! Written by `control` alone. The form is Cloud Hypervisor's event monitor's, one event a line.

use std::fs::File;
use std::io::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

/// Where events go.
#[derive(Debug)]
pub(crate) struct Events {
    output: Option<File>,
    started: Instant,
}

impl Events {
    /// Writes them to `output`, if there is one. Times count from now.
    pub(crate) fn new(output: Option<File>) -> Self {
        Self {
            output,
            started: Instant::now(),
        }
    }

    /// Tells that something happened to the VM.
    pub(crate) fn vm(&mut self, event: &str, properties: Value) {
        self.write("vm", event, properties);
    }

    /// Tells that something happened to podvmm.
    pub(crate) fn vmm(&mut self, event: &str) {
        self.write("vmm", event, Value::Null);
    }

    fn write(&mut self, source: &str, event: &str, properties: Value) {
        log::debug!("event: {source} {event} {properties}");
        let Some(output) = &mut self.output else {
            return;
        };
        let since = self.started.elapsed();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = json!({
            "timestamp": {"secs": since.as_secs(), "nanos": since.subsec_nanos()},
            "time": now.unwrap_or_default().as_secs_f64(),
            "source": source,
            "event": event,
            "properties": properties,
        });
        // A pipe that no process empties must not hold up the VM.
        let mut room = [PollFd::new(output, PollFlags::OUT)];
        let now = rustix::time::Timespec::default();
        if rustix::event::poll(&mut room, Some(&now)) == Ok(0) {
            log::warn!("no process takes the events; lost: {source} {event}");
            return;
        }
        // In one call, so that a reader of a pipe or of the file's end gets whole lines.
        if let Err(error) = output.write_all(format!("{line}\n").as_bytes()) {
            log::warn!("events go nowhere from now on: {error}");
            self.output = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    #[test]
    fn each_event_is_a_line() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut events = Events::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        events.vmm("started");
        events.vm("resized", json!({"desired_vcpus": 2}));
        drop(events);
        let lines: Vec<Value> = BufReader::new(reader)
            .lines()
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["source"], "vmm");
        assert_eq!(lines[1]["event"], "resized");
        assert_eq!(lines[1]["properties"]["desired_vcpus"], 2);
        assert!(lines[1]["time"].as_f64().unwrap() > 1e9);
    }

    #[test]
    fn a_reader_that_sleeps_does_not_hold_up_the_vm() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut events = Events::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        // Far more than a pipe holds.
        (0..10_000).for_each(|_| events.vmm("started"));
        assert!(events.output.is_some());
    }

    #[test]
    fn a_reader_that_left_ends_nothing() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut events = Events::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        events.vmm("started");
        assert!(events.output.is_none());
        events.vmm("exiting");
    }
}
