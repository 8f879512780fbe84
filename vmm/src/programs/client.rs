//! `podvmm api`: a person's way to a podvmm that serves.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use api::http::{Client, ClientError};
use api::{ByteSize, Resize};
use lexopt::{Arg, Parser, ValueExt};
use serde_json::{Map, Value};
use thiserror::Error;

mod console;
mod top;

use self::console::ConsoleError;

/// What `podvmm api --help` prints.
pub(crate) const HELP: &str = include_str!("client.txt");

/// One request to be made.
#[derive(Debug)]
pub(crate) struct Call {
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
    /// Asks again and again, for `top`.
    Top,
    /// Goes where the answer says a console is.
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
pub(crate) enum CallError {
    /// Unknown, incomplete or superfluous arguments.
    #[error(transparent)]
    Arguments(#[from] lexopt::Error),
    /// A command that does not exist.
    #[error("there is no command '{0}'; see podvmm api --help")]
    Command(String),
    /// Something is missing.
    #[error("{0} is missing; see podvmm api --help")]
    Missing(&'static str),
    /// A command without what it is about.
    #[error("{what} of {command} is missing; see podvmm api --help")]
    Operand {
        /// Name of the command.
        command: &'static str,
        /// What is missing, as the help calls it.
        what: &'static str,
    },
    /// An option of another command.
    #[error("--{0} goes with the command {1}; see podvmm api --help")]
    Option(&'static str, &'static str),
    /// A folder that cannot be named in JSON.
    #[error("{} is not UTF-8, as the API's JSON must be", .0.display())]
    NotText(PathBuf),
    /// A relative path without a working directory, or an empty one.
    #[error("folder '{}'", .folder.display())]
    Folder {
        /// The folder as it was given.
        folder: PathBuf,
        /// Why the folder has no absolute path.
        source: io::Error,
    },
    /// A size that is none.
    #[error("--{option}")]
    Size {
        /// Name of the option that has no size, without its dashes.
        option: &'static str,
        source: api::UnitError,
    },
    /// The definition cannot be read.
    #[error("read {}", .path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        source: io::Error,
    },
    /// podvmm did not answer, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The answer could not be printed.
    #[error("print the answer")]
    Print(#[source] io::Error),
    /// The guest's console failed.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// podvmm's answer is not what it should be.
    #[error("podvmm's answer is not JSON")]
    Answer(#[source] serde_json::Error),
}

/// What a command takes besides options.
#[derive(Clone, Copy, Debug)]
enum Operand {
    None,
    /// A file of JSON, which becomes the body.
    File,
    /// A folder, as a URL in this field of the body.
    Folder(&'static str),
    /// The name of a device.
    Id,
}

/// A command: its name, method, path and operand.
type Command = (&'static str, &'static str, &'static str, Operand);

const COMMANDS: &[Command] = &[
    ("ping", "GET", "/api/v1/vmm.ping", Operand::None),
    ("info", "GET", "/api/v1/vm.info", Operand::None),
    ("console", "GET", "/api/v1/vm.info", Operand::None),
    ("counters", "GET", "/api/v1/vm.counters", Operand::None),
    ("top", "GET", "/api/v1/vm.counters", Operand::None),
    ("create", "PUT", "/api/v1/vm.create", Operand::File),
    ("add-disk", "PUT", "/api/v1/vm.add-disk", Operand::File),
    ("add-fs", "PUT", "/api/v1/vm.add-fs", Operand::File),
    ("add-net", "PUT", "/api/v1/vm.add-net", Operand::File),
    ("add-vsock", "PUT", "/api/v1/vm.add-vsock", Operand::File),
    (
        "remove-device",
        "PUT",
        "/api/v1/vm.remove-device",
        Operand::Id,
    ),
    ("resize-disk", "PUT", "/api/v1/vm.resize-disk", Operand::Id),
    ("boot", "PUT", "/api/v1/vm.boot", Operand::None),
    ("pause", "PUT", "/api/v1/vm.pause", Operand::None),
    ("resume", "PUT", "/api/v1/vm.resume", Operand::None),
    ("resize", "PUT", "/api/v1/vm.resize", Operand::None),
    (
        "snapshot",
        "PUT",
        "/api/v1/vm.snapshot",
        Operand::Folder("destination_url"),
    ),
    (
        "restore",
        "PUT",
        "/api/v1/vm.restore",
        Operand::Folder("source_url"),
    ),
    (
        "record-working-set",
        "PUT",
        "/api/v1/vm.record-working-set",
        Operand::None,
    ),
    (
        "power-button",
        "PUT",
        "/api/v1/vm.power-button",
        Operand::None,
    ),
    ("shutdown", "PUT", "/api/v1/vm.shutdown", Operand::None),
    ("reboot", "PUT", "/api/v1/vm.reboot", Operand::None),
    ("delete", "PUT", "/api/v1/vm.delete", Operand::None),
    ("exit", "PUT", "/api/v1/vmm.shutdown", Operand::None),
];

/// An option that becomes a field of the body.
struct Field {
    option: &'static str,
    /// The command it goes with.
    command: &'static str,
    name: &'static str,
    value: Value,
}

/// Parses the arguments after `api`. None if they ask for help.
pub(crate) fn parse(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<Option<Call>, CallError> {
    let mut parser = Parser::from_args(arguments);
    let (mut socket, mut command, mut operand) = (None, None, None);
    let mut fields = Vec::new();
    let mut json = false;
    while let Some(argument) = parser.next()? {
        let mut field = |option, command, name, value| {
            fields.push(Field {
                option,
                command,
                name,
                value,
            });
        };
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            Arg::Long("socket") => socket = Some(PathBuf::from(parser.value()?)),
            Arg::Long("json") => json = true,
            Arg::Long("incremental") => {
                field("incremental", "snapshot", "incremental", true.into());
            }
            Arg::Long("prefetch") => field("prefetch", "restore", "prefetch", true.into()),
            Arg::Long("verify") => field("verify", "restore", "verify", true.into()),
            Arg::Long("resume") => field("resume", "restore", "resume", true.into()),
            Arg::Long("size") => {
                let size = size_of("size", &mut parser)?;
                field("size", "resize-disk", "desired_size", size);
            }
            Arg::Long(option) => {
                let known = Resize::OPTIONS.iter().find(|(name, _)| *name == option);
                let Some(&(option, name)) = known else {
                    return Err(argument.unexpected().into());
                };
                let size = size_of(option, &mut parser)?;
                field(option, "resize", name, size);
            }
            Arg::Value(value) if command.is_none() => command = Some(value.string()?),
            Arg::Value(value) if operand.is_none() => operand = Some(value),
            unexpected => return Err(unexpected.unexpected().into()),
        }
    }
    let name = command.ok_or(CallError::Missing("COMMAND"))?;
    let known = COMMANDS.iter().find(|command| command.0 == name);
    let &(name, method, path, takes) = known.ok_or(CallError::Command(name))?;
    if let Some(stray) = fields.iter().find(|field| field.command != name) {
        return Err(CallError::Option(stray.option, stray.command));
    }
    Ok(Some(Call {
        socket: socket.ok_or(CallError::Missing("--socket"))?,
        method,
        path,
        body: body(name, takes, operand, fields)?,
        json,
        then: match name {
            "top" => Then::Top,
            "console" => Then::Console,
            _ => Then::Print,
        },
    }))
}

/// The size that is the value of an option, in bytes.
fn size_of(option: &'static str, parser: &mut Parser) -> Result<Value, CallError> {
    let size = parser.value()?.string()?.parse();
    let size: ByteSize = size.map_err(|source| CallError::Size { option, source })?;
    Ok(size.0.into())
}

/// What a request brings. `None` if it has no body.
fn body(
    command: &'static str,
    takes: Operand,
    operand: Option<OsString>,
    fields: Vec<Field>,
) -> Result<Option<Body>, CallError> {
    let mut body: Map<_, _> = fields
        .into_iter()
        .map(|field| (field.name.to_owned(), field.value))
        .collect();
    let missing = |what| CallError::Operand { command, what };
    match (takes, operand) {
        (Operand::None, None) if command == "resize" => {}
        (Operand::None, None) => return Ok(None),
        (Operand::None, Some(operand)) => return Err(Arg::Value(operand).unexpected().into()),
        (Operand::File, None) => return Err(missing("FILE")),
        (Operand::File, Some(file)) => return Ok(Some(Body::File(file.into()))),
        (Operand::Folder(_), None) => return Err(missing("FOLDER")),
        (Operand::Folder(field), Some(folder)) => {
            body.insert(field.into(), url(folder.into())?.into());
        }
        (Operand::Id, None) => return Err(missing("ID")),
        (Operand::Id, Some(id)) => {
            body.insert("id".into(), id.string()?.into());
        }
    }
    Ok(Some(Body::Value(body.into())))
}

/// The URL of a folder, which podvmm may see from another working directory.
fn url(folder: PathBuf) -> Result<String, CallError> {
    let absolute = std::path::absolute(&folder).map_err(|source| CallError::Folder {
        folder: folder.clone(),
        source,
    })?;
    match absolute.to_str() {
        Some(path) => Ok(format!("file://{path}")),
        None => Err(CallError::NotText(folder)),
    }
}

impl Call {
    /// Makes the request and prints the answer to `out`.
    pub(crate) fn make(&self, out: &mut impl Write) -> Result<(), CallError> {
        match self.then {
            Then::Print => {
                let answer = self.text()?;
                out.write_all(answer.as_bytes()).map_err(CallError::Print)
            }
            Then::Top => top::run(&mut Client::connect(&self.socket)?, out),
            Then::Console => {
                let info = self.answer()?.ok_or(ConsoleError::None)?;
                Ok(console::run(&info)?)
            }
        }
    }

    /// Makes the request; `None` if there is nothing to say but that it was done.
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
    use serde_json::json;

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

    fn body(arguments: &[&str]) -> (&'static str, Value) {
        let arguments = ["--socket", "/s"].iter().chain(arguments);
        let call = call(&arguments.copied().collect::<Vec<_>>());
        match call.unwrap().unwrap() {
            Call {
                path,
                body: Some(Body::Value(body)),
                ..
            } => (path, body),
            other => panic!("no body: {other:?}"),
        }
    }

    #[test]
    fn snapshots_are_taken_and_restored_by_their_folders() {
        assert_eq!(
            body(&["snapshot", "/f", "--incremental"]),
            (
                "/api/v1/vm.snapshot",
                json!({"destination_url": "file:///f", "incremental": true})
            )
        );
        assert_eq!(
            body(&["restore", "/f", "--resume", "--prefetch", "--verify"]),
            (
                "/api/v1/vm.restore",
                json!({"source_url": "file:///f", "resume": true, "prefetch": true, "verify": true})
            )
        );
        let (_, relative) = body(&["snapshot", "f"]);
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            relative["destination_url"],
            format!("file://{}/f", here.display())
        );
        let device = body(&["remove-device", "disk1"]);
        assert_eq!(device, ("/api/v1/vm.remove-device", json!({"id": "disk1"})));
        let resized = body(&["resize-disk", "data", "--size", "2M"]);
        let expected = json!({"id": "data", "desired_size": 2 << 20});
        assert_eq!(resized, ("/api/v1/vm.resize-disk", expected));
    }

    #[test]
    fn every_endpoint_but_the_metrics_has_a_command() {
        let has = |route: &&api::route::Route| {
            let same = |command: &&Command| (command.1, command.2) == (route.method, route.path);
            COMMANDS.iter().any(|command| same(&command))
        };
        let without: Vec<_> = api::route::ROUTES
            .iter()
            .filter(|route| !has(route))
            .map(|route| route.path)
            .collect();
        assert_eq!(without, ["/metrics"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let refusal = |arguments: &[&str]| call(arguments).unwrap_err().to_string();
        assert!(refusal(&["info"]).starts_with("--socket is missing"));
        assert!(refusal(&["--socket", "/s"]).starts_with("COMMAND is missing"));
        assert!(refusal(&["--socket", "/s", "create"]).starts_with("FILE of create is missing"));
        assert!(refusal(&["--socket", "/s", "snapshot"]).starts_with("FOLDER of snapshot is"));
        assert!(refusal(&["--socket", "/s", "remove-device"]).starts_with("ID of remove-device"));
        assert!(refusal(&["--socket", "/s", "boot", "x"]).starts_with("unexpected argument"));
        let stray = refusal(&["--socket", "/s", "boot", "--cpus", "2"]);
        assert!(stray.starts_with("--cpus goes with the command resize"));
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
