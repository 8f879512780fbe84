//! The log: lines of the form containerd's own log has, into the FIFO it gives each shim.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::RwLock;

use log::{LevelFilter, Log, Metadata, Record};

/// The greatest length of a reason, in characters: a guest may have said it, at any length.
pub(crate) const MAX_TEXT_CHARS: usize = 4096;

static LOGGER: Logger = Logger(RwLock::new(Lines {
    fifo: None,
    pod: String::new(),
}));

struct Logger(RwLock<Lines>);

/// Where lines go.
struct Lines {
    /// The FIFO for the log. Without it, lines go to standard error.
    fifo: Option<File>,
    pod: String,
}

/// From now on logs what the pod `pod` is about, into the FIFO `log` of `bundle`; to standard error
/// without it.
pub(crate) fn start(bundle: Option<&Path>, pod: &str, level: LevelFilter) {
    // It is opened for reading too: then opening it does not wait for containerd, and what is
    // written while containerd is away is there when it comes back.
    let open = |path: &Path| {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        options.open(path.join("log")).ok()
    };
    let lines = Lines {
        fifo: bundle.and_then(open),
        pod: pod.into(),
    };
    *LOGGER.0.write().expect("a panic ends the process") = lines;
    log::set_max_level(level);
    // It is the only logger there is.
    let _ = log::set_logger(&LOGGER);
}

/// The longest line, in bytes: a FIFO takes all of it or none (pipe(7), PIPE_BUF). Half a line would swallow the next.
const MAX_LINE_LEN: usize = 4096;

/// A line with as much of `text` as there is room for: a guest may have said it, at any length.
fn line(level: &str, text: &str, pod: &str) -> String {
    let mut line = format!("level={level} msg=\"");
    let end = format!("\" pod={pod:?} runtime=podvmm\n");
    for c in text.chars() {
        let escaped = c.escape_debug();
        let len: usize = escaped.clone().map(char::len_utf8).sum();
        if line.len() + len + end.len() > MAX_LINE_LEN {
            break;
        }
        match c {
            '\'' => line.push(c),
            _ => line.extend(escaped),
        }
    }
    line + &end
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if record.level() > log::max_level() {
            return;
        }
        let level = match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warning",
            log::Level::Info => "info",
            log::Level::Debug => "debug",
            log::Level::Trace => "trace",
        };
        let lines = self.0.read().expect("a panic ends the process");
        let line = line(level, &record.args().to_string(), &lines.pod);
        // A line that cannot be written is lost: the pod is not to wait for its log.
        let _ = match &lines.fifo {
            Some(fifo) => {
                let mut fifo: &File = fifo;
                fifo.write_all(line.as_bytes())
            }
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_whatever_a_guest_said() {
        let said = line("info", "it's \"so\"\n", "p");
        let expected = "level=info msg=\"it's \\\"so\\\"\\n\" pod=\"p\" runtime=podvmm\n";
        assert_eq!(said, expected);
        for c in ["x", "\n", "\u{1}", "\u{10ffff}", "\u{1f980}", "\\"] {
            let said = line("info", &c.repeat(5000), "p");
            let is_full = (MAX_LINE_LEN - 10..=MAX_LINE_LEN).contains(&said.len());
            assert!(is_full, "{}", said.len());
            assert!(said.ends_with("\" pod=\"p\" runtime=podvmm\n"));
            assert_eq!(said.matches('\n').count(), 1);
        }
    }
}
