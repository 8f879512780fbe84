//! What containerd asks of its shims (containerd.task.v2.Task).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use prost::Message;
use protocol::agent::oci::{LinuxResources, Process};
use protocol::containerd::events::{Event, TaskCreate, TaskDelete, TaskExecAdded, TaskIo};
use protocol::containerd::figures;
use protocol::containerd::task::{
    CloseIoRequest, ConnectResponse, CreateTaskRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, Options, PidResponse, PidsResponse, ProcessInfo, ProcessRequest, ResizePtyRequest,
    SERVICES, ShutdownRequest, StateResponse, StatsResponse, UpdateTaskRequest, WaitResponse,
};
use protocol::containerd::{any, timestamp};
use protocol::ttrpc::{Call, Code, Service, Status};

use crate::agent::stdio::Paths;
use crate::config::DEFAULT_PATH;
use crate::host::turn::Turn;
use crate::pod::spec;
use crate::pod::{Creation, Pod};

/// The time between looks at whether a caller that waits for a process is still there.
const ORPHAN_PERIOD: Duration = Duration::from_secs(20);

/// How long a container of a pod that runs may keep a turn to start.
const MAX_TURN: Duration = Duration::from_secs(20);
/// The same for a pod's first container, with which the VM starts.
const MAX_BOOT: Duration = Duration::from_secs(300);

/// Answers for the pod.
pub(crate) struct Tasks {
    pod: Arc<Pod>,
    /// Where the shim is told to end.
    end: Sender<()>,
}

impl Tasks {
    pub(crate) fn new(pod: Arc<Pod>, end: Sender<()>) -> Self {
        Self { pod, end }
    }

    fn create(&self, request: CreateTaskRequest) -> Result<PidResponse, Status> {
        if !request.checkpoint.is_empty() {
            return Err(no_checkpoint());
        }
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let io = TaskIo {
            stdin: paths.stdin.clone(),
            stdout: paths.stdout.clone(),
            stderr: paths.stderr.clone(),
            terminal: paths.terminal,
        };
        // A guest that has no container yet is as it was built, however long it takes to boot.
        let most = if self.pod.is_empty() {
            MAX_BOOT
        } else {
            MAX_TURN
        };
        let turn = Turn::wait().for_at_most(most);
        let container = self.pod.create(Creation {
            id: request.id.clone(),
            bundle: PathBuf::from(&request.bundle),
            rootfs: request.rootfs.clone(),
            paths,
            config: config_path(request.options.as_ref()),
        })?;
        drop(turn);
        let pid = self.pod.pid_of(&container);
        self.pod.publish(Event::Create(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io),
            pid,
        }));
        Ok(PidResponse { pid })
    }

    fn start(&self, request: &ProcessRequest) -> Result<PidResponse, Status> {
        if request.exec_id.is_empty() {
            let _turn = Turn::wait().for_at_most(MAX_TURN);
            self.pod.start(&request.id)?;
        } else {
            self.pod.exec(&request.id, &request.exec_id)?;
        }
        let container = self.pod.container(&request.id)?;
        Ok(PidResponse {
            pid: self.pod.pid_of(&container),
        })
    }

    fn exec(&self, request: ExecProcessRequest) -> Result<Empty, Status> {
        let spec = request.spec.unwrap_or_default().value;
        let spec: Process = spec::parse(&spec, "the process").map_err(invalid)?;
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        self.pod
            .add_exec(&request.id, &request.exec_id, paths, spec)?;
        self.pod.publish(Event::ExecAdded(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
        }));
        Ok(Empty {})
    }

    fn delete(&self, request: ProcessRequest) -> Result<DeleteResponse, Status> {
        let container = self.pod.container(&request.id)?;
        let pid = self.pod.pid_of(&container);
        let exit = if request.exec_id.is_empty() {
            self.pod.delete(&request.id)?
        } else {
            self.pod.delete_exec(&request.id, &request.exec_id)?
        };
        let exited_at = Some(timestamp(exit.at));
        if request.exec_id.is_empty() {
            self.pod.publish(Event::Delete(TaskDelete {
                container_id: request.id,
                pid,
                exit_status: exit.status,
                exited_at,
                id: String::new(),
            }));
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at,
        })
    }

    fn state(&self, request: ProcessRequest) -> Result<StateResponse, Status> {
        let container = self.pod.container(&request.id)?;
        let process = self.pod.process(&request.id, &request.exec_id)?;
        let state = process.state();
        let paths = process.paths.clone();
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.display().to_string(),
            pid: if state.is_to_start() && !request.exec_id.is_empty() {
                0
            } else {
                self.pod.pid_of(&container)
            },
            status: state.number(),
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            terminal: paths.terminal,
            exit_status: state.exit().map_or(0, |exit| exit.status),
            exited_at: state.exit().map(|exit| timestamp(exit.at)),
            exec_id: request.exec_id,
        })
    }

    fn wait(&self, request: &ProcessRequest, call: &Call<'_>) -> Result<WaitResponse, Status> {
        let process = self.pod.process(&request.id, &request.exec_id)?;
        // containerd asks anew after it was started anew, and each call that waits holds a thread.
        let exit = process.wait_for(ORPHAN_PERIOD, || call.is_orphan());
        let exit = exit.ok_or_else(|| Status::new(Code::Cancelled, "the caller is gone"))?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        })
    }

    fn update(&self, request: UpdateTaskRequest) -> Result<Empty, Status> {
        let resources = request.resources.unwrap_or_default().value;
        let resources: LinuxResources =
            spec::parse(&resources, "the resources").map_err(invalid)?;
        self.pod.update(&request.id, resources)?;
        Ok(Empty {})
    }

    fn stats(&self, request: &ProcessRequest) -> Result<StatsResponse, Status> {
        let figures = self.pod.figures(&request.id)?;
        Ok(StatsResponse {
            stats: Some(any(figures::NAME, &figures)),
        })
    }

    fn pids(&self, request: &ProcessRequest) -> Result<PidsResponse, Status> {
        let container = self.pod.container(&request.id)?;
        // Those in the guest have no number here.
        let process = ProcessInfo {
            pid: self.pod.pid_of(&container),
            info: None,
        };
        Ok(PidsResponse {
            processes: vec![process],
        })
    }

    fn shutdown(&self, request: &ShutdownRequest) -> Empty {
        if self.pod.is_empty() || request.now {
            self.pod.end();
            self.pod.flush();
            // The main thread receives this. It ends the process only after this answer had
            // time to go out.
            let _ = self.end.send(());
        }
        Empty {}
    }
}

