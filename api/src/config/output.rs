//! Where consoles print.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, HostPath};

/// Where a serial port's or console's bytes go, and come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode")]
pub enum Output {
    /// There is no such device.
    Off,
    /// The device is there; what it prints is kept only for the message of a crash.
    Null,
    /// podvmm's own terminal or standard streams.
    Tty,
    /// What is printed is appended to a file.
    File {
        /// Path of the file.
        file: PathBuf,
    },
    /// A unix socket that is listened on, for one client at a time.
    Socket {
        /// Path of the socket.
        socket: PathBuf,
    },
}

impl Output {
    /// The path of the host's that podvmm opens for it.
    pub(super) fn host_path(&self) -> Option<HostPath> {
        match self {
            Self::Off | Self::Null | Self::Tty => None,
            Self::File { file } => Some(HostPath::write(file)),
            Self::Socket { socket } => Some(HostPath::socket(socket)),
        }
    }
}

impl FromStr for Output {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let path = |path: &str| PathBuf::from(path);
        match text.split_once('=') {
            None if text == "off" => Ok(Self::Off),
            None if text == "null" => Ok(Self::Null),
            None if text == "tty" => Ok(Self::Tty),
            Some(("file", file)) if !file.is_empty() => Ok(Self::File { file: path(file) }),
            Some(("socket", socket)) if !socket.is_empty() => Ok(Self::Socket {
                socket: path(socket),
            }),
            _ => Err(ConfigError::Output(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::printed;

    #[test]
    fn outputs_are_off_null_tty_a_file_or_a_socket() {
        let texts = ["off", "null", "tty", "file=/x", "socket=/x"];
        let outputs = texts.map(|text| text.parse::<Output>().unwrap());
        assert_eq!(
            outputs,
            [
                Output::Off,
                Output::Null,
                Output::Tty,
                Output::File { file: "/x".into() },
                Output::Socket {
                    socket: "/x".into()
                },
            ]
        );
        assert_eq!(
            printed(&"file=".parse::<Output>().unwrap_err()),
            "'file=' is none of off, null, tty, file=PATH, socket=PATH"
        );
    }
}
