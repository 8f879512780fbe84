//! Handing the guest a command to run, as docs/guest-contract.md says: its
//! arguments as a file in the initramfs, its streams as ports of a console
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
    /// A cpio archive (newc) that tells the agent, to follow the initramfs.
    pub(crate) fn archive(&self) -> Vec<u8> {
        const DIRECTORY: u32 = 0o040_755;
        const FILE: u32 = 0o100_444;

        let mut arguments = Vec::new();
        for argument in &self.argv {
            arguments.extend_from_slice(argument);
            arguments.push(0);
        }
        let mut archive = Vec::new();
        append_entry(&mut archive, "podvmm", DIRECTORY, &[]);
        append_entry(&mut archive, name_of(ARGV_PATH), FILE, &arguments);
        if let Some((rows, columns)) = self.terminal {
            append_entry(
                &mut archive,
                name_of(TTY_PATH),
                FILE,
                format!("{rows} {columns}").as_bytes(),
            );
        }
        append_entry(&mut archive, "TRAILER!!!", 0, &[]);
        archive
    }
}

/// What the archive calls a file of the guest's root.
fn name_of(path: &str) -> &str {
    path.strip_prefix('/').unwrap_or(path)
}

/// One entry: a header of 13 numbers in hexadecimal, name and content, both
/// padded to 4 bytes (Linux, buffer-format.rst of early user space).
fn append_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let links = 1;
    let name_bytes = name.len() + 1;
    let numbers = [
        0, // inode
        mode as usize,
        0, // user
        0, // group
        links,
        0, // time
        content.len(),
        0, // device, major and minor
        0,
        0, // device node, major and minor
        0,
        name_bytes,
        0, // checksum
    ];
    archive.extend_from_slice(b"070701");
    for number in numbers {
        archive.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
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

    /// Name and content of every entry, as a reader of the format finds them.
    fn entries(mut archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let number =
            |bytes: &[u8]| usize::from_str_radix(std::str::from_utf8(bytes).unwrap(), 16).unwrap();
        let mut entries = Vec::new();
        while !archive.is_empty() {
            assert_eq!(&archive[..6], b"070701");
            let (content_bytes, name_bytes) = (number(&archive[54..62]), number(&archive[94..102]));
            let name = String::from_utf8(archive[110..110 + name_bytes - 1].to_vec()).unwrap();
            let content_at = (110 + name_bytes).next_multiple_of(4);
            let end = content_at + content_bytes;
            entries.push((name, archive[content_at..end].to_vec()));
            archive = &archive[end.next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn the_archive_holds_arguments_and_terminal() {
        let argv = vec![b"a".to_vec(), b"b c".to_vec()];
        let command = Command {
            argv,
            terminal: Some((24, 80)),
        };
        let expected: [(&str, &[u8]); 4] = [
            ("podvmm", b""),
            ("podvmm/argv", b"a\0b c\0"),
            ("podvmm/tty", b"24 80"),
            ("TRAILER!!!", b""),
        ];
        let expected = expected.map(|(name, content)| (name.to_owned(), content.to_vec()));
        assert_eq!(entries(&command.archive()), expected);
    }
}
