//! The host's ends of what the guest prints and reads: its serial port, its
//! virtio console, and the streams of the command it runs.

use std::fs::OpenOptions;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use api::Output as Destination;
use devices::host::{Input, Output, Progress};
use devices::virtio::console::Port;
use protocol::contract::port as name;
use thiserror::Error;

use crate::console::command::StatusParser;
use crate::console::socket::{SocketConsole, SocketConsoleError};
use crate::console::transcript::{Recorded, Transcript};
use crate::inbox::{Event, Inbox};

/// Why a stream could not be had.
#[derive(Debug, Error)]
pub(crate) enum StreamError {
    /// A console's file could not be opened.
    #[error("open {} for a console", .path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        source: io::Error,
    },
    /// A console's socket could not be served.
    #[error("serve a console")]
    Socket(#[from] SocketConsoleError),
    /// One of podvmm's own streams, or a console's, could not be used.
    #[error("use {0} for the guest")]
    Standard(&'static str, #[source] io::Error),
}

/// The host's end of a serial port or console.
pub(crate) struct HostEnd {
    /// What is typed at the host's end.
    pub(crate) input: Option<OwnedFd>,
    /// Where what is printed goes; `None` if it goes nowhere.
    output: Option<Output>,
    /// Joins the console to the client that connects, as long as this is kept.
    pub(crate) socket: Option<SocketConsole>,
}

impl HostEnd {
    /// Opens `destination`; `None` if there is to be no such device.
    pub(crate) fn open(destination: &Destination) -> Result<Option<Self>, StreamError> {
        let (input, output, socket) = match destination {
            Destination::Off => return Ok(None),
            Destination::Null => (None, None, None),
            Destination::Tty => {
                let input = own("standard input", io::stdin())?;
                (
                    Some(input),
                    Some(output("standard output", io::stdout())?),
                    None,
                )
            }
            Destination::File { file: path } => (None, Some(file(path)?), None),
            Destination::Socket { socket: path } => {
                let (guest, socket) = SocketConsole::start(path)?;
                let output = output("a console's socket", &guest)?;
                (Some(guest.into()), Some(output), Some(socket))
            }
        };
        Ok(Some(Self {
            input,
            output,
            socket,
        }))
    }

    /// Where a serial port prints. Everything is recorded in `transcript`.
    pub(crate) fn into_serial(self, transcript: &Transcript) -> Box<dyn Write + Send> {
        Box::new(Recorded {
            transcript: transcript.clone(),
            output: Hasty {
                output: self
                    .output
                    .unwrap_or_else(|| Output::sink(Box::new(io::sink()))),
                stuck: false,
            },
        })
    }

    /// The port of a virtio console. What it prints to nowhere is recorded in `transcript`.
    pub(crate) fn into_port(self, transcript: &Transcript) -> Result<Port, StreamError> {
        let input = self.input.map(Input::new).transpose();
        let input = input.map_err(|source| StreamError::Standard("a console's input", source))?;
        let unseen = || Output::sink(Box::new(transcript.clone()));
        Ok(Port {
            name: "podvmm.console".into(),
            console: true,
            input,
            output: Some(self.output.unwrap_or_else(unseen)),
        })
    }
}

/// The way to ask the agent to end its command.
#[derive(Debug)]
pub(crate) struct PowerButton(PipeWriter);

impl PowerButton {
    /// Does not wait for the guest. One that has not looked since the last times need not be told.
    pub(crate) fn press(&mut self) {
        let _ = self.0.write_all(b"power\n");
    }
}

/// The four ports of a command (docs/guest-contract.md, Ports), and the button that the last of them
/// carries. The port closes when the button is dropped.
pub(crate) fn command(inbox: Inbox) -> Result<([Port; 4], PowerButton), StreamError> {
    let port = |name: &str, input, output| Port {
        name: name.into(),
        console: false,
        input,
        output,
    };
    let mut parser = StatusParser::default();
    let status = Says(move |bytes: &[u8]| {
        parser.feed(bytes, |status| {
            // `control` no longer listens when the machine is being taken down.
            let _ = inbox.send(Event::Status(status));
        });
    });
    let stdin = Input::new(own("standard input", io::stdin())?);
    let stdin = stdin.map_err(|source| StreamError::Standard("standard input", source))?;
    let stdout = output("standard output", io::stdout())?;
    let stderr = output("standard error", io::stderr())?;
    let (pressed, button) =
        power_button().map_err(|source| StreamError::Standard("a pipe", source))?;
    let ports = [
        port(name::STDIN, Some(stdin), None),
        port(name::STDOUT, None, Some(stdout)),
        port(name::STDERR, None, Some(stderr)),
        port(
            name::STATUS,
            Some(pressed),
            Some(Output::sink(Box::new(status))),
        ),
    ];
    Ok((ports, button))
}

fn power_button() -> io::Result<(Input, PowerButton)> {
    let (pressed, button) = io::pipe()?;
    rustix::io::ioctl_fionbio(&button, true)?;
    Ok((Input::new(pressed.into())?, PowerButton(button)))
}

/// Most bytes that a guest can have appended to the file of a console, as long as no other program
/// empties it: the host's disk is not the guest's to fill.
const MAX_FILE_BYTES: u64 = 64 << 20;

fn file(path: &PathBuf) -> Result<Output, StreamError> {
    let open = || {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        match file.metadata()?.is_file() {
            true => Ok(Output::bounded_file(file, MAX_FILE_BYTES)),
            false => Output::new(file.into()),
        }
    };
    open().map_err(|source| StreamError::Open {
        path: path.clone(),
        source,
    })
}

fn output(name: &'static str, stream: impl AsFd) -> Result<Output, StreamError> {
    Output::new(own(name, stream)?).map_err(|source| StreamError::Standard(name, source))
}

fn own(name: &'static str, stream: impl AsFd) -> Result<OwnedFd, StreamError> {
    let own = stream.as_fd().try_clone_to_owned();
    own.map_err(|source| StreamError::Standard(name, source))
}

/// A serial port's output. It is written by a vCPU thread, which must not wait
/// for ever for a terminal that a user stopped: what is not taken in time is
/// dropped, and so is all that follows until there is room again.
#[derive(Debug)]
struct Hasty {
    output: Output,
    stuck: bool,
}

impl Hasty {
    const PATIENCE: Duration = Duration::from_millis(500);
}

impl Write for Hasty {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.output.write(data) {
                Progress::Moved(count) => {
                    self.stuck = false;
                    return Ok(count);
                }
                Progress::Full if !self.stuck && self.output.wait(Self::PATIENCE) => {}
                Progress::Full => {
                    self.stuck = true;
                    return Ok(data.len());
                }
                Progress::Lost => return Ok(data.len()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands what is written to a function.
struct Says<F>(F);

impl<F: FnMut(&[u8])> Write for Says<F> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        (self.0)(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
