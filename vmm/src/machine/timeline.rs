//! How long the phases of a start take.

use std::time::{Duration, Instant};

use serde_json::Value;

/// How long each phase of a start took.
#[derive(Clone, Debug)]
pub(crate) struct Timeline {
    last: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl Timeline {
    /// A timeline whose first phase begins now.
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            phases: Vec::with_capacity(8),
        }
    }

    /// The phase ends and the next one begins.
    pub(crate) fn mark(&mut self, phase: &'static str) {
        let now = Instant::now();
        self.phases.push((phase, now.duration_since(self.last)));
        self.last = now;
    }

    /// Microseconds of each phase, by its name.
    pub(crate) fn json(&self) -> Value {
        let phases = self.phases.iter().map(|(phase, took)| {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            ((*phase).to_owned(), micros.into())
        });
        Value::Object(phases.collect())
    }
}
