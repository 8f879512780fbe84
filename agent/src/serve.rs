//! The pod's agent: answers the Kata agent's protocol on vsock port 1024 until the sandbox is
//! destroyed.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use protocol::agent::messages::{
    AddArpNeighborsRequest, AgentDetails, CheckRequest, CloseStdinRequest, DestroySandboxRequest,
    Empty, ExecProcessRequest, GetMetricsRequest, GetOomEventRequest, GuestDetailsRequest,
    GuestDetailsResponse, HealthCheckResponse, Interfaces, ListInterfacesRequest,
    ListRoutesRequest, Metrics, OnlineCpuMemRequest, OomEvent, PauseContainerRequest,
    ReadStreamRequest, ReadStreamResponse, ReseedRandomDevRequest, ResumeContainerRequest, Routes,
    ServingStatus, SetGuestDateTimeRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, VersionCheckResponse, VolumeStatsRequest, WaitProcessRequest,
    WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
};
use protocol::agent::{AGENT_SERVICE, FOLLOWS_THE_CLOCK, HEALTH_SERVICE, PIDS_OF_ANOTHER, PORT};
use protocol::ttrpc::{self, Call, Code, Service, Status};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::policy::Rules;
use crate::sandbox::{Sandbox, internal, missing};
use crate::{clock, copy, cpus, devices, figures, network, storage, sys};

/// The version of the protocol, as the Kata agent gives it.
const GRPC_VERSION: &str = "0.0.1";

/// How long the last answer has to be sent: what is written to the host goes in the kernel's own
/// time.
const ANSWER_GRACE: Duration = Duration::from_millis(50);

/// Serves until the sandbox is destroyed, as far as `rules` allow.
pub(crate) fn run(rules: Rules) -> Result<(), Box<dyn Error>> {
    let (sandbox, end) = Sandbox::start(rules)?;
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT)?;
    ttrpc::receive(
        move || from_the_host(&listener),
        sandbox,
        |error| {
            crate::say(&format!("a connection: {error}"));
        },
    )?;
    end.recv()?;
    thread::sleep(ANSWER_GRACE);
    Ok(())
}

/// The next connection, if it is the host's. Any process in the guest can connect too, to the guest's
/// own CID or to the local one (vsock(7)); such a one has nothing to say to the agent.
fn from_the_host(listener: &VsockListener) -> io::Result<Option<OwnedFd>> {
    let (stream, from) = match listener.accept() {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
        accepted => accepted?,
    };
    Ok((from.cid() == VMADDR_CID_HOST).then(|| stream.into()))
}

