//! `start`: containerd wants to know where a container's shim answers. A pod's first container gets
//! a new shim, the others that one.
//!
//! It is told in the newest form that it understands: an address as text, from 1.7 on the address with
//! versions as JSON, and from 2.3 on the same as protobuf if that is how it asked.

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use prost::Message;
use prost_types::Any;
use protocol::agent::oci::Spec;
use protocol::containerd::bootstrap::{BootstrapParams, BootstrapResult, LOG_LEVEL_DEBUG};

use crate::config::Config;
use crate::containerd::arguments::Arguments;
use crate::containerd::orders::{EVENTS, Orders};
use crate::containerd::pool::{self, Pool};
use crate::containerd::service::{config_path, is_options};
use crate::host::labels::Labels;
use crate::host::phases;
use crate::host::place::{Place, make_private};
use crate::pod::{guest, spec, teardown};

/// The environment variable that tells the shim that is to serve which descriptor it listens on.
pub(crate) const LISTENER: &str = "PODVMM_SHIM_LISTENER";
/// Longest standard input that is read, in bytes: the runtime's options, or with them a pod's whole
/// description.
const MAX_INPUT_LEN: u64 = 4 << 20;
/// The environment variable by which containerd from 1.7 on says that it knows JSON.
const KNOWS_VERSIONS: &str = "MAX_SHIM_VERSION";
/// The version of the service that containerd then uses. The next differs in that containerd does not
/// start shims for a pod's other containers.
const VERSION: i32 = 2;
/// The environment variable that tells the shim that is to serve when it was asked for.
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

/// What containerd says on standard input when it starts a shim.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Asked {
    /// What containerd from 2.3 on says when it asks for a shim.
    params: Option<BootstrapParams>,
    /// The runtime's options.
    pub(crate) options: Option<Any>,
}

impl Asked {
    /// Reads standard input to its end. A person with a terminal there says nothing.
    pub(crate) fn read(arguments: &Arguments) -> Self {
        let mut input = Vec::new();
        let mut stdin = io::stdin();
        if !stdin.is_terminal() {
            let mut stdin = stdin.by_ref().take(MAX_INPUT_LEN);
            if let Err(error) = stdin.read_to_end(&mut input) {
                // The defaults are as good as what is not known.
                log::debug!("read standard input: {error}");
            }
        }
        Self::parse(&input, arguments)
    }

    /// Reads what containerd sent. Older ones send options alone, which may look like the newer
    /// form, but for whose pod it is.
    pub(crate) fn parse(input: &[u8], arguments: &Arguments) -> Self {
        let params = BootstrapParams::decode(input).ok().filter(|params| {
            params.instance_id == arguments.id && params.namespace == arguments.namespace
        });
        if let Some(params) = params {
            let values = params.extensions.iter();
            let mut values = values.filter_map(|extension| extension.value.as_ref());
            return Self {
                options: values.find(|value| is_options(value)).cloned(),
                params: Some(params),
            };
        }
        let options = Any::decode(input).ok();
        Self {
            params: None,
            options: options.filter(|options| !options.type_url.is_empty()),
        }
    }

    /// The command line with what it leaves out.
    pub(crate) fn complete(&self, arguments: &Arguments) -> Arguments {
        let mut arguments = arguments.clone();
        if let Some(params) = &self.params {
            arguments.debug |= params.log_level <= LOG_LEVEL_DEBUG;
            if arguments.address.is_empty() {
                arguments.address = path_of(&params.containerd_grpc_address).into();
            }
            arguments.events = Some(path_of(&params.containerd_ttrpc_address))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from);
        }
        arguments
    }

    /// What containerd is told of the shim at `address`.
    fn answer(&self, address: String, knows_versions: bool) -> Vec<u8> {
        let result = BootstrapResult {
            version: VERSION,
            address,
            protocol: "ttrpc".into(),
        };
        if self.params.is_some() {
            result.encode_to_vec()
        } else if knows_versions {
            serde_json::to_vec(&result).expect("it is made of texts and a number")
        } else {
            result.address.into_bytes()
        }
    }
}

