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
use thiserror::Error;

use crate::command::{STATUS_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT, StatusParser};
use crate::control::{Event, Inbox};
use crate::transcript::{Recorded, Transcript};

/// Why a stream could not be had.
#[derive(Debug, Error)]
pub enum StreamError {
    /// A console's file.
    #[error("open {} for a console", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One of podvmm's own streams.
    #[error("use {0} for the guest")]
    Standard(&'static str, #[source] io::Error),
}

/// Where a serial port prints; none if there is to be no port. Everything is
/// recorded in `transcript`.
pub(crate) fn serial(
    destination: &Destination,
    transcript: &Transcript,
) -> Result<Option<Box<dyn Write + Send>>, StreamError> {
    Ok(output(destination)?.map(|output| {
        let transcript = transcript.clone();
        Box::new(Recorded {
            transcript,
            output: Hasty {
                output,
                stuck: false,
            },
        }) as _
    }))
}

/// The virtio console as a port; none if there is to be no console.
pub(crate) fn console(
    destination: &Destination,
    transcript: &Transcript,
) -> Result<Option<Port>, StreamError> {
    let input = match destination {
        Destination::Tty => Some(standard_input()?),
        Destination::Off | Destination::Null | Destination::File(_) => None,
    };
    Ok(output(destination)?.map(|output| {
        let output = if *destination == Destination::Null {
            Output::sink(Box::new(transcript.clone()))
        } else {
            output
        };
        Port {
            name: "podvmm.console".into(),
            console: true,
            input,
            output: Some(output),
        }
    }))
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
            // Nobody listens any more when the machine is being taken down.
            let _ = inbox.send(Event::Status(status));
        });
    });
    let stdout = standard("standard output", io::stdout().as_fd().try_clone_to_owned())?;
    let stderr = standard("standard error", io::stderr().as_fd().try_clone_to_owned())?;
    let (pressed, button) =
        power_button().map_err(|source| StreamError::Standard("a pipe", source))?;
    let ports = [
        port(STDIN_PORT, Some(standard_input()?), None),
        port(STDOUT_PORT, None, Some(stdout)),
        port(STDERR_PORT, None, Some(stderr)),
        port(
            STATUS_PORT,
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

fn output(destination: &Destination) -> Result<Option<Output>, StreamError> {
    Ok(match destination {
        Destination::Off => None,
        Destination::Null => Some(Output::sink(Box::new(io::sink()))),
        Destination::Tty => Some(standard(
            "standard output",
            io::stdout().as_fd().try_clone_to_owned(),
        )?),
        Destination::File(path) => Some(file(path)?),
    })
}

fn file(path: &PathBuf) -> Result<Output, StreamError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|file| Output::new(file.into()))
        .map_err(|source| StreamError::Open {
            path: path.clone(),
            source,
        })
}

fn standard(name: &'static str, fd: io::Result<OwnedFd>) -> Result<Output, StreamError> {
    fd.and_then(Output::new)
        .map_err(|source| StreamError::Standard(name, source))
}

fn standard_input() -> Result<Input, StreamError> {
    io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(Input::new)
        .map_err(|source| StreamError::Standard("standard input", source))
}

/// A serial port's output. It is written by a vCPU thread, which must not wait
/// for ever for a terminal that somebody stopped: what is not taken in time is
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
