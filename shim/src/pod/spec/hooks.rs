//! Programs that a container's description has run at points of its life (OCI runtime specification,
//! config.json, "POSIX-platform Hooks"). Those of the runtime's namespace run here, on the host: so do
//! those by which nerdctl and docker make the container's network, in the namespace of the process that
//! they are told, which is podvmm's. Those of the container's namespaces would have to run in the guest,
//! where their programs are not, and are refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use protocol::agent::oci::{self, Hook, Spec};
use rustix::fs::MemfdFlags;
use serde::Serialize;

use crate::host::process::Process;
use crate::pod::spec;

/// How much of what a program says is told, in bytes.
const MAX_WORDS: u64 = 2048;

/// The name of a file that is in the bundle once poststop hooks have run.
const RAN: &str = "podvmm-poststop";

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("run {kind} hook {path}")]
    Run {
        kind: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("{kind} hook {path}: {status}: {}", .said.trim())]
    Failed {
        kind: &'static str,
        path: String,
        status: ExitStatus,
        said: String,
    },
}

/// A container's hooks, and what they are told of it.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    hooks: oci::Hooks,
    version: String,
    id: String,
    bundle: PathBuf,
    annotations: BTreeMap<String, String>,
}

/// What a hook reads (OCI runtime specification, runtime.md, "State").
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'static str,
    /// The number of the container's process. It is 0 once that has ended, and then not told.
    #[serde(skip_serializing_if = "is_none")]
    pid: u32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_none(pid: &u32) -> bool {
    *pid == 0
}

/// Refuses hooks that cannot run.
pub(crate) fn check(hooks: &oci::Hooks) -> Result<(), spec::Error> {
    let refused = |kind: &str, hook: &Hook, why| {
        Err(spec::Error::Impossible {
            what: format!("{kind} hook {}", hook.path),
            why,
        })
    };
    let in_guest = [
        ("createContainer", &hooks.create_container),
        ("startContainer", &hooks.start_container),
    ];
    for (kind, hooks) in in_guest {
        if let Some(hook) = hooks.first() {
            let why = "it is to run in the container's namespaces, which are in the pod's VM";
            return refused(kind, hook, why);
        }
    }
    let here = [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ];
    for (kind, hooks) in here {
        if let Some(hook) = hooks.iter().find(|hook| !hook.path.starts_with('/')) {
            return refused(kind, hook, "its path is not absolute");
        }
    }
    Ok(())
}

impl Hooks {
    /// The hooks of the container `id`, whose folder is `bundle`.
    pub(crate) fn of(spec: &Spec, id: &str, bundle: &Path) -> Self {
        Self {
            hooks: spec.hooks.clone().unwrap_or_default(),
            version: spec.version.clone(),
            id: id.into(),
            bundle: bundle.into(),
            annotations: spec.annotations.clone(),
        }
    }

    /// Runs the hooks of a container that is made. `pid` is a process in its pod's network
    /// namespace.
    pub(crate) fn created(&self, pid: u32) -> Result<(), Error> {
        self.run("prestart", &self.hooks.prestart, "creating", pid)?;
        let hooks = &self.hooks.create_runtime;
        self.run("createRuntime", hooks, "creating", pid)
    }

    /// Runs the hooks of a container that has started.
    pub(crate) fn started(&self, pid: u32) -> Result<(), Error> {
        self.run("poststart", &self.hooks.poststart, "running", pid)
    }

    /// Runs those of a container that is gone, all of them whatever became of the others, and once: the
    /// shim does when it deletes the container, and the `delete` command, which containerd always has run
    /// after that, if the shim could not. A file in the bundle tells that it has.
    pub(crate) fn stopped(&self) {
        if self.hooks.poststop.is_empty() {
            return;
        }
        match File::create_new(self.bundle.join(RAN)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return,
            Err(error) => log::warn!("{}: {RAN}: {error}", self.id),
            Ok(_) => {}
        }
        for hook in &self.hooks.poststop {
            let hook = std::slice::from_ref(hook);
            if let Err(error) = self.run("poststop", hook, "stopped", 0) {
                log::warn!("{}: {}", self.id, api::chain(&error).join(": "));
            }
        }
    }

    fn run(
        &self,
        kind: &'static str,
        hooks: &[Hook],
        status: &'static str,
        pid: u32,
    ) -> Result<(), Error> {
        let state = State {
            oci_version: &self.version,
            id: &self.id,
            status,
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        for hook in hooks {
            let path = hook.path.clone();
            match run(hook, &state, &self.bundle) {
                Ok((status, _)) if status.success() => {}
                Ok((status, said)) => {
                    return Err(Error::Failed {
                        kind,
                        path,
                        status,
                        said,
                    });
                }
                Err(source) => return Err(Error::Run { kind, path, source }),
            }
        }
        Ok(())
    }
}

/// Runs one to its end. Files in memory are its streams, so that neither waits for the other.
fn run(hook: &Hook, state: &State<'_>, bundle: &Path) -> io::Result<(ExitStatus, String)> {
    let mut input = memory()?;
    serde_json::to_writer(&input, state)?;
    input.flush()?;
    input.rewind()?;
    let mut output = memory()?;
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    let variables = hook.env.iter().filter_map(|line| line.split_once('='));
    command
        .env_clear()
        .envs(variables)
        .current_dir(bundle)
        .stdin(input)
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?);
    let mut child = command.spawn()?;
    let status = await_end(&mut child, hook.timeout)?;
    output.rewind()?;
    let mut said = Vec::new();
    output.take(MAX_WORDS).read_to_end(&mut said)?;
    Ok((status, String::from_utf8_lossy(&said).into_owned()))
}

