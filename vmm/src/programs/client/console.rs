//! `podvmm api console`: this terminal as a guest's, over the socket of its console.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::Builder;

use serde_json::Value;
use thiserror::Error;

use crate::host::terminal::RawTerminal;

/// Ctrl-] leaves, as it does telnet.
const LEAVE: u8 = 0x1d;

/// Why there is no console to be on.
#[derive(Debug, Error)]
pub(crate) enum ConsoleError {
    /// The VM was defined without a console on a socket.
    #[error("neither console nor serial has mode Socket")]
    None,
    /// The console's socket cannot be connected to.
    #[error("connect to {}", .path.display())]
    Connect {
        /// Path of the console's socket.
        path: PathBuf,
        source: io::Error,
    },
    /// The terminal, or the socket.
    #[error("be on the console")]
    Relay(#[source] io::Error),
}

/// Joins standard input and output with a console of the VM that `info` is of, until the guest or
/// the user leaves.
pub(crate) fn run(info: &Value) -> Result<(), ConsoleError> {
    let path = socket(info).ok_or(ConsoleError::None)?;
    let stream = UnixStream::connect(&path);
    let stream = stream.map_err(|source| ConsoleError::Connect { path, source })?;
    let terminal = RawTerminal::enter().map_err(ConsoleError::Relay)?;
    if terminal.is_some() {
        eprint!("Ctrl-] leaves.\r\n");
    }
    relay(stream, io::stdin().is_terminal()).map_err(ConsoleError::Relay)
}

fn socket(info: &Value) -> Option<PathBuf> {
    let config = &info["config"];
    let ends = [&config["console"], &config["serial"]];
    let end = ends.into_iter().find(|end| end["mode"] == "Socket")?;
    end["socket"].as_str().map(PathBuf::from)
}

fn relay(mut stream: UnixStream, can_leave: bool) -> io::Result<()> {
    let typed = stream.try_clone()?;
    // When all is over, the new thread still waits for a key, so no thread waits for its end.
    Builder::new().spawn(move || pass_on(typed, can_leave))?;
    let mut printed = [0; 4 << 10];
    let mut out = io::stdout();
    loop {
        match stream.read(&mut printed) {
            Ok(0) => return Ok(()),
            Ok(count) => out.write_all(&printed[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        out.flush()?;
    }
}

/// Types what comes from standard input. When that ends, what the guest prints is still shown.
fn pass_on(mut stream: UnixStream, can_leave: bool) {
    let mut typed = [0; 1 << 10];
    while let Ok(count @ 1..) = io::stdin().read(&mut typed) {
        let bytes = &typed[..count];
        let leaves = bytes.iter().position(|byte| can_leave && *byte == LEAVE);
        let passed = stream.write_all(&bytes[..leaves.unwrap_or(count)]);
        if leaves.is_some() || passed.is_err() {
            // The other thread sees the end.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_console_is_found_before_the_serial_port() {
        let at = |path: &str| json!({"mode": "Socket", "socket": path});
        let off = json!({"mode": "Off"});
        let find = |console: &Value, serial: &Value| {
            socket(&json!({"config": {"console": console, "serial": serial}}))
        };
        assert_eq!(find(&at("/c"), &at("/s")), Some("/c".into()));
        assert_eq!(find(&off, &at("/s")), Some("/s".into()));
        assert_eq!(find(&off, &off), None);
    }
}
