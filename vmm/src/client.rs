//! `podvmm api`: a person's way to a podvmm that serves.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use api::ByteSize;
use api::http::{Client, ClientError};
use lexopt::{Arg, Parser, ValueExt};
use serde_json::{Value, json};
use thiserror::Error;

use crate::console_client::{self, ConsoleError};
use crate::top;

/// What `podvmm api --help` prints.
pub const HELP: &str = include_str!("client.txt");

/// One request to be made.
#[derive(Debug)]
pub struct Call {
    socket: PathBuf,
    method: &'static str,
    path: &'static str,
    body: Option<Body>,
    json: bool,
    then: Then,
}

/// What becomes of the answer.
#[derive(Debug)]
enum Then {
    Print,
    /// Asks again and again.
    Top,
    /// Goes where it says a console is.
    Console,
}

#[derive(Debug)]
enum Body {
    Value(Value),
    /// A file, `-` for standard input.
    File(PathBuf),
}

/// Why a request was not made, or is refused.
#[derive(Debug, Error)]
pub enum CallError {
    /// Unknown, incomplete or superfluous arguments.
    #[error(transparent)]
    Arguments(#[from] lexopt::Error),
    /// No such command.
    #[error("there is no command '{0}'; see podvmm api --help")]
    Command(String),
    /// Something is missing.
    #[error("{0} is missing; see podvmm api --help")]
    Missing(&'static str),
    /// A size that is none.
    #[error("--memory or --balloon")]
    Size(#[source] api::UnitError),
    /// The definition cannot be read.
    #[error("read {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// podvmm did not answer, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Standard output.
    #[error("print the answer")]
    Print(#[source] io::Error),
    /// The guest's console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// podvmm's answer is not what it should be.
    #[error("podvmm's answer is not JSON")]
    Answer(#[source] serde_json::Error),
}

/// Parses the arguments after `api`. None if they ask for help.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Call>, CallError> {
    let mut parser = Parser::from_args(arguments);
    let (mut socket, mut command, mut file) = (None, None, None);
    let mut sizes = json!({});
    let mut json = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            Arg::Long("socket") => socket = Some(PathBuf::from(parser.value()?)),
            Arg::Long("json") => json = true,
            Arg::Long("cpus") => sizes["desired_vcpus"] = parser.value()?.parse::<u8>()?.into(),
            Arg::Long("memory") => {
                let size: ByteSize = parser.value()?.string()?.parse().map_err(CallError::Size)?;
                sizes["desired_ram"] = size.0.into();
            }
            Arg::Long("balloon") => {
                let size: ByteSize = parser.value()?.string()?.parse().map_err(CallError::Size)?;
                sizes["desired_balloon"] = size.0.into();
            }
            Arg::Value(value) if command.is_none() => command = Some(value.string()?),
            Arg::Value(value) if file.is_none() => file = Some(PathBuf::from(value)),
            unexpected => return Err(unexpected.unexpected().into()),
        }
    }
    let command = command.ok_or(CallError::Missing("COMMAND"))?;
    let file = |name| file.clone().map(Body::File).ok_or(CallError::Missing(name));
    let (method, path, body) = match command.as_str() {
        "ping" => ("GET", "/api/v1/vmm.ping", None),
        "info" | "console" => ("GET", "/api/v1/vm.info", None),
        "counters" | "top" => ("GET", "/api/v1/vm.counters", None),
        "create" => (
            "PUT",
            "/api/v1/vm.create",
            Some(file("the file of create")?),
        ),
        "boot" => ("PUT", "/api/v1/vm.boot", None),
        "pause" => ("PUT", "/api/v1/vm.pause", None),
        "resume" => ("PUT", "/api/v1/vm.resume", None),
        "resize" => ("PUT", "/api/v1/vm.resize", Some(Body::Value(sizes))),
        "power-button" => ("PUT", "/api/v1/vm.power-button", None),
        "record-working-set" => ("PUT", "/api/v1/vm.record-working-set", None),
        "shutdown" => ("PUT", "/api/v1/vm.shutdown", None),
        "reboot" => ("PUT", "/api/v1/vm.reboot", None),
        "delete" => ("PUT", "/api/v1/vm.delete", None),
        "exit" => ("PUT", "/api/v1/vmm.shutdown", None),
        _ => return Err(CallError::Command(command)),
    };
    Ok(Some(Call {
        socket: socket.ok_or(CallError::Missing("--socket"))?,
        method,
        path,
        body,
        json,
        then: match command.as_str() {
            "top" => Then::Top,
            "console" => Then::Console,
            _ => Then::Print,
        },
    }))
}

impl Call {
    /// Makes the request and prints the answer to `out`.
    pub fn make(&self, out: &mut impl Write) -> Result<(), CallError> {
        match self.then {
            Then::Print => {
                let answer = self.text()?;
                out.write_all(answer.as_bytes()).map_err(CallError::Print)
            }
            Then::Top => top::run(&mut Client::connect(&self.socket)?, out),
            Then::Console => {
                let info = self.answer()?.ok_or(ConsoleError::None)?;
                Ok(console_client::run(&info)?)
            }
        }
    }

    /// None if there is nothing to say but that it was done.
    fn answer(&self) -> Result<Option<Value>, CallError> {
        let body = match &self.body {
            None => None,
            Some(Body::Value(value)) => Some(value.to_string()),
            Some(Body::File(path)) => Some(read(path)?),
        };
        let mut client = Client::connect(&self.socket)?;
        let answer = client.call(self.method, self.path, body.as_deref(), &[])?;
        if answer.is_empty() {
            return Ok(None);
        }
        let answer = serde_json::from_slice(&answer).map_err(CallError::Answer)?;
        Ok(Some(answer))
    }

    fn text(&self) -> Result<String, CallError> {
        let Some(answer) = self.answer()? else {
            return Ok(String::new());
        };
        if self.json {
            return Ok(format!("{answer}\n"));
        }
        let mut text = String::new();
        lines("", &answer, &mut text);
        Ok(text)
    }
}

fn read(path: &PathBuf) -> Result<String, CallError> {
    let text = if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(path)
    };
    text.map_err(|source| CallError::Read {
        path: path.clone(),
        source,
    })
}

/// A line for each value, by its path; what is null or empty is left out, and so
/// are counters at zero.
fn lines(path: &str, value: &Value, text: &mut String) {
    let below = |key: &str| match path {
        "" => key.to_string(),
        path => format!("{path}.{key}"),
    };
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (key, field) in fields {
                lines(&below(key), field, text);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                lines(&below(&index.to_string()), item, text);
            }
        }
        Value::Number(number) if number.as_u64() == Some(0) => {}
        Value::String(string) => text.push_str(&format!("{path:<28} {string}\n")),
        other => text.push_str(&format!("{path:<28} {other}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(arguments: &[&str]) -> Result<Option<Call>, CallError> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn a_command_is_one_request() {
        let call = call(&["--socket", "/s", "resize", "--cpus", "2", "--memory", "1G"]);
        let call = call.unwrap().unwrap();
        assert_eq!((call.method, call.path), ("PUT", "/api/v1/vm.resize"));
        let Some(Body::Value(body)) = call.body else {
            panic!("no body");
        };
        assert_eq!(body, json!({"desired_vcpus": 2, "desired_ram": 1 << 30}));
    }

    #[test]
    fn what_is_missing_is_named() {
        let refusal = |arguments: &[&str]| call(arguments).unwrap_err().to_string();
        assert!(refusal(&["info"]).starts_with("--socket is missing"));
        assert!(refusal(&["--socket", "/s"]).starts_with("COMMAND is missing"));
        assert!(refusal(&["--socket", "/s", "create"]).starts_with("the file of create"));
        assert!(refusal(&["--socket", "/s", "fly"]).starts_with("there is no command 'fly'"));
        assert!(call(&["--help"]).unwrap().is_none());
    }

    #[test]
    fn an_answer_is_a_line_for_each_value() {
        let mut text = String::new();
        let answer = json!({"state": "Running", "config": {"cpus": {"boot": 2, "x": null}}});
        lines("", &answer, &mut text);
        let words: Vec<_> = text.split_whitespace().collect();
        assert_eq!(words, ["config.cpus.boot", "2", "state", "Running"]);
    }
}
