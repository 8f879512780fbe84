//! podvmm's arguments.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use api::{ConfigError, HostPath, Output, PARTS, TransportConfig, VmConfig};
use lexopt::{Arg, Parser, ValueExt};
use log::LevelFilter;
use thiserror::Error;

use crate::host::jail::{Jail, Label, User, Wanted};
use crate::host::thread::Enforcement;

/// Parts of a VM that may be others than those of the snapshot it is restored from.
const REPLACEABLE: [&str; 4] = ["disk", "net", "fs", "vsock"];

/// What the user wants.
#[derive(Debug)]
pub(crate) enum Action {
    /// Print [`help`](super::help::text).
    Help,
    /// Print the version.
    Version,
    /// Report on the host.
    Check,
    /// Run a VM.
    Run(Box<RunOptions>),
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Lines of text, for people.
    #[default]
    Text,
    /// A JSON object for each line, for programs.
    Json,
}

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EventMonitor {
    /// A file or FIFO, to its end.
    Path(PathBuf),
    /// A descriptor that podvmm was started with.
    Fd(i32),
}

impl fmt::Display for EventMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "path={}", path.display()),
            Self::Fd(fd) => write!(f, "fd={fd}"),
        }
    }
}

/// A VM as the arguments describe it.
#[derive(Debug, Default)]
pub(crate) struct RunOptions {
    /// `--kernel`
    pub kernel: Option<PathBuf>,
    /// `--rootfs`
    pub rootfs: Option<PathBuf>,
    /// `--initramfs`
    pub initramfs: Option<PathBuf>,
    /// `--cmdline`
    pub cmdline: String,
    /// The parts of a VM, but what it boots and where it prints.
    pub vm: VmConfig,
    /// Which of [`PARTS`] are given.
    pub parts: Vec<&'static str>,
    /// `--serial`
    pub serial: Option<Output>,
    /// `--console`
    pub console: Option<Output>,
    /// `--transport`
    pub transport: Option<TransportConfig>,
    /// `--restore`
    pub restore: Option<PathBuf>,
    /// `--prefetch`
    pub prefetch: bool,
    /// `--api-socket`
    pub api_socket: Option<PathBuf>,
    /// `--seccomp`
    pub seccomp: Enforcement,
    /// `--jail`, `--jail-user` and `--jail-label`
    pub jail: Jail,
    /// `--jail-path`
    pub jail_paths: Vec<HostPath>,
    /// `--event-monitor`
    pub event_monitor: Option<EventMonitor>,
    /// `--log-file`
    pub log_file: Option<PathBuf>,
    /// `--log-format`
    pub log_format: LogFormat,
    /// `-v`, counted.
    pub verbosity: u8,
    /// What follows `--`; empty without a command.
    pub command: Vec<Vec<u8>>,
}

impl RunOptions {
    /// Whether clients are to say what to boot.
    pub(crate) fn only_serves(&self) -> bool {
        self.api_socket.is_some()
            && self.kernel.is_none()
            && self.rootfs.is_none()
            && self.restore.is_none()
            && self.command.is_empty()
    }

    /// Whether they say anything that a snapshot says for good.
    fn changes_the_guest(&self) -> bool {
        self.kernel.is_some()
            || self.rootfs.is_some()
            || !self.command.is_empty()
            || self.describes_a_guest()
    }

    fn describes_a_guest(&self) -> bool {
        self.initramfs.is_some()
            || !self.cmdline.is_empty()
            || self.transport.is_some()
            || self.parts.iter().any(|part| !REPLACEABLE.contains(part))
    }

    /// Whether they say anything about a VM besides what to boot.
    fn describes_a_vm(&self) -> bool {
        self.describes_a_guest()
            || !self.parts.is_empty()
            || self.serial.is_some()
            || self.console.is_some()
    }

    /// How much to log.
    pub(crate) fn log_level(&self) -> LevelFilter {
        log_level(self.verbosity)
    }
}

/// How much to log for so many `-v`.
pub(crate) fn log_level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    }
}

