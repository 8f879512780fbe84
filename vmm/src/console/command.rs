//! Handing the guest a command to run, as docs/guest-contract.md says: its
//! arguments as a file beside the initramfs, its streams as ports of a console
//! device, its status as a line.

use protocol::contract::{ARGV_PATH, Status, TTY_PATH};

/// A command for the agent.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    /// Arguments of the command, the program first.
    pub argv: Vec<Vec<u8>>,
    /// Rows and columns of the terminal it is to have; pipes without.
    pub terminal: Option<(u16, u16)>,
}

impl Command {
    /// The files that tell the agent, by their paths in the guest.
    pub(crate) fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut arguments = Vec::new();
        for argument in &self.argv {
            arguments.extend_from_slice(argument);
            arguments.push(0);
        }
        let mut files = vec![(ARGV_PATH, arguments)];
        if let Some((rows, columns)) = self.terminal {
            files.push((TTY_PATH, format!("{rows} {columns}").into_bytes()));
        }
        files
    }
}

/// Turns bytes of the status port into lines and lines into [`Status`]: that the command starts, once,
/// and how it ended, once. Whatever else the guest writes there is dropped.
#[derive(Debug, Default)]
pub(crate) struct StatusParser {
    line: Vec<u8>,
    is_ready: bool,
    has_ended: bool,
}

impl StatusParser {
    /// A guest that never ends its line keeps no more than this.
    const MAX_LINE_BYTES: usize = 1024;

    /// Takes more bytes, calling `said` for each whole line that means something.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut said: impl FnMut(Status)) {
        for &byte in bytes {
            if byte == b'\n' {
                if let Some(status) = parse(&String::from_utf8_lossy(&self.line))
                    && self.is_news(&status)
                {
                    said(status);
                }
                self.line.clear();
            } else if self.line.len() < Self::MAX_LINE_BYTES {
                self.line.push(byte);
            }
        }
    }
}

impl StatusParser {
    /// Whether the guest has not said as much before.
    fn is_news(&mut self, status: &Status) -> bool {
        let said = match status {
            Status::Ready => &mut self.is_ready,
            Status::Exit(_) | Status::Error(_) => &mut self.has_ended,
        };
        !std::mem::replace(said, true)
    }
}

fn parse(line: &str) -> Option<Status> {
    match line.trim_end().parse().ok()? {
        Status::Error(text) => {
            let text = text.chars().filter(|char| !char.is_control());
            Some(Status::Error(text.collect()))
        }
        status => Some(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(parts: &[&[u8]]) -> Vec<Status> {
        let mut parser = StatusParser::default();
        let mut all = Vec::new();
        for part in parts {
            parser.feed(part, |status| all.push(status));
        }
        all
    }

    #[test]
    fn lines_may_come_in_pieces() {
        assert_eq!(
            said(&[b"rea", b"dy\nex", b"it 7\n"]),
            [Status::Ready, Status::Exit(7)]
        );
    }

    #[test]
    fn what_is_said_again_is_dropped() {
        assert_eq!(
            said(&[b"ready\nready\nready\nexit 7\nexit 8\nerror late\nready\n"]),
            [Status::Ready, Status::Exit(7)]
        );
    }

    #[test]
    fn nonsense_is_dropped() {
        assert_eq!(said(&[b"exit 256\nexit\n\xff\xfe\nready now\n"]), []);
    }

    #[test]
    fn an_endless_line_does_not_grow() {
        let mut parser = StatusParser::default();
        parser.feed(&[b'x'; 100_000], |_| {});
        assert_eq!(parser.line.len(), StatusParser::MAX_LINE_BYTES);
    }

    #[test]
    fn an_errors_control_characters_are_removed() {
        assert_eq!(
            said(&[b"error no \x1b[2Jroot\n"]),
            [Status::Error("no [2Jroot".into())]
        );
    }

    #[test]
    fn the_files_hold_arguments_and_terminal() {
        let argv = vec![b"a".to_vec(), b"b c".to_vec()];
        let command = Command {
            argv,
            terminal: Some((24, 80)),
        };
        let expected = [
            (ARGV_PATH, b"a\0b c\0".to_vec()),
            (TTY_PATH, b"24 80".to_vec()),
        ];
        assert_eq!(command.files(), expected);
    }
}
