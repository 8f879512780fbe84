//! `podvmm api top`: what a VM is doing, second by second.

use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::Value;

use crate::programs::client::CallError;

const EVERY: Duration = Duration::from_secs(1);

/// Prints what each device and the vCPUs did in the last second, until `out` or podvmm is gone.
pub(crate) fn run(client: &mut Client, out: &mut impl Write) -> Result<(), CallError> {
    let mut counters = || -> Result<(Instant, Value), CallError> {
        let counters = client.counters()?;
        Ok((Instant::now(), counters))
    };
    let (mut then, mut before) = counters()?;
    loop {
        thread::sleep(EVERY);
        let (now, after) = counters()?;
        let seconds = now.duration_since(then).as_secs_f64();
        match out.write_all(table(&before, &after, seconds).as_bytes()) {
            // The process that read the output wants no more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(CallError::Print)?,
        }
        (then, before) = (now, after);
    }
}

/// A line for each part that did something, with what and how often a second.
fn table(before: &Value, after: &Value, seconds: f64) -> String {
    let mut text = String::new();
    for (part, counters) in after.as_object().into_iter().flatten() {
        let mut line = format!("{part:10}");
        let idle = line.len();
        for (name, count) in counters.as_object().into_iter().flatten() {
            let then = before[part][name].as_u64().unwrap_or(0);
            let grown = count.as_u64().unwrap_or(0).saturating_sub(then);
            if grown > 0 {
                let grown = u32::try_from(grown).map_or(f64::INFINITY, f64::from);
                line.push_str(&format!(" {name} {:.0}/s", grown / seconds));
            }
        }
        if line.len() > idle {
            text.push_str(&line);
            text.push('\n');
        }
    }
    if text.is_empty() {
        text.push_str("idle\n");
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_happened_is_shown() {
        let before = json!({"rng": {"kicks": 3, "errors": 0}, "net0": {"kicks": 5}});
        let after = json!({"rng": {"kicks": 7, "errors": 0}, "net0": {"kicks": 5}});
        assert_eq!(table(&before, &after, 2.0), "rng        kicks 2/s\n\n");
        assert_eq!(table(&after, &after, 1.0), "idle\n\n");
    }
}
