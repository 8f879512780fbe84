//! What `podvmm` does by its first words: run a VM, be a client of one, give pages, look at the host.

mod check;
mod cli;
mod client;
mod guest;
mod help;
mod pages;
mod run;

use std::error::Error;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use env_logger::{Builder, Target, TimestampPrecision};
use serde_json::json;

use self::cli::{Action, LogFormat, RunOptions};
use self::pages::Task;
use crate::inbox::EXIT_FAILURE;

/// What the binary `podvmm` does: its arguments are this process's, and its exit code is returned.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|first| first == "api").is_some() {
        return call(arguments);
    }
    if arguments.next_if(|first| first == "pages").is_some() {
        return give_pages(arguments);
    }
    match cli::parse(arguments) {
        Ok(Action::Help) => print!("{}", help::text()),
        Ok(Action::Version) => println!("podvmm {}", env!("CARGO_PKG_VERSION")),
        Ok(Action::Check) => print!("{}", check::report()),
        Ok(Action::Run(options)) => return run_vm(&options),
        Err(error) => {
            complain(&error);
            eprintln!("Try 'podvmm --help'.");
            return ExitCode::from(EXIT_FAILURE);
        }
    }
    ExitCode::SUCCESS
}

fn call(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let made = client::parse(arguments).and_then(|call| match call {
        None => {
            print!("{}", client::HELP);
            Ok(())
        }
        Some(call) => call.make(&mut io::stdout()),
    });
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn give_pages(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let given = pages::parse(arguments).and_then(|task| match task {
        Task::Help => {
            print!("{}", pages::HELP);
            Ok(())
        }
        Task::Compress { folder } => pages::compress(&folder, &mut io::stdout()),
        Task::Serve {
            socket,
            folder,
            seccomp,
            jail,
            verbosity,
        } => {
            let level = cli::log_level(verbosity);
            Builder::new()
                .filter_level(level)
                .format_timestamp(None)
                .format_target(false)
                .init();
            pages::serve(socket, folder, seccomp, jail)
        }
    });
    match given {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn run_vm(options: &RunOptions) -> ExitCode {
    let log = match start_logging(options) {
        Ok(log) => log,
        Err(error) => {
            complain(error.as_ref());
            return ExitCode::from(EXIT_FAILURE);
        }
    };
    match run::run(options, log.as_ref()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error);
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Returns the file that is logged to, if it is one.
fn start_logging(options: &RunOptions) -> Result<Option<File>, Box<dyn Error>> {
    let mut builder = Builder::new();
    builder
        .filter_level(options.log_level())
        .format_timestamp(
            options
                .log_file
                .as_ref()
                .map(|_| TimestampPrecision::Micros),
        )
        .format_target(false);
    if options.log_format == LogFormat::Json {
        builder.format(|out, record| {
            let time = SystemTime::now().duration_since(UNIX_EPOCH);
            let line = json!({
                "time": time.unwrap_or_default().as_secs_f64(),
                "level": record.level().as_str(),
                "message": record.args().to_string(),
            });
            writeln!(out, "{line}")
        });
    }
    let file = options.log_file.as_deref().map(open_log).transpose()?;
    if let Some(file) = &file {
        builder.target(Target::Pipe(Box::new(file.try_clone()?)));
    }
    builder.init();
    Ok(file)
}

fn open_log(path: &Path) -> Result<File, String> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|error| format!("--log-file {}: {error}", path.display()))
}

/// Prints an error and what caused it, once, on one line.
fn complain(error: &dyn Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    eprintln!("podvmm: {text}");
}