/// Why the arguments make no sense.
#[derive(Debug, Error)]
pub(crate) enum CliError {
    /// Unknown, incomplete or superfluous arguments.
    #[error(transparent)]
    Arguments(#[from] lexopt::Error),
    /// A value that does not parse.
    #[error("--{option}")]
    Value {
        /// Name of the option, without its dashes.
        option: &'static str,
        source: ConfigError,
    },
    /// Options that cannot be, or not together.
    #[error("{0}")]
    Contradiction(&'static str),
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Action, CliError> {
    let mut parser = Parser::from_args(arguments);
    let mut options = RunOptions::default();
    while let Some(argument) = next(&mut parser, &mut options)? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Action::Help),
            Arg::Long("version") | Arg::Short('V') => return Ok(Action::Version),
            Arg::Long("check") => return Ok(Action::Check),
            Arg::Long("kernel") => options.kernel = Some(parser.value()?.into()),
            Arg::Long("rootfs") => options.rootfs = Some(parser.value()?.into()),
            Arg::Long("initramfs") => options.initramfs = Some(parser.value()?.into()),
            Arg::Long("cmdline") => options.cmdline = parser.value()?.string()?,
            Arg::Long("serial") => options.serial = Some(output(&mut parser, "serial")?),
            Arg::Long("console") => options.console = Some(output(&mut parser, "console")?),
            Arg::Long("transport") => options.transport = Some(transport(&mut parser)?),
            Arg::Long("restore") => options.restore = Some(parser.value()?.into()),
            Arg::Long("prefetch") => options.prefetch = true,
            Arg::Long("api-socket") => options.api_socket = Some(parser.value()?.into()),
            Arg::Long("seccomp") => options.seccomp = seccomp(&parser.value()?)?,
            Arg::Long("jail") => options.jail.wanted = jail(&parser.value()?)?,
            Arg::Long("jail-user") => options.jail.user = Some(jail_user(&parser.value()?)?),
            Arg::Long("jail-label") => options.jail.labels.push(jail_label(&parser.value()?)?),
            Arg::Long("jail-path") => options.jail_paths.push(jail_path(&parser.value()?)?),
            Arg::Long("event-monitor") => options.event_monitor = Some(monitor(&mut parser)?),
            Arg::Long("log-file") => options.log_file = Some(parser.value()?.into()),
            Arg::Long("log-format") => {
                options.log_format = match parser.value()?.to_str() {
                    Some("text") => LogFormat::Text,
                    Some("json") => LogFormat::Json,
                    _ => return Err(CliError::Contradiction("--log-format: write text or json")),
                }
            }
            Arg::Short('v') => options.verbosity = options.verbosity.saturating_add(1),
            Arg::Long(option) => {
                let Some((option, _)) = PARTS.iter().find(|(name, _)| *name == option) else {
                    return Err(argument.unexpected().into());
                };
                let given = options.vm.give(option, &parser.value()?.string()?);
                given.map_err(|source| CliError::Value { option, source })?;
                options.parts.push(option);
            }
            unexpected => return Err(unexpected.unexpected().into()),
        }
    }
    check(&options)?;
    Ok(Action::Run(Box::new(options)))
}

/// The next argument, unless it is `--`: then the rest is the command.
fn next<'a>(
    parser: &'a mut Parser,
    options: &mut RunOptions,
) -> Result<Option<Arg<'a>>, lexopt::Error> {
    if let Some(mut raw) = parser.try_raw_args()
        && raw.next_if(|argument| argument == "--").is_some()
    {
        options.command = raw.map(OsString::into_vec).collect();
        return Ok(None);
    }
    parser.next()
}

fn output(parser: &mut Parser, option: &'static str) -> Result<Output, CliError> {
    let text = parser.value()?.string()?;
    text.parse()
        .map_err(|source| CliError::Value { option, source })
}

fn transport(parser: &mut Parser) -> Result<TransportConfig, CliError> {
    let text = parser.value()?.string()?;
    text.parse().map_err(|source| CliError::Value {
        option: "transport",
        source,
    })
}

fn monitor(parser: &mut Parser) -> Result<EventMonitor, CliError> {
    let text = parser.value()?.string()?;
    let monitor = match text.split_once('=') {
        Some(("path", path)) if !path.is_empty() => Some(EventMonitor::Path(path.into())),
        Some(("fd", fd)) => fd.parse().ok().filter(|fd| *fd >= 0).map(EventMonitor::Fd),
        _ => None,
    };
    monitor.ok_or(CliError::Contradiction(
        "--event-monitor: write path=FILE or fd=N",
    ))
}

fn seccomp(value: &OsString) -> Result<Enforcement, CliError> {
    let enforcement = value.to_str().and_then(Enforcement::parse);
    enforcement.ok_or(CliError::Contradiction(
        "--seccomp: write true, log or false",
    ))
}

