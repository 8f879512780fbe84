//! What podvmm and its guest print, as far as it goes into the shim's log.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How much of what others say is put into the log: a node's disk is not theirs to fill.
struct Budget {
    lines: f64,
    last: Instant,
}

impl Budget {
    /// The most lines that are logged at once.
    const MOST: f64 = 500.0;
    const PER_SECOND: f64 = 1.0;

    fn new() -> Self {
        Self {
            lines: Self::MOST,
            last: Instant::now(),
        }
    }

    /// Whether there is room for one more line.
    fn spend(&mut self) -> bool {
        let more = self.last.elapsed().as_secs_f64() * Self::PER_SECOND;
        self.last = Instant::now();
        self.lines = (self.lines + more).min(Self::MOST);
        if self.lines < 1.0 {
            return false;
        }
        self.lines -= 1.0;
        true
    }
}

/// The longest line that is logged as one, in bytes.
const MAX_LINE_LEN: usize = 1024;

/// The next line, or as much of it as there may be in one; `None` at the end. A guest may print what it
/// likes, as long as it likes, and its console gives it away a character at a time.
fn next_line(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let room = u64::try_from(MAX_LINE_LEN).expect("it is small");
    match reader.by_ref().take(room).read_until(b'\n', &mut line) {
        Ok(0) => None,
        Err(_) if line.is_empty() => None,
        _ => Some(line),
    }
}

/// A stream whose lines are put into the log, until it ends.
#[derive(Debug)]
pub(super) struct Lines(Receiver<()>);

impl Lines {
    /// Waits until all of them are in the log, but not for ever: another process may hold the stream open.
    pub(super) fn end(self) {
        // Nothing is sent: the other end is dropped with the stream.
        let _ = self.0.recv_timeout(LAST_LINES);
    }
}

/// How long the last lines of a process that has ended may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Puts the lines of a stream into the log, on a thread of its own.
pub(super) fn log_lines(who: &'static str, from: impl io::Read + Send + 'static) -> Option<Lines> {
    let (goes_on, ended) = channel::<()>();
    let copy = move || {
        let _goes_on = goes_on;
        let mut reader = BufReader::with_capacity(1024, from);
        let mut budget = Budget::new();
        while let Some(line) = next_line(&mut reader) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if !text.is_empty() && budget.spend() {
                log::info!("{who}: {}", text.escape_debug());
            }
        }
    };
    let thread = thread::Builder::new().name(who.into()).stack_size(64 << 10);
    thread.spawn(copy).ok().map(|_| Lines(ended))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_does_not_fill_the_log() {
        let mut budget = Budget::new();
        let said = (0..100_000).filter(|_| budget.spend()).count();
        assert!((500..600).contains(&said), "{said}");
    }

    /// Gives a byte at a time, as a console does.
    struct Slow<'a>(&'a [u8]);

    impl io::Read for Slow<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.0.read(&mut bytes[..1])
        }
    }

    #[test]
    fn a_line_is_one_however_slowly_it_comes() {
        let long = [b'x'; MAX_LINE_LEN + 3];
        let said = [b"Oops: 0000\n\nRIP\n", &long[..], b"\nlast"].concat();
        let mut reader = BufReader::new(Slow(&said));
        let lines = std::iter::from_fn(|| next_line(&mut reader));
        let lines: Vec<_> = lines.map(|line| (line.len(), line[0])).collect();
        let long = (MAX_LINE_LEN, b'x');
        let expected = [
            (11, b'O'),
            (1, b'\n'),
            (4, b'R'),
            long,
            (4, b'x'),
            (4, b'l'),
        ];
        assert_eq!(lines, expected);
    }
}
