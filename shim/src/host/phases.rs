//! Where the time goes until a pod runs.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The moments between phases, from the shim's start on.
#[derive(Debug)]
pub(crate) struct Phases {
    last: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// The phases of a shim that was asked for at `asked`, by the wall clock.
    pub(crate) fn since(asked: SystemTime) -> Self {
        let shim = SystemTime::now().duration_since(asked).unwrap_or_default();
        Self {
            last: Instant::now(),
            phases: vec![("shim", shim)],
        }
    }

    /// The phase of this name has ended now. Only the first of a name counts.
    pub(crate) fn note(&mut self, name: &'static str) {
        let took = self.last.elapsed();
        self.last = Instant::now();
        if self.phases.iter().all(|(other, _)| *other != name) {
            self.phases.push((name, took));
        }
    }
}

impl fmt::Display for Phases {
    /// Writes the phases as a line of JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{\"phases_ms\":{")?;
        for (index, (name, took)) in self.phases.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}\"{name}\":{:.1}", took.as_secs_f64() * 1e3)?;
        }
        f.write_str("}}")
    }
}

/// A moment as text, for another process: nanoseconds since 1970.
pub(crate) fn to_text(moment: SystemTime) -> String {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().to_string()
}

/// The moment that [`to_text`] wrote.
pub(crate) fn from_text(text: &str) -> Option<SystemTime> {
    let nanos = text.parse().ok()?;
    UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_json() {
        let mut phases = Phases::since(SystemTime::now());
        phases.note("vmm");
        phases.note("vmm");
        let value: serde_json::Value = serde_json::from_str(&phases.to_string()).unwrap();
        assert_eq!(value["phases_ms"].as_object().unwrap().len(), 2);
    }

    #[test]
    fn moments_survive_as_text() {
        let now = SystemTime::now();
        assert_eq!(from_text(&to_text(now)), Some(now));
    }
}
