//! The log: lines of the form containerd's own log has, into the FIFO it gives each shim.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::RwLock;

use log::{LevelFilter, Log, Metadata, Record};

/// The greatest length of a line or a reason, in characters: a guest may have said it, at any
/// length.
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
        // A guest may have said it, at any length.
        let text: String = record
            .args()
            .to_string()
            .chars()
            .take(MAX_TEXT_CHARS)
            .collect();
        let lines = self.0.read().expect("a panic ends the process");
        let line = format!(
            "level={level} msg={text:?} pod={:?} runtime=podvmm\n",
            lines.pod
        );
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
