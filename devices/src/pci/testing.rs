//! A host that remembers what it was asked for, for tests and fuzzers.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{Host, Message};

/// Delivers nothing: what is written to an event fd stays there for the test to read.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<Record>);

/// What is so at the moment.
#[derive(Debug, Default)]
pub struct Record {
    /// The messages of the vectors that are open.
    pub messages: BTreeMap<u16, Message>,
    /// The event fds by the addresses where they are written to.
    pub watched: BTreeMap<u64, RawFd>,
    /// The event fds of vectors that were ever open.
    pub events: BTreeMap<u16, EventFd>,
    /// Calls so far.
    pub calls: usize,
}

impl Recorder {
    pub fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Messages that were sent by vectors that are open, since the last time.
    pub fn sent(&self) -> u64 {
        let record = self.record();
        let open = record.messages.keys();
        let events = open.filter_map(|vector| record.events.get(vector));
        events.map(|event| event.read().unwrap_or(0)).sum()
    }

    fn called(&self) -> MutexGuard<'_, Record> {
        let mut record = self.record();
        record.calls += 1;
        record
    }
}

impl Host for Recorder {
    fn deliver(&self, vector: u16, event: &EventFd, message: Message) -> io::Result<()> {
        let mut record = self.called();
        record.events.insert(vector, event.try_clone()?);
        let before = record.messages.insert(vector, message);
        assert_eq!(before, None, "vector {vector} is open already");
        Ok(())
    }

    fn keep(&self, vector: u16, _: &EventFd) -> io::Result<()> {
        let before = self.called().messages.remove(&vector);
        assert!(before.is_some(), "vector {vector} is closed already");
        Ok(())
    }

    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let before = self.called().watched.insert(address, event.as_raw_fd());
        assert_eq!(before, None, "{address:#x} is watched already");
        Ok(())
    }

    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let before = self.called().watched.remove(&address);
        assert_eq!(
            before,
            Some(event.as_raw_fd()),
            "{address:#x} is not watched"
        );
        Ok(())
    }
}