/// Waits for it, but not longer than so many seconds, if that is above 0. It is killed then.
fn await_end(child: &mut Child, timeout: i64) -> io::Result<ExitStatus> {
    let timeout = u64::try_from(timeout).unwrap_or(0);
    if timeout > 0 {
        let ended = Process::open(child.id())
            .and_then(|process| process.await_end(Duration::from_secs(timeout)));
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
            let why = format!("it took longer than {timeout} s, and was killed");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    }
    child.wait()
}

fn memory() -> io::Result<File> {
    let file = rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["hook", "-c", script].map(String::from).to_vec(),
            env: vec!["TO=it".into(), "PATH=/usr/bin:/bin".into()],
            timeout: 0,
        }
    }

    fn hooks(bundle: &Path, hooks: oci::Hooks) -> Hooks {
        let spec = Spec {
            version: "1.0.2".into(),
            annotations: [("a".into(), "b".into())].into(),
            hooks: Some(hooks),
            ..Spec::default()
        };
        Hooks::of(&spec, "c", bundle)
    }

    #[test]
    fn each_is_told_the_state_at_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let writes = |name: &str| vec![shell(&format!("{{ cat; echo \" $0 $TO\"; }} >>{name}"))];
        let hooks = hooks(
            folder.path(),
            oci::Hooks {
                prestart: writes("said"),
                create_runtime: writes("said"),
                poststart: writes("said"),
                poststop: writes("said"),
                ..oci::Hooks::default()
            },
        );
        hooks.created(7).unwrap();
        hooks.started(7).unwrap();
        hooks.stopped();
        // As the command that cleans up after a shim does, be it dead or not.
        hooks.stopped();
        let said = std::fs::read_to_string(folder.path().join("said")).unwrap();
        let bundle = folder.path().display();
        let state = |status: &str, pid: &str| {
            format!(
                "{{\"ociVersion\":\"1.0.2\",\"id\":\"c\",\"status\":\"{status}\",{pid}\
                 \"bundle\":\"{bundle}\",\"annotations\":{{\"a\":\"b\"}}}} hook it\n"
            )
        };
        let creating = state("creating", "\"pid\":7,");
        let running = state("running", "\"pid\":7,");
        let expected = [&creating, &creating, &running, &state("stopped", "")];
        assert_eq!(said, expected.map(String::as_str).concat());
    }

    #[test]
    fn the_first_that_fails_is_the_last_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let fails = shell("echo oops >&2; exit 3");
        let create_runtime = vec![fails.clone(), shell("touch not-there")];
        let poststop = vec![fails, shell("touch there")];
        let all = oci::Hooks {
            create_runtime,
            poststop,
            ..oci::Hooks::default()
        };
        let hooks = hooks(folder.path(), all);
        let error = hooks.created(1).unwrap_err().to_string();
        assert_eq!(error, "createRuntime hook /bin/sh: exit status: 3: oops");
        assert!(!folder.path().join("not-there").exists());
        hooks.stopped();
        assert!(folder.path().join("there").exists());
    }

    #[test]
    fn one_that_takes_too_long_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let slow = Hook {
            timeout: 1,
            ..shell("sleep 1000")
        };
        let prestart = vec![slow];
        let all = oci::Hooks {
            prestart,
            ..oci::Hooks::default()
        };
        let error = hooks(folder.path(), all).created(1).unwrap_err();
        let said = api::chain(&error).join(": ");
        let expected = "run prestart hook /bin/sh: it took longer than 1 s, and was killed";
        assert_eq!(said, expected);
    }

    #[test]
    fn what_would_run_in_the_guest_is_refused() {
        let create_container = vec![shell("")];
        let refused = check(&oci::Hooks {
            create_container,
            ..oci::Hooks::default()
        });
        let said = refused.unwrap_err().to_string();
        let expected = "createContainer hook /bin/sh is not possible: it is to run in the \
                        container's namespaces, which are in the pod's VM";
        assert_eq!(said, expected);
        let poststop = vec![Hook {
            path: "bin/sh".into(),
            ..Hook::default()
        }];
        let refused = check(&oci::Hooks {
            poststop,
            ..oci::Hooks::default()
        });
        let said = refused.unwrap_err().to_string();
        let expected = "poststop hook bin/sh is not possible: its path is not absolute";
        assert_eq!(said, expected);
    }
}
