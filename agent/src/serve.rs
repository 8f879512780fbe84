//! The pod's agent: answers the Kata agent's protocol on vsock port 1024 until the sandbox is
//! destroyed.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use agent::protocol::agent::{
    AddArpNeighborsRequest, AgentDetails, CheckRequest, CloseStdinRequest, CreateContainerRequest,
    CreateSandboxRequest, DestroySandboxRequest, Empty, ExecProcessRequest, GetOomEventRequest,
    GuestDetailsRequest, GuestDetailsResponse, HealthCheckResponse, Interfaces,
    ListInterfacesRequest, ListRoutesRequest, OnlineCpuMemRequest, OomEvent, PauseContainerRequest,
    ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest, ReseedRandomDevRequest,
    ResumeContainerRequest, Routes, ServingStatus, SetGuestDateTimeRequest, SignalProcessRequest,
    StartContainerRequest, StatsContainerRequest, StatsContainerResponse, TtyWinResizeRequest,
    UpdateContainerRequest, UpdateInterfaceRequest, UpdateRoutesRequest, VersionCheckResponse,
    WaitProcessRequest, WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
};
use agent::protocol::{AGENT_SERVICE, HEALTH_SERVICE, PORT};
use agent::ttrpc::{self, Call, Code, Service, Status, Workers};
use rustix::fs::inotify;

use crate::container::{Container, Process};
use crate::reaper::Reaper;
use crate::storage::{DRIVERS, Storages};
use crate::{describe, network, sys};

/// The version of the protocol, as the Kata agent gives it.
const GRPC_VERSION: &str = "0.0.1";

/// The pod in this guest.
struct Sandbox {
    containers: Mutex<HashMap<String, Held>>,
    storages: Storages,
    reaper: Reaper,
    /// Says that a container's count of kills for want of memory may have changed.
    kills: OwnedFd,
    ooms: Mutex<Receiver<String>>,
    ended: Sender<()>,
}

/// A container and the storage it needs.
struct Held {
    container: Arc<Container>,
    storages: Vec<String>,
}

/// Serves until the sandbox is destroyed.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    let (oom, ooms) = channel();
    let (ended, end) = channel();
    let sandbox = Arc::new(Sandbox {
        containers: Mutex::default(),
        storages: Storages::default(),
        reaper: Reaper::start()?,
        kills: inotify::init(inotify::CreateFlags::CLOEXEC)?,
        ooms: Mutex::new(ooms),
        ended,
    });
    let watched = Arc::clone(&sandbox);
    thread::Builder::new()
        .name("oom".into())
        .spawn(move || watched.watch_kills(&oom))?;
    let listener = vsock::VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, PORT)?;
    let service: Arc<dyn Service> = sandbox;
    thread::Builder::new()
        .name("accept".into())
        .spawn(move || {
            let workers = Workers::default();
            for stream in listener.incoming() {
                if let Err(error) = stream.and_then(|stream| attend(stream, &service, &workers)) {
                    crate::say(&format!("a connection: {error}"));
                }
            }
        })?;
    end.recv()?;
    Ok(())
}

fn attend(
    stream: vsock::VsockStream,
    service: &Arc<dyn Service>,
    workers: &Workers,
) -> io::Result<()> {
    let (writer, service, workers) = (stream.try_clone()?, Arc::clone(service), workers.clone());
    // A host that says nonsense, or is gone, has ended its connection and no more.
    let serve = move || drop(ttrpc::serve(stream, writer, &service, &workers));
    thread::Builder::new()
        .name("connection".into())
        .spawn(serve)?;
    Ok(())
}

impl Service for Sandbox {
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.service {
            HEALTH_SERVICE => health(call),
            AGENT_SERVICE => self.agent(call),
            _ => Err(call.unimplemented()),
        }
    }
}

