//! The life of one VM that the command line describes, from options to exit
//! code.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::{
    DiskConfig, FsCache, FsConfig, HostPath, Output, PayloadConfig, Restore, TapSource,
    TransportConfig, VmConfig,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use thiserror::Error;

use crate::console::command::Command;
use crate::host::jail::{self, JailError};
use crate::host::terminal::{self, RawTerminal};
use crate::host::thread::{self, Kind};
use crate::host::{KvmKind, inherited, signals};
use crate::inbox::Ending;
use crate::programs::cli::{EventMonitor, RunOptions};
use crate::programs::guest::{GuestFolder, MissingPart, TransportError};
use crate::snapshot::{Loaded, RestoreError};
use crate::vm::{StartError, Vm, VmBuilder};

/// Lines of its console shown when a guest ends badly.
const LAST_LINES: usize = 12;

/// Why there was no VM to run.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    /// The process cannot give up what it does not need.
    #[error(transparent)]
    Filter(#[from] thread::FilterError),
    /// The host does not let podvmm make all of a jail that is required.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A default part is missing.
    #[error(transparent)]
    Guest(#[from] MissingPart),
    /// The default kernel's transport is not to be known.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The root file system is not there.
    #[error("root file system {}", .path.display())]
    Rootfs {
        /// Path of the root file system: a folder or an image.
        path: PathBuf,
        source: io::Error,
    },
    /// The VM could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// There is no such snapshot.
    #[error("--restore {}", .folder.display())]
    Restore {
        /// Folder where the snapshot should be.
        folder: PathBuf,
        source: RestoreError,
    },
    /// A descriptor that should be a tap is not usable as one.
    #[error("--net fd={fd}")]
    Tap {
        /// Number of the descriptor.
        fd: i32,
        source: io::Error,
    },
    /// Events cannot go where `--event-monitor` says.
    #[error("--event-monitor {monitor}")]
    EventMonitor {
        /// Where events were to go, as the option says it.
        monitor: String,
        source: io::Error,
    },
    /// Signals could not be watched.
    #[error("watch for signals")]
    Signals(#[source] io::Error),
    /// The terminal could not be made raw.
    #[error("set up the terminal")]
    Terminal(#[source] io::Error),
}

/// Runs podvmm to its end and returns its exit code: with `--api-socket` and
/// nothing to boot it serves clients, otherwise it runs the VM of the options. `log` is the file that is
/// logged to, if it is one.
pub(crate) fn run(options: &RunOptions, log: Option<&File>) -> Result<u8, RunError> {
    allow_many_descriptors();
    signals::survive_file_size_limit().map_err(RunError::Signals)?;
    let mut builder = VmBuilder::new();
    if let Some(monitor) = &options.event_monitor {
        builder = builder.events(event_monitor(monitor)?);
    }
    if let Some(socket) = &options.api_socket {
        builder = builder.api_socket(socket);
    }
    let subject = subject(options)?;
    KvmKind::of_this_host();
    jail::enter(&options.jail, &host_paths(options, &subject))?;
    thread::filter(Kind::Control, options.seccomp, log)?;
    let handle = builder.handle();
    signals::watch(move |signal| handle.signal(signal)).map_err(RunError::Signals)?;
    let (mut vm, terminal) = start(builder.started(), options, subject)?;
    let ending = vm.run();
    drop(terminal);
    report(&ending, !options.command.is_empty(), &vm);
    Ok(vm.exited(&ending))
}

/// What is to be run.
enum Subject {
    /// What clients of the API say.
    Clients,
    /// The VM of a snapshot.
    Snapshot(Box<VmConfig>, Box<Loaded>),
    /// A VM that boots.
    New(Box<VmConfig>),
}

/// What the options describe. What it takes to know that is opened.
fn subject(options: &RunOptions) -> Result<Subject, RunError> {
    if options.only_serves() {
        return Ok(Subject::Clients);
    }
    match &options.restore {
        Some(folder) => {
            let (config, loaded) = restored(options, folder)?;
            Ok(Subject::Snapshot(Box::new(config), Box::new(loaded)))
        }
        None => Ok(Subject::New(Box::new(config(options)?))),
    }
}

/// All of the host's files that are opened from here on.
fn host_paths(options: &RunOptions, subject: &Subject) -> Vec<HostPath> {
    let mut paths = vec![HostPath::write("/dev/kvm".as_ref())];
    paths.extend_from_slice(&options.jail_paths);
    paths.extend(options.api_socket.as_deref().map(HostPath::socket));
    paths.extend(options.restore.as_deref().map(HostPath::read));
    match subject {
        Subject::Clients => {}
        Subject::Snapshot(config, _) | Subject::New(config) => paths.extend(config.host_paths()),
    }
    paths
}

fn start(
    builder: VmBuilder,
    options: &RunOptions,
    subject: Subject,
) -> Result<(Vm, Option<RawTerminal>), RunError> {
    Ok(match subject {
        Subject::Clients => (builder.serve()?, None),
        Subject::Snapshot(config, loaded) => {
            let terminal = terminal(&config, None)?;
            let builder = builder.streams(None, terminal.is_some());
            (builder.revive(*config, *loaded, true)?, terminal)
        }
        Subject::New(config) => {
            let command = command(options);
            let terminal = terminal(&config, command.as_ref())?;
            let builder = builder.streams(command, terminal.is_some());
            (builder.boot(*config)?, terminal)
        }
    })
}

/// Where events are to go.
fn event_monitor(monitor: &EventMonitor) -> Result<File, RunError> {
    let open = match monitor {
        EventMonitor::Path(path) => OpenOptions::new()
            .append(true)
            .create(true)
            // A FIFO that no process reads is an error, and not waited for.
            .custom_flags(libc::O_NONBLOCK)
            .open(path),
        EventMonitor::Fd(fd) => inherited::duplicate(*fd).map(File::from),
    };
    open.map_err(|source| RunError::EventMonitor {
        monitor: monitor.to_string(),
        source,
    })
}

/// Connections of vsock and of the API each take one. What a shell allows is
/// made for programs that use select.
fn allow_many_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, all) {
        log::debug!("keep the limit of {:?} descriptors: {error}", limit.current);
    }
}

/// The VM that `options` describe.
fn config(options: &RunOptions) -> Result<VmConfig, RunError> {
    let folder = GuestFolder::of_this_user();
    let given = |path: &Option<PathBuf>| path.clone().map(Ok);
    let has_command = !options.command.is_empty();
    // A kernel that is named alone boots alone.
    let wants_agent = has_command
        || options.rootfs.is_some()
        || (options.kernel.is_none() && options.initramfs.is_none());

    let kernel = given(&options.kernel).unwrap_or_else(|| folder.kernel())?;
    let transport = match options.transport {
        Some(transport) => transport,
        None if options.kernel.is_none() => folder.transport()?,
        None => TransportConfig::default(),
    };
    let initramfs = given(&options.initramfs)
        .or_else(|| wants_agent.then(|| folder.initramfs()))
        .transpose()?;
    let mut vm = options.vm.clone();
    let mut cmdline = consoles(options, wants_agent);
    if wants_agent {
        let path = given(&options.rootfs).unwrap_or_else(|| folder.rootfs())?;
        let metadata = std::fs::metadata(&path).map_err(|source| RunError::Rootfs {
            path: path.clone(),
            source,
        })?;
        if metadata.is_dir() {
            cmdline.push_str(&format!(" root={ROOT_TAG} rootfstype=virtiofs"));
            vm.fs.insert(0, root_share(path));
        } else {
            cmdline.push_str(" root=/dev/vda");
            let disk = DiskConfig {
                path,
                readonly: true,
                ..DiskConfig::default()
            };
            vm.disks.insert(0, disk);
        }
        cmdline.push_str(" ro podvmm.overlay");
    }
    if !options.cmdline.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&options.cmdline);
    }
    Ok(VmConfig {
        payload: PayloadConfig {
            kernel,
            initramfs,
            cmdline,
            ..PayloadConfig::default()
        },
        transport,
        serial: serial(options),
        console: options.console.clone().unwrap_or(Output::Off),
        ..vm
    })
}

