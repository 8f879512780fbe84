//! What the guest and its monitor agree on, for both sides to use: names of files and ports, and
//! the lines of the status port. `docs/guest-contract.md` tells the whole agreement.

use std::fmt;
use std::str::FromStr;

/// The kernel parameter with which the agent serves a pod's containers.
pub const POD_PARAMETER: &str = "podvmm.pod";

/// The tag of a pod's share.
pub const SHARE_TAG: &str = "kataShared";

/// Where the agent mounts a pod's share.
pub const SHARED: &str = "/run/kata-containers/shared/containers";

/// Where the agent keeps what is the pod's alone, such as its shared memory.
pub const SANDBOX: &str = "/run/kata-containers/sandbox";

/// The command to run: its arguments, each ended by a NUL byte. Absent or empty: a shell on the
/// console.
pub const ARGV_PATH: &str = "/podvmm/argv";

/// When present, the command gets a terminal of the size in it, `ROWS COLUMNS`, instead of pipes.
pub const TTY_PATH: &str = "/podvmm/tty";

/// What a pod's agent obeys, as [`Policy`](crate::policy::Policy) is printed. Absent: all that it is asked.
pub const POLICY_PATH: &str = "/podvmm/policy";

/// Names of the virtio-console ports. Each carries bytes one way only: a port whose host side is
/// closed, which is how the guest learns the end of its input, takes no output either (Linux,
/// `will_write_block()` in drivers/char/virtio_console.c).
pub mod port {
    /// Host to guest: the command's standard input.
    pub const STDIN: &str = "podvmm.stdin";
    /// Guest to host: the command's standard output, or its terminal's.
    pub const STDOUT: &str = "podvmm.stdout";
    /// Guest to host: the command's standard error; silent when it has a terminal.
    pub const STDERR: &str = "podvmm.stderr";
    /// Guest to host: lines of [`Status`](super::Status).
    pub const STATUS: &str = "podvmm.status";
}

/// A line of the status port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The command starts now.
    Ready,
    /// The command ended with this status (128 + N when signal N killed it), its output is in the
    /// queues of the output ports and the writable disks are unmounted or read-only.
    Exit(u8),
    /// The agent could not get as far, for this reason.
    Error(String),
}

impl fmt::Display for Status {
    /// The line, newline included.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready\n"),
            Self::Exit(status) => writeln!(f, "exit {status}"),
            Self::Error(reason) => writeln!(f, "error {}", reason.replace('\n', " ")),
        }
    }
}

/// A line that is no [`Status`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a status line of the agent: {0:?}")]
pub struct UnknownStatus(String);

impl FromStr for Status {
    type Err = UnknownStatus;

    /// Reads a line, with or without its newline.
    fn from_str(line: &str) -> Result<Self, UnknownStatus> {
        let line = line.strip_suffix('\n').unwrap_or(line);
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (word, rest.parse()) {
            ("ready", _) if rest.is_empty() => Ok(Self::Ready),
            ("exit", Ok(status)) => Ok(Self::Exit(status)),
            ("error", _) => Ok(Self::Error(rest.to_owned())),
            _ => Err(UnknownStatus(line.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_survives_the_wire() {
        for status in [
            Status::Ready,
            Status::Exit(0),
            Status::Exit(255),
            Status::Error("mount root file system /dev/vda: not found".to_owned()),
        ] {
            assert_eq!(status.to_string().parse(), Ok(status));
        }
    }

    #[test]
    fn an_error_is_one_line() {
        let status = Status::Error("first\nsecond".to_owned());
        assert_eq!(status.to_string(), "error first second\n");
    }

    #[test]
    fn what_the_agent_never_says_is_refused() {
        for line in ["", "exit", "exit 256", "exit -1", "ready now", "READY"] {
            assert_eq!(line.parse::<Status>(), Err(UnknownStatus(line.to_owned())));
        }
    }
}