impl Service for Tasks {
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        if !SERVICES.contains(&call.service) {
            return Err(call.unimplemented());
        }
        match call.method {
            "Create" => call.answer(|request| self.create(request)),
            "Start" => call.answer(|request| self.start(&request)),
            "Delete" => call.answer(|request| self.delete(request)),
            "State" => call.answer(|request| self.state(request)),
            "Wait" => call.answer(|request| self.wait(&request, call)),
            "Kill" => call.answer(|request: KillRequest| {
                let KillRequest {
                    id,
                    exec_id,
                    signal,
                    all,
                } = request;
                self.pod.kill(&id, &exec_id, signal, all)?;
                Ok(Empty {})
            }),
            "Exec" => call.answer(|request| self.exec(request)),
            "ResizePty" => call.answer(|request: ResizePtyRequest| {
                let ResizePtyRequest {
                    id,
                    exec_id,
                    width,
                    height,
                } = request;
                self.pod.resize_terminal(&id, &exec_id, height, width)?;
                Ok(Empty {})
            }),
            "CloseIO" => call.answer(|request: CloseIoRequest| {
                if request.stdin {
                    self.pod.close_stdin(&request.id, &request.exec_id)?;
                }
                Ok(Empty {})
            }),
            "Pause" => call.answer(|request: ProcessRequest| {
                self.pod.pause(&request.id)?;
                Ok(Empty {})
            }),
            "Resume" => call.answer(|request: ProcessRequest| {
                self.pod.resume(&request.id)?;
                Ok(Empty {})
            }),
            "Update" => call.answer(|request| self.update(request)),
            "Stats" => call.answer(|request| self.stats(&request)),
            "Pids" => call.answer(|request| self.pids(&request)),
            "Connect" => call.answer(|request: ProcessRequest| {
                let container = self.pod.container(&request.id);
                let pod = |_| self.pod.pid();
                Ok(ConnectResponse {
                    shim_pid: std::process::id(),
                    task_pid: container.map_or_else(pod, |it| self.pod.pid_of(&it)),
                    version: env!("CARGO_PKG_VERSION").into(),
                })
            }),
            "Shutdown" => call.answer(|request: ShutdownRequest| Ok(self.shutdown(&request))),
            "Checkpoint" => Err(no_checkpoint()),
            _ => Err(call.unimplemented()),
        }
    }
}

fn no_checkpoint() -> Status {
    let why = "checkpoint is not possible: the container's processes are in the pod's VM";
    Status::new(Code::Unimplemented, why)
}

fn invalid(error: spec::Error) -> Status {
    Status::from(crate::pod::error::Error::from(error))
}

/// Whether it is the options of a runtime that containerd does not know itself.
pub(crate) fn is_options(any: &prost_types::Any) -> bool {
    any.type_url.ends_with("runtimeoptions.v1.Options")
}

/// Where the configuration is, by containerd's runtime options.
pub(crate) fn config_path(options: Option<&prost_types::Any>) -> PathBuf {
    let options = options.filter(|options| is_options(options));
    let options = options.and_then(|options| Options::decode(&options.value[..]).ok());
    let path = options
        .map(|options| options.config_path)
        .unwrap_or_default();
    if path.is_empty() {
        Path::new(DEFAULT_PATH).into()
    } else {
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_where_containerd_says() {
        let options = Options {
            config_path: "/x.toml".into(),
            ..Options::default()
        };
        let named = any("runtimeoptions.v1.Options", &options);
        assert_eq!(config_path(Some(&named)), Path::new("/x.toml"));
        let other = any("containerd.runc.v1.Options", &options);
        assert_eq!(config_path(Some(&other)), Path::new(DEFAULT_PATH));
        assert_eq!(config_path(None), Path::new(DEFAULT_PATH));
    }
}