impl Service for Sandbox {
    /// Whether a call is quick: those that a clone is asked before all else are.
    fn is_quick(&self, service: &str, method: &str) -> bool {
        match service {
            HEALTH_SERVICE => true,
            AGENT_SERVICE => matches!(
                method,
                "GetGuestDetails" | "ReseedRandomDev" | "SetGuestDateTime"
            ),
            _ => false,
        }
    }

    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.service {
            HEALTH_SERVICE => health(call),
            AGENT_SERVICE => {
                self.rules.allow(call)?;
                self.agent(call)
            }
            _ => Err(call.unimplemented()),
        }
    }

    /// Ends the guest once the sandbox's end is answered: the client that asked for it is to know
    /// first.
    fn answered(&self, call: &Call<'_>) {
        if (call.service, call.method) == (AGENT_SERVICE, "DestroySandbox") {
            self.end();
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

/// Answers calls about the network.
fn of_network(call: &Call<'_>) -> Result<Vec<u8>, Status> {
    match call.method {
        "UpdateInterface" => call.answer(|request: UpdateInterfaceRequest| {
            let interface = request.interface.ok_or_else(|| missing("interface"))?;
            Ok(network::update_interface(interface)?)
        }),
        "UpdateRoutes" => call.answer(|request: UpdateRoutesRequest| {
            let routes = request.routes.unwrap_or_default().routes;
            let exact = network::update_routes(&routes, &request.exact.unwrap_or_default())?;
            Ok(Routes { routes, exact })
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
            Ok(Routes { routes, exact: 0 })
        }),
        _ => Err(call.unimplemented()),
    }
}

impl Sandbox {
    /// Answers calls about the sandbox and its containers, and hands on all others.
    fn agent(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
            "CreateSandbox" => call.answer(|request| done(self.prepare(&request))),
            "DestroySandbox" => call.answer(|_: DestroySandboxRequest| {
                self.destroy();
                Ok(Empty {})
            }),
            "GetGuestDetails" => call.answer(|request| Ok(details(request, &self.rules))),
            "CreateContainer" => call.answer(|request| done(self.create(request))),
            "StartContainer" => call.answer(|request: StartContainerRequest| {
                let container = self.container(&request.container_id)?;
                container.first().go_on().map_err(internal)?;
                Ok(Empty {})
            }),
            "RemoveContainer" => call.answer(|request| done(self.remove(&request))),
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
                let container_id = self.next_oom(call)?;
                Ok(OomEvent { container_id })
            }),
            "UpdateEphemeralMounts" => call.answer(|request| done(self.update_mounts(&request))),
            _ => self.of_processes(call),
        }
    }

    /// Answers calls about processes in containers, and hands on all others.
    fn of_processes(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
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
            "SignalProcess" => call.answer(|request| done(self.signal(&request))),
            "WaitProcess" => call.answer(|request: WaitProcessRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                let status = process.end.wait().into();
                // If this client is gone, the process is kept, so that the next client that waits
                // for it finds it.
                if !call.is_orphan()
                    && let Ok(container) = self.container(&request.container_id)
                {
                    container.forget(&request.exec_id);
                }
                Ok(WaitProcessResponse { status })
            }),
            "ReadStdout" => call.answer(|request| self.read(request, false, call)),
            "ReadStderr" => call.answer(|request| self.read(request, true, call)),
            "WriteStdin" => call.answer(|request: WriteStreamRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                process.write(&request.data).map_err(internal)?;
                let len = u32::try_from(request.data.len()).expect("fits a message");
                Ok(WriteStreamResponse { len })
            }),
            "CloseStdin" => call.answer(|request: CloseStdinRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                process.write(&[]).map_err(internal)?;
                Ok(Empty {})
            }),
            "TtyWinResize" => call.answer(|request: TtyWinResizeRequest| {
                let process = self.process(&request.container_id, &request.exec_id)?;
                let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
                let resized = process.resize(cells(request.row), cells(request.column));
                resized.map_err(|error| Status::new(Code::FailedPrecondition, error))?;
                Ok(Empty {})
            }),
            _ => self.of_guest(call),
        }
    }

    /// Answers calls about the guest as a whole, and hands on all others.
    fn of_guest(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
            "CopyFile" => call.answer(|request| Ok(copy::copy(&request).map(|()| Empty {})?)),
            "GetMetrics" => call.answer(|_: GetMetricsRequest| {
                let metrics = figures::metrics(self.count()).map_err(internal)?;
                Ok(Metrics { metrics })
            }),
            "GetVolumeStats" => call.answer(|request: VolumeStatsRequest| {
                let path = &request.volume_guest_path;
                figures::volume(path).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => {
                        Status::new(Code::NotFound, format!("{path}: {error}"))
                    }
                    _ => Status::new(Code::Internal, format!("{path}: {error}")),
                })
            }),
            "OnlineCPUMem" => call.answer(|request: OnlineCpuMemRequest| {
                cpus::online(Path::new(cpus::FOLDER), request.nb_cpus).map_err(internal)?;
                Ok(Empty {})
            }),
            "SetGuestDateTime" => call.answer(|request: SetGuestDateTimeRequest| {
                clock::follow_word(request.sec, request.usec).map_err(internal)?;
                Ok(Empty {})
            }),
            "ReseedRandomDev" => call.answer(|request: ReseedRandomDevRequest| {
                sys::add_entropy(&request.data).map_err(internal)?;
                Ok(Empty {})
            }),
            _ => of_network(call),
        }
    }

    fn read(
        &self,
        request: ReadStreamRequest,
        error: bool,
        call: &Call<'_>,
    ) -> Result<ReadStreamResponse, Status> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let len = request.len.min(ttrpc::MAX_MESSAGE / 2) as usize;
        let data = process.read(error, len, call.caller());
        Ok(ReadStreamResponse { data })
    }

    fn freeze(&self, id: &str, frozen: bool) -> Result<Empty, Status> {
        let container = self.container(id)?;
        container.cgroup().freeze(frozen).map_err(internal)?;
        Ok(Empty {})
    }
}

fn done(result: Result<(), Status>) -> Result<Empty, Status> {
    result.map(|()| Empty {})
}

fn details(request: GuestDetailsRequest, rules: &Rules) -> GuestDetailsResponse {
    let block_size = request.mem_block_size.then(memory_block_size);
    GuestDetailsResponse {
        // 0 says that the kernel takes no more memory.
        mem_block_size_bytes: block_size.flatten().unwrap_or_default(),
        agent_details: Some(AgentDetails {
            version: env!("CARGO_PKG_VERSION").into(),
            init_daemon: std::process::id() == 1,
            device_handlers: devices::KINDS.map(String::from).to_vec(),
            storage_handlers: storage::DRIVERS.map(String::from).to_vec(),
            supports_seccomp: true,
            extra_features: [PIDS_OF_ANOTHER, FOLLOWS_THE_CLOCK]
                .map(String::from)
                .into_iter()
                .chain(rules.feature())
                .collect(),
        }),
        // Memory comes and goes by virtio-mem, which needs no help from the agent.
        support_mem_hotplug_probe: false,
    }
}

/// How many bytes of memory are added to the guest at a time (kernel:
/// admin-guide/mm/memory-hotplug.rst).
fn memory_block_size() -> Option<u64> {
    let text = std::fs::read_to_string("/sys/devices/system/memory/block_size_bytes").ok()?;
    u64::from_str_radix(text.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use protocol::policy::CALLS;

    /// A policy names each call that is answered, and none else.
    #[test]
    fn the_calls_of_policies_are_those_answered() {
        let code = include_str!("serve.rs")
            .split("#[cfg(test)]")
            .next()
            .unwrap();
        // Those of the agent's service.
        let arms = code
            .split("fn of_network")
            .nth(1)
            .unwrap()
            .split("\" => call")
            .filter_map(|before| before.rsplit('"').next());
        let mut answered: Vec<_> = arms.collect();
        // What follows the last of them.
        answered.pop();
        answered.sort_unstable();
        assert_eq!(answered, CALLS);
    }
}
