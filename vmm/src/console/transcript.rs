//! The last words of a guest: what its consoles printed most recently, kept for
//! the message that explains a crash.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard};

/// Enough for a kernel's panic and its call trace.
const KEPT_BYTES: usize = 8 << 10;

/// How Linux begins its last message.
const PANIC: &str = "Kernel panic - not syncing: ";

/// A window on the end of what was printed. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transcript {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Transcript {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes
            .lock()
            .expect("no thread panics while it holds the transcript")
    }

    /// What a panicking kernel gave as the reason, if one did.
    pub(crate) fn panic(&self) -> Option<String> {
        let bytes = self.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let reason = text.rsplit_once(PANIC)?.1.lines().next()?;
        Some(printable(reason))
    }

    /// The last lines, fit for a terminal.
    pub(crate) fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes = self.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text
            .lines()
            .map(printable)
            .filter(|line| !line.is_empty())
            .collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

/// The guest is hostile to terminals, too: no control characters.
fn printable(line: &str) -> String {
    line.chars()
        .filter(|char| !char.is_control())
        .collect::<String>()
        .trim_end()
        .into()
}

impl Write for Transcript {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.bytes();
        let recent = &data[data.len().saturating_sub(KEPT_BYTES)..];
        bytes.extend_from_slice(recent);
        // Make room rarely, a window's worth at a time.
        if bytes.len() > 2 * KEPT_BYTES {
            let old = bytes.len() - KEPT_BYTES;
            bytes.drain(..old);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to a transcript and on to another output.
#[derive(Debug)]
pub(crate) struct Recorded<W> {
    pub transcript: Transcript,
    pub(crate) output: W,
}

impl<W: Write> Write for Recorded<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.output.write(data)?;
        self.transcript.write_all(&data[..written])?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(text: &str) -> Transcript {
        let mut transcript = Transcript::default();
        transcript.write_all(text.as_bytes()).unwrap();
        transcript
    }

    #[test]
    fn a_panic_is_found_by_its_first_words() {
        let transcript =
            transcript("[ 1.0] Kernel panic - not syncing: No init\r\n[ 1.0] CPU: 0\n");
        assert_eq!(transcript.panic().as_deref(), Some("No init"));
    }

    #[test]
    fn no_panic_is_no_panic() {
        assert_eq!(transcript("all is well\n").panic(), None);
    }

    #[test]
    fn control_characters_do_not_reach_the_reader() {
        assert_eq!(transcript("a\x1b[2Jb\r\n\n").last_lines(3), ["a[2Jb"]);
    }

    #[test]
    fn only_the_end_is_kept() {
        let mut transcript = Transcript::default();
        transcript.write_all(&vec![b'x'; 1 << 20]).unwrap();
        transcript.write_all(b"\nend").unwrap();
        assert!(transcript.bytes().len() <= 2 * KEPT_BYTES);
        assert_eq!(transcript.last_lines(1), ["end"]);
    }
}