fn jail(value: &OsString) -> Result<Wanted, CliError> {
    let wanted = value.to_str().and_then(Wanted::parse);
    wanted.ok_or(CliError::Contradiction("--jail: write on, off or required"))
}

fn jail_user(value: &OsString) -> Result<User, CliError> {
    let user = value.to_str().and_then(User::parse);
    user.ok_or(CliError::Contradiction(
        "--jail-user: write UID or UID:GID, other numbers than root's",
    ))
}

fn jail_label(value: &OsString) -> Result<Label, CliError> {
    let label = value.to_str().and_then(Label::parse);
    label.ok_or(CliError::Contradiction(
        "--jail-label: write apparmor=PROFILE or selinux=CONTEXT",
    ))
}

fn jail_path(value: &OsString) -> Result<HostPath, CliError> {
    let path = match value.to_str().and_then(|value| value.split_once('=')) {
        Some(("read", path)) if !path.is_empty() => Some(HostPath::read(path.as_ref())),
        Some(("write", path)) if !path.is_empty() => Some(HostPath::write(path.as_ref())),
        Some(("sockets", path)) if !path.is_empty() => Some(HostPath::sockets(path.as_ref())),
        _ => None,
    };
    path.ok_or(CliError::Contradiction(
        "--jail-path: write read=PATH, write=PATH or sockets=FOLDER",
    ))
}