fn health(call: &Call<'_>) -> Result<Vec<u8>, Status> {
    match call.method {
        "Check" => call.answer(|_: CheckRequest| {
            Ok(HealthCheckResponse {
                status: ServingStatus::Serving.into(),
            })
        }),
        "Version" => call.answer(|_: CheckRequest| {
            Ok(VersionCheckResponse {
                grpc_version: GRPC_VERSION.into(),
                agent_version: env!("CARGO_PKG_VERSION").into(),
            })
        }),
        _ => Err(call.unimplemented()),
    }
}

impl Sandbox {
    fn agent(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
            "CreateSandbox" => call.answer(|request| self.create_sandbox(request)),
            "DestroySandbox" => call.answer(|request| self.destroy_sandbox(request)),
            "GetGuestDetails" => call.answer(|request| Ok(details(request))),
            "CreateContainer" => call.answer(|request| self.create_container(request)),
            "StartContainer" => call.answer(|request: StartContainerRequest| {
                let container = self.container(&request.container_id)?;
                container.first().go_on().map_err(internal)?;
                Ok(Empty {})
            }),
            "RemoveContainer" => call.answer(|request| self.remove_container(request)),
            "ExecProcess" => call.answer(|request: ExecProcessRequest| {
                let container = self.container(&request.container_id)?;
                let process = request.process.ok_or_else(|| missing("process"))?;
                if container.process(&request.exec_id).is_some() {
                    let why = format!("{} is there already", request.exec_id);
                    return Err(Status::new(Code::AlreadyExists, why));
                }
                container
                    .exec(&request.exec_id, process, &self.reaper)
                    .map_err(internal)?;
                Ok(Empty {})
            }),
            "SignalProcess" => call.answer(|request| self.signal(request)),
            "WaitProcess" => call.answer(|request: WaitProcessRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                let status = process.end.wait().into();
                if let Ok(container) = self.container(&request.container_id) {
                    container.forget(&request.exec_id);
                }
                Ok(WaitProcessResponse { status })
            }),
            "ReadStdout" => call.answer(|request| self.read(request, false)),
            "ReadStderr" => call.answer(|request| self.read(request, true)),
            "WriteStdin" => call.answer(|request: WriteStreamRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                process.write(&request.data).map_err(internal_io)?;
                let len = u32::try_from(request.data.len()).expect("fits a message");
                Ok(WriteStreamResponse { len })
            }),
            "CloseStdin" => call.answer(|request: CloseStdinRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                process.write(&[]).map_err(internal_io)?;
                Ok(Empty {})
            }),
            "TtyWinResize" => call.answer(|request: TtyWinResizeRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
                let resized = process.resize(cells(request.row), cells(request.column));
                resized.map_err(|error| Status::new(Code::FailedPrecondition, error))?;
                Ok(Empty {})
            }),
            "UpdateContainer" => call.answer(|request: UpdateContainerRequest| {
                let container = self.container(&request.container_id)?;
                let resources = request.resources.unwrap_or_default();
                container.cgroup().limit(&resources).map_err(internal)?;
                Ok(Empty {})
            }),
            "StatsContainer" => call.answer(|request: StatsContainerRequest| {
                let container = self.container(&request.container_id)?;
                Ok(StatsContainerResponse {
                    cgroup_stats: Some(container.cgroup().stats()),
                    network_stats: Vec::new(),
                })
            }),
            "PauseContainer" => call
                .answer(|request: PauseContainerRequest| self.freeze(&request.container_id, true)),
            "ResumeContainer" => call.answer(|request: ResumeContainerRequest| {
                self.freeze(&request.container_id, false)
            }),
            "GetOOMEvent" => call.answer(|_: GetOomEventRequest| {
                let ooms = self.ooms.lock().expect("a panic ends the process");
                let container_id = ooms.recv().map_err(internal)?;
                Ok(OomEvent { container_id })
            }),
            "UpdateInterface" => call.answer(|request: UpdateInterfaceRequest| {
                let interface = request.interface.ok_or_else(|| missing("interface"))?;
                Ok(network::update_interface(interface)?)
            }),
            "UpdateRoutes" => call.answer(|request: UpdateRoutesRequest| {
                let routes = request.routes.unwrap_or_default().routes;
                let routes = network::update_routes(routes)?;
                Ok(Routes { routes })
            }),
            "AddARPNeighbors" => call.answer(|request: AddArpNeighborsRequest| {
                network::add_neighbours(&request.neighbors.unwrap_or_default().neighbors)?;
                Ok(Empty {})
            }),
            "ListInterfaces" => call.answer(|_: ListInterfacesRequest| {
                let interfaces = network::list_interfaces()?;
                Ok(Interfaces { interfaces })
            }),
            "ListRoutes" => call.answer(|_: ListRoutesRequest| {
                let routes = network::list_routes()?;
                Ok(Routes { routes })
            }),
            "OnlineCPUMem" => call.answer(online),
            "SetGuestDateTime" => call.answer(|request: SetGuestDateTimeRequest| {
                sys::set_time(request.sec, request.usec).map_err(internal_io)?;
                Ok(Empty {})
            }),
            "ReseedRandomDev" => call.answer(|request: ReseedRandomDevRequest| {
                sys::add_entropy(&request.data).map_err(internal_io)?;
                Ok(Empty {})
            }),
            _ => Err(call.unimplemented()),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.containers.lock().expect("a panic ends the process")
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        let containers = self.containers();
        let held = containers.get(id);
        held.map(|held| Arc::clone(&held.container))
            .ok_or_else(|| Status::new(Code::NotFound, format!("there is no container {id}")))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Status> {
        self.container(id)?.process(exec_id).ok_or_else(|| {
            Status::new(
                Code::NotFound,
                format!("there is no process {exec_id} in {id}"),
            )
        })
    }

    fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<Empty, Status> {
        if let Some(module) = request.kernel_modules.first() {
            let why = format!("kernel module {}: the guest's kernel has none", module.name);
            return Err(Status::new(Code::InvalidArgument, why));
        }
        if request.sandbox_pidns {
            let why = "containers that share one pid namespace are not supported";
            return Err(Status::new(Code::Unimplemented, why));
        }
        if !request.hostname.is_empty() {
            sys::set_hostname(&request.hostname).map_err(internal_io)?;
        }
        for storage in &request.storages {
            self.storages.add(storage)?;
        }
        Ok(Empty {})
    }

    fn destroy_sandbox(&self, _: DestroySandboxRequest) -> Result<Empty, Status> {
        for held in self.containers().values() {
            let _ = held.container.cgroup().kill();
        }
        self.ended.send(()).map_err(internal)?;
        Ok(Empty {})
    }

    fn create_container(&self, request: CreateContainerRequest) -> Result<Empty, Status> {
        let id = request.container_id;
        let spec = request.oci.ok_or_else(|| missing("OCI"))?;
        if self.containers().contains_key(&id) {
            return Err(Status::new(
                Code::AlreadyExists,
                format!("{id} is there already"),
            ));
        }
        if let Some(device) = request.devices.first() {
            let why = format!(
                "device {}: devices of the host are not supported",
                device.container_path
            );
            return Err(Status::new(Code::Unimplemented, why));
        }
        let mut storages = Vec::new();
        let made = request.storages.iter().try_for_each(|storage| {
            self.storages.add(storage)?;
            storages.push(storage.mount_point.clone());
            Ok(())
        });
        let made = made.and_then(|()| Container::create(&id, spec, &self.reaper).map_err(internal));
        let container = made.inspect_err(|_| {
            storages
                .iter()
                .for_each(|place| self.storages.remove(place));
        })?;
        let container = Arc::new(container);
        let events = container.cgroup().events();
        let watched = inotify::add_watch(&self.kills, events, inotify::WatchFlags::MODIFY);
        watched.map_err(|errno| internal_io(errno.into()))?;
        self.containers().insert(
            id,
            Held {
                container,
                storages,
            },
        );
        Ok(Empty {})
    }

    fn remove_container(&self, request: RemoveContainerRequest) -> Result<Empty, Status> {
        let container = self.container(&request.container_id)?;
        container.cgroup().kill().map_err(internal)?;
        let end = &container.first().end;
        match request.timeout {
            0 => drop(end.wait()),
            seconds => {
                let ended = end.wait_for(Duration::from_secs(seconds.into()));
                let why = || format!("{} has not ended", request.container_id);
                ended.ok_or_else(|| Status::new(Code::DeadlineExceeded, why()))?;
            }
        }
        if let Some(held) = self.containers().remove(&request.container_id) {
            held.storages
                .iter()
                .for_each(|place| self.storages.remove(place));
        }
        Ok(Empty {})
    }

    fn signal(&self, request: SignalProcessRequest) -> Result<Empty, Status> {
        let container = self.container(&request.container_id)?;
        let signal = i32::try_from(request.signal);
        let signal = signal.map_err(|error| Status::new(Code::InvalidArgument, error))?;
        let all = request.exec_id.is_empty() && signal == libc::SIGKILL;
        if all {
            container.cgroup().kill().map_err(internal)?;
            return Ok(Empty {});
        }
        let process = self.process(&request.container_id, &request.exec_id)?;
        // One that has no program yet would not hear of it.
        let signal = if process.waits() {
            libc::SIGKILL
        } else {
            signal
        };
        process.signal(signal).map_err(internal_io)?;
        Ok(Empty {})
    }

    fn read(&self, request: ReadStreamRequest, error: bool) -> Result<ReadStreamResponse, Status> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let len = request.len.min(ttrpc::MAX_MESSAGE / 2) as usize;
        let data = process.read(error, len);
        Ok(ReadStreamResponse { data })
    }

    fn freeze(&self, id: &str, frozen: bool) -> Result<Empty, Status> {
        let container = self.container(id)?;
        container.cgroup().freeze(frozen).map_err(internal)?;
        Ok(Empty {})
    }

    /// Tells of each container in which somebody was killed for want of memory.
    fn watch_kills(&self, oom: &Sender<String>) {
        // Which file it was is of no matter: all are looked at.
        let mut events = [0; 4096];
        while rustix::io::retry_on_intr(|| rustix::io::read(&self.kills, &mut events)).is_ok() {
            self.tell_of_kills(oom);
        }
    }

    fn tell_of_kills(&self, oom: &Sender<String>) {
        for (id, held) in self.containers().iter() {
            let mut told = held
                .container
                .oom_kills
                .lock()
                .expect("a panic ends the process");
            let kills = held.container.cgroup().oom_kills();
            if kills > *told {
                *told = kills;
                let _ = oom.send(id.clone());
            }
        }
    }
}