/// The VM of a snapshot, with what the options say is to be different.
fn restored(options: &RunOptions, folder: &Path) -> Result<(VmConfig, Loaded), RunError> {
    let mut restore = Restore::new(folder.into());
    restore.prefetch = options.prefetch;
    let mut differs = options.vm.json();
    for part in ["disks", "net", "fs", "vsock"] {
        if let Some(given) = differs.get_mut(part) {
            restore.patch[part] = given.take();
        }
    }
    for (part, output) in [("serial", &options.serial), ("console", &options.console)] {
        if let Some(output) = output {
            restore.patch[part] = json!(output);
        }
    }
    for net in &options.vm.net {
        if let Ok(TapSource::Inherited(numbers)) = net.source() {
            for fd in numbers {
                let tap = inherited::duplicate(*fd);
                restore
                    .fds
                    .push(tap.map_err(|source| RunError::Tap { fd: *fd, source })?);
            }
        }
    }
    let opened = Loaded::open(restore);
    let (loaded, config) = opened.map_err(|source| RunError::Restore {
        folder: folder.into(),
        source,
    })?;
    Ok((config, loaded))
}

/// The tag of the share that is the root file system.
const ROOT_TAG: &str = "podvmm.root";

/// A folder as root file system: what lies over it must be able to rely on it.
fn root_share(path: PathBuf) -> FsConfig {
    FsConfig {
        tag: ROOT_TAG.into(),
        shared_dir: Some(path),
        readonly: true,
        cache: FsCache::Always,
        ..FsConfig::default()
    }
}