fn check(options: &RunOptions) -> Result<(), CliError> {
    let tty = Some(&Output::Tty);
    if options.serial.as_ref() == tty && options.console.as_ref() == tty {
        return Err(CliError::Contradiction(
            "--serial tty and --console tty: there is one terminal; give one of them off, null or file=PATH",
        ));
    }
    if options.only_serves() && options.describes_a_vm() {
        return Err(CliError::Contradiction(
            "--api-socket without --kernel, --rootfs or COMMAND: clients say what the VM gets, not options",
        ));
    }
    if options.restore.is_some() && options.changes_the_guest() {
        return Err(CliError::Contradiction(
            "--restore: the snapshot says what the guest is; only --disk, --net, --fs, --vsock, --serial and --console can be others",
        ));
    }
    if options.jail.wanted == Wanted::Off && !options.jail_paths.is_empty() {
        return Err(CliError::Contradiction(
            "--jail-path: it goes with --jail: without it podvmm sees all of the host's files",
        ));
    }
    if let Some(what) = options.jail.contradiction() {
        return Err(CliError::Contradiction(what));
    }
    if options.prefetch && options.restore.is_none() {
        return Err(CliError::Contradiction(
            "--prefetch: it goes with --restore: there is nothing to read ahead of a guest that boots",
        ));
    }
    let has_command = !options.command.is_empty();
    if has_command && (options.serial.as_ref() == tty || options.console.as_ref() == tty) {
        return Err(CliError::Contradiction(
            "standard output is COMMAND's alone; send the console to file=PATH, such as file=/dev/stderr",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> RunOptions {
        match parse(arguments.iter().map(OsString::from)).unwrap() {
            Action::Run(options) => *options,
            other => panic!("not a run: {other:?}"),
        }
    }

    fn refusal(arguments: &[&str]) -> String {
        let error = parse(arguments.iter().map(OsString::from)).unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }

    #[test]
    fn everything_behind_two_dashes_is_the_command() {
        let options = run(&[
            "-v", "--cpus", "boot=2", "--", "/bin/sh", "-c", "exit 7", "--kernel",
        ]);
        assert_eq!(
            options.command,
            [&b"/bin/sh"[..], b"-c", b"exit 7", b"--kernel"]
        );
        assert_eq!((options.verbosity, options.vm.cpus.boot().get()), (1, 2));
    }

    #[test]
    fn disks_keep_their_order() {
        let options = run(&["--disk", "path=/a", "--disk", "path=/b"]);
        assert_eq!(
            options
                .vm
                .disks
                .iter()
                .map(|disk| &disk.path)
                .collect::<Vec<_>>(),
            ["/a", "/b"]
        );
    }

    #[test]
    fn options_that_only_serve_describe_no_vm() {
        assert!(run(&["--api-socket", "/s", "--seccomp", "false"]).only_serves());
        assert!(!run(&["--api-socket", "/s", "--kernel", "k", "--cpus", "boot=2"]).only_serves());
        let refused = refusal(&["--api-socket", "/s", "--disk", "path=/d"]);
        assert!(refused.starts_with("--api-socket without"), "{refused}");
    }

    #[test]
    fn a_snapshot_says_what_the_guest_is() {
        let options = run(&[
            "--restore",
            "/s",
            "--vsock",
            "cid=3,socket=/v",
            "--api-socket",
            "/a",
        ]);
        assert!(!options.only_serves());
        let others = [
            ["--kernel", "k"],
            ["--cpus", "boot=2"],
            ["--transport", "pci"],
            ["--", "true"],
        ];
        for more in others {
            let refused = refusal(&["--restore", "/s", more[0], more[1]]);
            assert!(
                refused.starts_with("--restore: the snapshot says"),
                "{refused}"
            );
        }
        assert!(run(&["--restore", "/s", "--prefetch"]).prefetch);
        assert!(refusal(&["--prefetch"]).starts_with("--prefetch: it goes with --restore"));
    }

    #[test]
    fn filters_are_on_unless_they_are_not_wanted() {
        assert_eq!(run(&[]).seccomp, Enforcement::On);
        let given = |value: &str| run(&["--seccomp", value]).seccomp;
        let all = ["true", "log", "false"].map(given);
        assert_eq!(all, [Enforcement::On, Enforcement::Log, Enforcement::Off]);
        let refused = refusal(&["--seccomp", "off"]);
        assert_eq!(refused, "--seccomp: write true, log or false");
    }

    #[test]
    fn a_jail_has_the_paths_that_are_given() {
        let options = run(&[
            "--jail",
            "on",
            "--jail-path",
            "read=/a",
            "--jail-path",
            "write=b",
            "--jail-path",
            "sockets=c",
        ]);
        assert_eq!(options.jail.wanted, Wanted::On);
        let paths = [
            HostPath::read("/a".as_ref()),
            HostPath::write("b".as_ref()),
            HostPath::sockets("c".as_ref()),
        ];
        assert_eq!(options.jail_paths, paths);
        assert_eq!(run(&[]).jail, Jail::default());
        let options = run(&["--jail", "on", "--jail-user", "1000:7"]);
        assert_eq!(options.jail.user, User::parse("1000:7"));
        let options = run(&["--jail", "on", "--jail-label", "apparmor=pods"]);
        assert_eq!(options.jail.labels, [Label::AppArmor("pods".into())]);
        assert!(refusal(&["--jail-label", "pods"]).starts_with("--jail-label: write apparmor="));
        let refused = refusal(&["--jail-label", "apparmor=pods"]);
        assert_eq!(refused, "--jail-label: it goes with --jail");
        assert!(refusal(&["--jail", "on", "--jail-user", "0"]).starts_with("--jail-user: write"));
        assert_eq!(
            refusal(&["--jail-user", "7"]),
            "--jail-user: it goes with --jail"
        );
        assert!(refusal(&["--jail", "yes"]).starts_with("--jail: write on, off or"));
        assert!(refusal(&["--jail", "on", "--jail-path", "/a"]).starts_with("--jail-path: write"));
        assert!(refusal(&["--jail-path", "read=/a"]).starts_with("--jail-path: it goes with"));
    }

    #[test]
    fn verbosity_counts() {
        assert_eq!(run(&["-vv", "-v"]).log_level(), LevelFilter::Trace);
        assert_eq!(run(&[]).log_level(), LevelFilter::Warn);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(
            refusal(&["--memory", "size=x"]),
            "--memory: size: 'x' is not a size: write bytes, or a number with K, M, G or T"
        );
        assert_eq!(
            refusal(&["--transport", "isa"]),
            "--transport: 'isa' is none of mmio, pci"
        );
        assert_eq!(refusal(&["--kernle", "x"]), "invalid option '--kernle'");
        assert_eq!(
            refusal(&["--memory", "sise=1"]),
            "--memory: there is no key 'sise', the keys are size, hugepages, thp, shared, hotplug_size, hotplugged_size"
        );
        assert_eq!(refusal(&["run"]), "unexpected argument \"run\"");
        for monitor in ["fd=-1", "fd=x", "path=", "/file"] {
            let refused = refusal(&["--event-monitor", monitor]);
            assert_eq!(refused, "--event-monitor: write path=FILE or fd=N");
        }
    }

    #[test]
    fn a_commands_standard_output_is_its_own() {
        assert!(refusal(&["--serial", "tty", "--", "true"]).starts_with("standard output is"));
    }
}