fn details(_: GuestDetailsRequest) -> GuestDetailsResponse {
    GuestDetailsResponse {
        // Memory comes and goes by virtio-mem, which needs nobody's help.
        mem_block_size_bytes: 0,
        agent_details: Some(AgentDetails {
            version: env!("CARGO_PKG_VERSION").into(),
            init_daemon: std::process::id() == 1,
            device_handlers: Vec::new(),
            storage_handlers: DRIVERS.map(String::from).to_vec(),
            supports_seccomp: true,
            extra_features: Vec::new(),
        }),
        support_mem_hotplug_probe: false,
    }
}

/// Brings online as many CPUs as are asked for, of those that are there.
fn online(request: OnlineCpuMemRequest) -> Result<Empty, Status> {
    let mut wanted = request.nb_cpus;
    for index in 1.. {
        let path = format!("/sys/devices/system/cpu/cpu{index}/online");
        let Ok(state) = std::fs::read_to_string(&path) else {
            break;
        };
        if wanted == 0 {
            break;
        }
        if state.trim() == "0" {
            std::fs::write(&path, "1").map_err(internal_io)?;
            wanted -= 1;
        }
    }
    Ok(Empty {})
}

fn missing(what: &str) -> Status {
    Status::new(Code::InvalidArgument, format!("{what} is missing"))
}

fn internal(error: impl Error + 'static) -> Status {
    Status::new(Code::Internal, describe(&error))
}

fn internal_io(error: io::Error) -> Status {
    internal(error)
}
