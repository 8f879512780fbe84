//! The command: what to run, with which environment, and its start.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use crate::sys;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("make the pipes of the command")]
    Pipes(#[source] io::Error),
    #[error("open a terminal for the command")]
    Terminal(#[source] io::Error),
    #[error("read {path}")]
    Read {
        path: &'static str,
        source: io::Error,
    },
    #[error("read {path}: not ROWS COLUMNS: {text:?}")]
    Size { path: &'static str, text: String },
    #[error("make a process for the command")]
    Spawn(#[source] io::Error),
}

/// A program and its arguments, the name it is called by first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Command {
    argv: Vec<CString>,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    rows: u16,
    columns: u16,
}

/// The agent's ends of the command's standard input, output and error.
#[derive(Debug)]
pub(crate) enum Streams {
    Pipes {
        stdin: PipeWriter,
        stdout: PipeReader,
        stderr: PipeReader,
    },
    Terminal(File),
}

impl Command {
    /// The command the monitor left, if it left one.
    pub(crate) fn read() -> Result<Option<Self>, Error> {
        Ok(read_if_there(protocol::contract::ARGV_PATH)?.and_then(|bytes| Self::parse(&bytes)))
    }

    /// Arguments each ended by NUL; for the last one the end will do.
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
        let argv = bytes.split(|&byte| byte == 0);
        let argv = argv
            .map(|arg| CString::new(arg).expect("was split at each NUL"))
            .collect();
        Some(Self { argv })
    }

    #[cfg(test)]
    pub(crate) fn new(argv: Vec<CString>) -> Self {
        Self { argv }
    }

    /// The shell for a user who gave no command.
    pub(crate) fn shell() -> Self {
        Self {
            argv: vec![c"/bin/sh".to_owned()],
        }
    }

    /// Starts it with pipes or, when there is a size for one, a terminal.
    pub(crate) fn start(&self, terminal: Option<Size>) -> Result<(sys::pid_t, Streams), Error> {
        if let Some(Size { rows, columns }) = terminal {
            let (master, slave) = sys::open_terminal(rows, columns).map_err(Error::Terminal)?;
            let pid = self.spawn([&slave, &slave, &slave], true)?;
            return Ok((pid, Streams::Terminal(File::from(master))));
        }
        let (child_stdin, stdin) = io::pipe().map_err(Error::Pipes)?;
        let (stdout, child_stdout) = io::pipe().map_err(Error::Pipes)?;
        let (stderr, child_stderr) = io::pipe().map_err(Error::Pipes)?;
        sys::set_nonblocking(stdin.as_fd()).map_err(Error::Pipes)?;
        let stdio: [OwnedFd; 3] = [child_stdin.into(), child_stdout.into(), child_stderr.into()];
        let pid = self.spawn(stdio.each_ref(), false)?;
        Ok((
            pid,
            Streams::Pipes {
                stdin,
                stdout,
                stderr,
            },
        ))
    }

    /// Starts it on the console, which the kernel has opened as the agent's standard streams.
    pub(crate) fn start_on_console(&self) -> Result<sys::pid_t, Error> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let streams: [&dyn AsFd; 3] = [&stdin, &stdout, &stderr];
        self.spawn_on(streams.map(AsFd::as_fd), true)
    }

    fn spawn(&self, stdio: [&OwnedFd; 3], terminal: bool) -> Result<sys::pid_t, Error> {
        self.spawn_on(stdio.map(AsFd::as_fd), terminal)
    }

    /// Starts it. When there is no such program, its process says so on its standard error and
    /// ends as shells tell it, with 127 or 126.
    fn spawn_on(
        &self,
        stdio: [std::os::fd::BorrowedFd<'_>; 3],
        terminal: bool,
    ) -> Result<sys::pid_t, Error> {
        let program = sys::Program {
            paths: &candidates(&self.argv[0]),
            argv: &self.argv,
            env: &[
                environment(std::env::var_os("TERM").as_deref()),
                sys::c_library(),
            ]
            .concat(),
            descriptors: &stdio,
            namespaces: 0,
            terminal,
        };
        let sys::Spawned { pid, failure } = sys::spawn(&program).map_err(Error::Spawn)?;
        if let Some(failure) = failure {
            let message = failure_message(&self.argv[0], &failure);
            let stderr = stdio[2].try_clone_to_owned().map(File::from);
            // Without the command's standard error the agent has nowhere to write this.
            let _ = stderr.and_then(|mut stderr| stderr.write_all(message.as_bytes()));
        }
        Ok(pid)
    }
}

impl Size {
    /// The size of the terminal the monitor wants, if it wants one.
    pub(crate) fn read() -> Result<Option<Self>, Error> {
        let path = protocol::contract::TTY_PATH;
        let Some(bytes) = read_if_there(path)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&bytes);
        let size = Self::parse(&text);
        size.map(Some).ok_or_else(|| Error::Size {
            path,
            text: text.into_owned(),
        })
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (rows, columns) = text.trim().split_once(' ')?;
        Some(Self {
            rows: rows.parse().ok()?,
            columns: columns.parse().ok()?,
        })
    }
}

