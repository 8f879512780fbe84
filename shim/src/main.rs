//! containerd's way to podvmm (containerd, runtime/v2/README.md): `start` says where a container's
//! shim answers, `delete` cleans up after one that is gone, and in between one process for each pod
//! serves containerd's Task service.

#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(fuzzing, allow(dead_code, reason = "a fuzzer calls what it fuzzes"))]

mod agent;
mod config;
mod containerd;
#[cfg(fuzzing)]
#[path = "../../fuzz/fuzz_targets/shim.rs"]
mod fuzz;
mod host;
mod pod;
mod vm;

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, SystemTime};

use prost::Message;
use protocol::ttrpc::{self, Service, Workers};

use config::Config;
use containerd::arguments::{Action, Arguments};
use containerd::orders::Orders;
use containerd::service::Tasks;
use host::phases::Phases;
use host::place::Place;
use pod::Pod;
use pod::publish::Publisher;
use pod::spec::hooks::Hooks;
use pod::waiting::Waiting;
use protocol::containerd::task::DeleteResponse;

const HELP: &str = "\
containerd-shim-podvmm-v2: runs pods in VMs for containerd, which starts it by itself
for the runtime io.containerd.podvmm.v2

  check [-config FILE]          say whether the configuration can be used
  template [-config FILE]       make the template that pods without limits start from
  pool [-config FILE]           have VMs wait for such pods, as many as it says; print how many
  runtime-class [-config FILE]  print the RuntimeClass for it, overhead included
  -version                      print the version

Without -config it is /etc/podvmm/config.toml. containerd itself uses:
  -namespace NS -address SOCKET -id ID [-bundle FOLDER] [-debug] start | delete
  -info                         say what the runtime can do
";

/// How long the answer to the last request has to be sent.
const FAREWELL: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("containerd-shim-podvmm-v2: {why}; see -help");
            return ExitCode::from(2);
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // No user sees the standard error of a shim that serves, so the log has it too.
            log::error!("{}", api::chain(&*error).join(": "));
            eprintln!(
                "containerd-shim-podvmm-v2: {}",
                api::chain(&*error).join(": ")
            );
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    // containerd may be held to some of the host's CPUs; pods are not.
    host::cpus::unpin();
    let path = arguments.config_path();
    let config = || Config::read(&path);
    match arguments.action {
        Action::Help => print!("{HELP}"),
        Action::Version => println!("containerd-shim-podvmm-v2 {}", env!("CARGO_PKG_VERSION")),
        Action::Check => println!("{:#?}", config()?),
        Action::Template => {
            host::logging::start(None, "template", level(arguments.debug));
            println!("{}", pod::waiting::template(&config()?)?.folder().display());
        }
        Action::Pool => {
            host::logging::start(None, "pool", level(arguments.debug));
            println!("{}", containerd::pool::adjust(&path, &config()?)?);
        }
        Action::Wait => {
            host::logging::start(None, "pool", level(arguments.debug));
            rustix::process::setsid()?;
            agent::stdio::reserve()?;
            if let Some(called) = containerd::pool::wait(&path, arguments.memory_mib)? {
                serve(&called.orders, called.listener, Some(called.waiting))?;
            }
        }
        Action::RuntimeClass => print!("{}", containerd::runtime_class::yaml(&config()?)),
        Action::Start => {
            let answer = containerd::start::start(arguments, &bundle(arguments)?)?;
            io::stdout().write_all(&answer)?;
        }
        Action::Info => {
            let info = containerd::info::info(containerd::start::Asked::read(arguments).options);
            io::stdout().write_all(&info.encode_to_vec())?;
        }
        Action::Delete => delete(arguments)?,
        Action::Serve => {
            rustix::process::setsid()?;
            let asked = std::env::var(containerd::start::ASKED).unwrap_or_default();
            let orders = Orders::new(arguments, Path::new("."), asked);
            let listener = listener()?;
            agent::stdio::reserve()?;
            serve(&orders, listener, None)?;
        }
    }
    Ok(())
}

/// The container's folder: where containerd says, or where it starts its shims.
fn bundle(arguments: &Arguments) -> io::Result<PathBuf> {
    match &arguments.bundle {
        Some(bundle) => Ok(bundle.clone()),
        None => std::env::current_dir(),
    }
}

/// Cleans up after a shim that is gone, or one that has no such container.
fn delete(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    host::logging::start(None, &arguments.id, level(arguments.debug));
    let bundle = bundle(arguments)?;
    let spec = pod::spec::read(&bundle).unwrap_or_default();
    let pod = pod::spec::pod_of(&arguments.id, &spec.annotations);
    if !containerd::arguments::is_id(pod) {
        return Err(format!("{pod:?} is no pod's name").into());
    }
    let place = Place::new(&arguments.address, &arguments.namespace, pod);
    let pid = host::record::Record::read(&place)
        .vmm
        .map_or(0, |(pid, _)| pid);
    if pod == arguments.id {
        pod::teardown::pod(&place);
    } else {
        pod::teardown::container(&place, &arguments.id);
    }
    Hooks::of(&spec, &arguments.id, &bundle).stopped();
    let gone = DeleteResponse {
        pid,
        exit_status: pod::task::KILLED,
        exited_at: Some(protocol::containerd::timestamp(SystemTime::now())),
    };
    io::stdout().write_all(&gone.encode_to_vec())?;
    Ok(())
}

fn level(debug: bool) -> log::LevelFilter {
    if debug {
        log::LevelFilter::Debug
    } else {
        log::LevelFilter::Info
    }
}

/// Serves containerd until it says that the pod is over.
fn serve(
    orders: &Orders,
    listener: UnixListener,
    mut waiting: Option<Waiting>,
) -> Result<(), Box<dyn Error>> {
    host::logging::start(Some(&orders.bundle), &orders.id, level(orders.debug));
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    let asked = host::phases::from_text(&orders.asked);
    let phases = Phases::since(asked.unwrap_or_else(SystemTime::now));
    let events = Publisher::start(orders.events.clone(), orders.namespace.clone())?;
    let place = orders.place();
    if let Some(waiting) = &mut waiting {
        waiting.moved(&place);
    }
    let pod = Pod::new(orders.id.clone(), place, events, phases, waiting);
    let (end, ended) = channel();
    let service: Arc<dyn Service> = Arc::new(Tasks::new(pod, end));
    thread::Builder::new()
        .name("accept".into())
        .stack_size(64 << 10)
        .spawn(move || accept(&listener, &service))?;
    ended.recv()?;
    thread::sleep(FAREWELL);
    Ok(())
}

fn listener() -> Result<UnixListener, Box<dyn Error>> {
    let number = std::env::var(containerd::start::LISTENER);
    let number = number.map_err(|_| "containerd starts the shim by itself; see -help")?;
    // SAFETY: the shim that started this process opened it for this one, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number.parse()?) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd.into())
}

fn accept(listener: &UnixListener, service: &Arc<dyn Service>) {
    let workers = Workers::default();
    for stream in listener.incoming() {
        let attend = |stream: std::os::unix::net::UnixStream| {
            let writer = stream.try_clone()?;
            let (service, workers) = (Arc::clone(service), workers.clone());
            let serve = move || drop(ttrpc::serve(stream, writer, &service, &workers));
            let thread = thread::Builder::new().name("connection".into());
            thread.stack_size(64 << 10).spawn(serve)
        };
        if let Err(error) = stream.and_then(attend) {
            log::error!("a connection: {error}");
            // Out of descriptors or threads, trying at once would not help.
            thread::sleep(Duration::from_millis(100));
        }
    }
}