fn serial(options: &RunOptions) -> Output {
    match (
        &options.serial,
        options.command.is_empty(),
        &options.console,
    ) {
        (Some(serial), _, _) => serial.clone(),
        (None, false, _) | (None, true, Some(Output::Tty)) => Output::Null,
        (None, true, _) => Output::Tty,
    }
}

/// Parameters that say where the kernel prints, and how much: each byte to a
/// serial port is an exit. With the agent only what is worth an alarm is
/// printed, from the first moment on.
fn consoles(options: &RunOptions, wants_agent: bool) -> String {
    let mut words = Vec::new();
    if wants_agent {
        words.push("quiet loglevel=1");
    }
    if serial(options) != Output::Off {
        words.push("earlycon=uart8250,io,0x3f8 console=ttyS0");
    }
    if options
        .console
        .as_ref()
        .is_some_and(|console| *console != Output::Off)
    {
        words.push("console=hvc0");
    }
    words.join(" ")
}

/// The command for the agent, which gets a terminal where podvmm has one.
fn command(options: &RunOptions) -> Option<Command> {
    let argv = options.command.clone();
    (!argv.is_empty()).then(|| Command {
        argv,
        terminal: terminal::size(),
    })
}

fn terminal(config: &VmConfig, command: Option<&Command>) -> Result<Option<RawTerminal>, RunError> {
    let console = config.serial == Output::Tty || config.console == Output::Tty;
    if console || command.is_some_and(|command| command.terminal.is_some()) {
        RawTerminal::enter().map_err(RunError::Terminal)
    } else {
        Ok(None)
    }
}

/// Says how it ended, if that needs to be said.
fn report(ending: &Ending, had_command: bool, vm: &Vm) {
    if *ending == Ending::Dismissed {
        return;
    }
    if ending.is_orderly(had_command) {
        log::info!("{ending}");
        return;
    }
    log::error!("{ending}");
    // What went to the terminal was seen there.
    let unseen =
        |config: &VmConfig| config.serial == Output::Null || config.console == Output::Null;
    if vm.config().is_some_and(unseen) {
        for line in vm.last_lines(LAST_LINES) {
            log::error!("guest: {line}");
        }
    }
}