/// A socket's path by containerd's address of it.
fn path_of(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

/// Returns what containerd is to be told of the shim for the container that is described in `bundle`.
pub(crate) fn start(arguments: &Arguments, bundle: &Path) -> Result<Vec<u8>, Error> {
    let asked = Asked::read(arguments);
    let address = shim(&asked.complete(arguments), bundle, &asked)?;
    let knows_versions = std::env::var_os(KNOWS_VERSIONS).is_some();
    Ok(asked.answer(address, knows_versions))
}

/// The address of the shim, which is started if there is none.
fn shim(arguments: &Arguments, bundle: &Path, asked: &Asked) -> Result<String, Error> {
    let since = phases::to_text(SystemTime::now());
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
                // The folder is left from a pod whose shim was killed; no other process has
                // cleaned up after it.
                teardown::pod(&place);
            }
            let pool = pool(&spec, asked);
            if let Err(error) = begin(arguments, bundle, pool.as_ref(), &place, &since) {
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
    pool: Option<&Pool>,
    place: &Place,
    asked: &str,
) -> Result<(), Error> {
    let orders = Orders::new(arguments, bundle, asked.into());
    let above = place.path().parent().unwrap_or_else(|| place.path());
    make_private(above).map_err(io_error("make", above))?;
    let mut waited = pool.is_some_and(|pool| pool.take(place));
    if waited && pool::hand_over(place, &orders).is_err() {
        // It has died, or does not answer.
        teardown::pod(place);
        waited = false;
    }
    if !waited {
        spawn(arguments, bundle, place, asked)?;
    }
    // The pod is not to fail for those that come after it.
    let _ = pool.map(Pool::fill);
    Ok(())
}

/// The pool that VMs for such a pod wait in.
fn pool(spec: &Spec, asked: &Asked) -> Option<Pool> {
    // The options come here as they come with the first container later.
    let path = config_path(asked.options.as_ref());
    let config = Config::read(&path).ok()?;
    // A podvmm that runs has its labels.
    if config.pool == 0 || !Labels::of(spec, config.labels).are_none() {
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
        .envs(arguments.events.iter().map(|path| (EVENTS, path)))
        // One heap for all threads: they are many, and each does little.
        .env("MALLOC_ARENA_MAX", "1")
        .current_dir(bundle)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(io_error("start", &program))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::containerd::any;
    use protocol::containerd::bootstrap::Extension;
    use protocol::containerd::task::Options;

    fn arguments() -> Arguments {
        let line = "-namespace k8s.io -id pod -publish-binary /b start";
        Arguments::parse(line.split(' ').map(Into::into)).unwrap()
    }

    fn options() -> Any {
        let options = Options {
            config_path: "/x.toml".into(),
            ..Options::default()
        };
        any("runtimeoptions.v1.Options", &options)
    }

    fn params() -> BootstrapParams {
        let extensions = [any("containerd.io/cri.v1.PodSandboxConfig", &()), options()];
        BootstrapParams {
            instance_id: "pod".into(),
            namespace: "k8s.io".into(),
            log_level: LOG_LEVEL_DEBUG,
            containerd_ttrpc_address: "unix:///run/c.sock.ttrpc".into(),
            containerd_grpc_address: "/run/c.sock".into(),
            extensions: extensions
                .map(|value| Extension { value: Some(value) })
                .into(),
        }
    }

    #[test]
    fn a_newer_containerd_says_all_of_it_in_one_message() {
        let asked = Asked::parse(&params().encode_to_vec(), &arguments());
        assert_eq!(asked.options, Some(options()));
        let complete = asked.complete(&arguments());
        assert!(complete.debug);
        assert_eq!(complete.address, "/run/c.sock");
        assert_eq!(complete.events, Some("/run/c.sock.ttrpc".into()));
        let answer = asked.answer("unix:///a".into(), true);
        let answer = BootstrapResult::decode(&answer[..]).unwrap();
        assert_eq!((answer.version, &*answer.protocol), (2, "ttrpc"));
        assert_eq!(answer.address, "unix:///a");
    }

    #[test]
    fn an_older_one_sends_options_or_nothing() {
        let asked = Asked::parse(&options().encode_to_vec(), &arguments());
        assert_eq!((&asked.params, &asked.options), (&None, &Some(options())));
        let text = |knows_versions| {
            let answer = asked.answer("unix:///a".into(), knows_versions);
            String::from_utf8(answer).unwrap()
        };
        assert_eq!(text(false), "unix:///a");
        let json = r#"{"version":2,"address":"unix:///a","protocol":"ttrpc"}"#;
        assert_eq!(text(true), json);
        for nothing in [&b""[..], b"nonsense", &[0xff; 40]] {
            assert_eq!(Asked::parse(nothing, &arguments()), Asked::default());
        }
    }

    #[test]
    fn what_is_said_of_another_pod_is_not_for_this_one() {
        let mut other = params();
        other.instance_id = "other".into();
        let asked = Asked::parse(&other.encode_to_vec(), &arguments());
        assert_eq!(asked.params, None);
        // A newer containerd that takes the older answer cannot take the newer one for it, nor back.
        for knows_versions in [false, true] {
            let answer = asked.answer("unix:///run/podvmm/a/shim.sock".into(), knows_versions);
            assert!(BootstrapResult::decode(&answer[..]).is_err());
        }
    }
}
