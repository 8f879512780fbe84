//! `start`: containerd wants to know where a container's shim answers. A pod's first container gets
//! a new shim, the others that one.

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use ::agent::protocol::oci::Spec;
use prost::Message;
use prost_types::Any;

use crate::arguments::Arguments;
use crate::config::Config;
use crate::guest;
use crate::orders::Orders;
use crate::phases;
use crate::place::{Place, make_private};
use crate::pool::{self, Pool};
use crate::service::config_path;
use crate::spec;
use crate::teardown;

/// Tells the shim that is to serve which descriptor it listens on.
pub(crate) const LISTENER: &str = "PODVMM_SHIM_LISTENER";
/// Of what containerd says of the runtime, in bytes.
const LONGEST: u64 = 64 << 10;
/// Tells it when it was asked for.
pub(crate) const ASKED: &str = "PODVMM_SHIM_ASKED";

/// Why there is no shim.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error("the pod {0} has no shim")]
    NoPod(String),
    #[error("the pod {0} has a shim already")]
    Exists(String),
    #[error("{act} {}", .path.display())]
    Io {
        act: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

fn io_error<'a>(act: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io {
        act,
        path: path.into(),
        source,
    }
}

/// Returns the address of the shim for the container that is described in `bundle`.
pub(crate) fn start(arguments: &Arguments, bundle: &Path) -> Result<String, Error> {
    let asked = phases::to_text(SystemTime::now());
    let spec = spec::read(bundle)?;
    let pod = spec::pod_of(&arguments.id, &spec.annotations);
    let place = Place::new(&arguments.address, &arguments.namespace, pod);
    let socket = place.shim();
    let is_there = UnixStream::connect(&socket).is_ok();
    match (pod == arguments.id, is_there) {
        (true, true) => return Err(Error::Exists(pod.into())),
        (false, false) => return Err(Error::NoPod(pod.into())),
        (false, true) => {}
        (true, false) => {
            if place.path().exists() {
                // Of a pod whose shim was killed, and after which nobody cleaned up.
                teardown::pod(&place);
            }
            if let Err(error) = begin(arguments, bundle, &spec, &place, &asked) {
                teardown::pod(&place);
                return Err(error);
            }
        }
    }
    let address = format!("unix://{}", socket.display());
    // containerd looks there after it was started anew.
    let file = bundle.join("address");
    fs::write(&file, &address).map_err(io_error("write", &file))?;
    Ok(address)
}

/// Gives the pod a shim that waited, with its VM, or else starts one.
fn begin(
    arguments: &Arguments,
    bundle: &Path,
    spec: &Spec,
    place: &Place,
    asked: &str,
) -> Result<(), Error> {
    let pool = pool(spec);
    let orders = Orders::new(arguments, bundle, asked.into());
    let above = place.path().parent().unwrap_or_else(|| place.path());
    make_private(above).map_err(io_error("make", above))?;
    let mut waited = pool.as_ref().is_some_and(|pool| pool.take(place));
    if waited && pool::hand_over(place, &orders).is_err() {
        // It has died, or does not answer.
        teardown::pod(place);
        waited = false;
    }
    if !waited {
        spawn(arguments, bundle, place, asked)?;
    }
    // The pod is not to fail for those that come after it.
    let _ = pool.map(|pool| pool.fill());
    Ok(())
}

/// The pool that VMs for such a pod wait in.
fn pool(spec: &Spec) -> Option<Pool> {
    let mut options = Vec::new();
    let mut stdin = io::stdin();
    if !stdin.is_terminal() {
        // They come here as they come with the first container later.
        stdin
            .by_ref()
            .take(LONGEST)
            .read_to_end(&mut options)
            .ok()?;
    }
    let options = Any::decode(&options[..]).ok();
    let path = config_path(options.as_ref());
    let config = Config::read(&path).ok()?;
    if config.pool == 0 {
        return None;
    }
    let config = config.for_pod(&spec.annotations).ok()?;
    let template = guest::template_of(&config, spec).ok()??;
    Pool::of(&path, &config, &template)
}

/// Starts the shim that serves, which goes on when this process has ended.
fn spawn(arguments: &Arguments, bundle: &Path, place: &Place, asked: &str) -> Result<(), Error> {
    make_private(place.path()).map_err(io_error("make", place.path()))?;
    let socket = place.shim();
    let listener = UnixListener::bind(&socket).map_err(io_error("listen on", &socket))?;
    let keep = rustix::io::FdFlags::empty();
    rustix::io::fcntl_setfd(listener.as_fd(), keep)
        .map_err(|errno| io_error("pass on", &socket)(errno.into()))?;
    let program = std::env::current_exe().map_err(io_error("find", Path::new("/proc/self/exe")))?;
    let mut command = Command::new(&program);
    command
        .args(arguments.to_serve())
        .env(LISTENER, listener.as_raw_fd().to_string())
        .env(ASKED, asked)
        // One heap for all threads: they are many, and each does little.
        .env("MALLOC_ARENA_MAX", "1")
        .current_dir(bundle)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(io_error("start", &program))?;
    Ok(())
}