fn read_if_there(path: &'static str) -> Result<Option<Vec<u8>>, Error> {
    match sys::read_file(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// Where a program of this name may be: itself if it has a slash, else below each of `PATH`.
fn candidates(name: &CStr) -> Vec<CString> {
    let bytes = name.to_bytes();
    if bytes.contains(&b'/') || bytes.is_empty() {
        return vec![name.to_owned()];
    }
    let path = |directory: &str| [directory.as_bytes(), b"/", bytes].concat();
    let paths = PATH.split(':').map(path);
    paths
        .map(|path| CString::new(path).expect("made of strings without NUL"))
        .collect()
}

/// What every program finds in its environment. TERM is what the kernel gave the agent: `linux`,
/// or what its command line says.
fn environment(term: Option<&OsStr>) -> Vec<CString> {
    let term = term.map_or(b"linux".as_slice(), OsStr::as_bytes);
    let variables = [
        format!("PATH={PATH}").into_bytes(),
        b"HOME=/root".to_vec(),
        [b"TERM=", term].concat(),
    ];
    let variables = variables.into_iter();
    variables
        .map(|text| CString::new(text).expect("made of strings without NUL"))
        .collect()
}

fn failure_message(name: &CStr, failure: &io::Error) -> String {
    const MAX_NAME_CHARS: usize = 200;
    let name = name.to_string_lossy();
    let name: String = name.chars().take(MAX_NAME_CHARS).collect();
    let reason = match failure.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => "command not found".to_owned(),
        Some(libc::EACCES) => "permission denied".to_owned(),
        Some(libc::ENOEXEC) => "not an executable".to_owned(),
        Some(libc::E2BIG) => "argument list too long".to_owned(),
        _ => failure.to_string(),
    };
    format!("podvmm: {name}: {reason}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(bytes: &[u8]) -> Option<Vec<CString>> {
        Command::parse(bytes).map(|command| command.argv)
    }

    #[test]
    fn arguments_end_at_each_nul() {
        let expected = vec![
            c"sh".to_owned(),
            c"-c".to_owned(),
            c"echo \xff\n".to_owned(),
        ];
        assert_eq!(argv(b"sh\0-c\0echo \xff\n\0"), Some(expected));
    }

    #[test]
    fn empty_arguments_are_kept() {
        assert_eq!(
            argv(b"printf\0\0"),
            Some(vec![c"printf".to_owned(), c"".to_owned()])
        );
        assert_eq!(argv(b"\0"), Some(vec![c"".to_owned()]));
    }

    #[test]
    fn the_last_nul_may_be_missing() {
        assert_eq!(argv(b"ls"), Some(vec![c"ls".to_owned()]));
    }

    #[test]
    fn no_arguments_mean_no_command() {
        assert_eq!(argv(b""), None);
    }

    #[test]
    fn a_name_with_a_slash_is_not_searched_for() {
        assert_eq!(candidates(c"./x"), [c"./x".to_owned()]);
        assert_eq!(candidates(c""), [c"".to_owned()]);
        assert_eq!(candidates(c"ls").last(), Some(&c"/bin/ls".to_owned()));
        assert_eq!(candidates(c"ls").len(), 6);
    }

    #[test]
    fn a_size_is_rows_and_columns() {
        assert_eq!(
            Size::parse("24 80\n"),
            Some(Size {
                rows: 24,
                columns: 80
            })
        );
        for text in ["", "24", "24 80 1", "-1 80", "70000 80", "24x80"] {
            assert_eq!(Size::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_failure_says_what_and_why() {
        let message = |name, errno| failure_message(name, &io::Error::from_raw_os_error(errno));
        assert_eq!(
            message(c"nosuch", libc::ENOENT),
            "podvmm: nosuch: command not found\n"
        );
        assert_eq!(
            message(c"/etc", libc::EACCES),
            "podvmm: /etc: permission denied\n"
        );
        let long = CString::new("x".repeat(5000)).unwrap();
        assert!(message(&long, libc::ENOENT).len() < 300);
    }
}
