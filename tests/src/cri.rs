//! The kubelet's side of CRI v1: each call waits for its answer.

/// Descriptions of pods and containers.
pub mod config {
    include!(concat!(env!("OUT_DIR"), "/cri.config.rs"));
}

/// Requests and their answers.
pub mod requests {
    include!(concat!(env!("OUT_DIR"), "/cri.requests.rs"));
}

/// States of pods and containers.
pub mod status {
    include!(concat!(env!("OUT_DIR"), "/cri.status.rs"));
}

use std::fmt;
use std::path::Path;
use std::time::Duration;

use http::uri::PathAndQuery;
use prost::Message;
use tokio::runtime::{self, Runtime};
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use self::config::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use self::requests::{
    ContainerStatsRequest, ContainerStatsResponse, ContainerStatusRequest, ContainerStatusResponse,
    CreateContainerRequest, CreateContainerResponse, Empty, ExecSyncRequest, ExecSyncResponse,
    ListContainersRequest, ListContainersResponse, ListPodSandboxRequest, ListPodSandboxResponse,
    PodSandboxStatsRequest, PodSandboxStatsResponse, PodSandboxStatusRequest,
    PodSandboxStatusResponse, RemoveContainerRequest, RemovePodSandboxRequest,
    ReopenContainerLogRequest, RunPodSandboxRequest, RunPodSandboxResponse, StartContainerRequest,
    StatusRequest, StatusResponse, StopContainerRequest, StopPodSandboxRequest,
    UpdateContainerResourcesRequest, VersionRequest, VersionResponse,
};
use self::status::{
    Container, ContainerStats, ContainerStatus, PodSandbox, PodSandboxStats, PodSandboxStatus,
};
use crate::host;

/// Longer than a pod takes to start on the slowest KVM.
const PATIENCE: Duration = Duration::from_secs(240);

/// A connection to a runtime's socket.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

/// What the runtime says instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was asked for.
    pub method: &'static str,
    /// Why not, by kind.
    pub code: Code,
    /// Why not, in words.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}: {}", self.method, self.code, self.message)
    }
}

impl std::error::Error for Refusal {}

type Answer<T> = Result<T, Refusal>;

impl Cri {
    /// Connects to the socket of a containerd.
    pub fn connect(socket: &Path) -> Self {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("there are file descriptors");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let endpoint = endpoint.expect("a socket's path makes a URI");
        let channel = runtime.block_on(endpoint.connect());
        let channel =
            channel.unwrap_or_else(|error| panic!("connect to {}: {error:?}", socket.display()));
        Self { runtime, channel }
    }

    fn ask<A: Message + Default + 'static>(
        &self,
        method: &'static str,
        request: impl Message + 'static,
    ) -> Answer<A> {
        let path = PathAndQuery::from_static(method);
        let mut client = Grpc::new(self.channel.clone());
        let call = async {
            client
                .ready()
                .await
                .map_err(|error| Status::unavailable(error.to_string()))?;
            let codec = ProstCodec::default();
            client.unary(Request::new(request), path, codec).await
        };
        let answer = self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, call)
                .await
                .unwrap_or_else(|_| {
                    eprintln!("{method} is not answered; what runs:\n{}", host::threads());
                    Err(Status::deadline_exceeded(format!("within {PATIENCE:?}")))
                })
        });
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| Refusal {
                method: method.rsplit('/').next().unwrap_or(method),
                code: status.code(),
                message: status.message().to_owned(),
            })
    }

    pub fn version(&self) -> Answer<VersionResponse> {
        let version = "v1".into();
        self.ask(
            "/runtime.v1.RuntimeService/Version",
            VersionRequest { version },
        )
    }

    pub fn status(&self) -> Answer<StatusResponse> {
        self.ask("/runtime.v1.RuntimeService/Status", StatusRequest {})
    }

    /// Makes a pod and gives its id.
    pub fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let answer: RunPodSandboxResponse =
            self.ask("/runtime.v1.RuntimeService/RunPodSandbox", request)?;
        Ok(answer.pod_sandbox_id)
    }

    pub fn stop_pod(&self, pod: &str) -> Answer<Empty> {
        let pod_sandbox_id = pod.to_owned();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        self.ask("/runtime.v1.RuntimeService/StopPodSandbox", request)
    }

    pub fn remove_pod(&self, pod: &str) -> Answer<Empty> {
        let pod_sandbox_id = pod.to_owned();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        self.ask("/runtime.v1.RuntimeService/RemovePodSandbox", request)
    }

    pub fn pod_status(&self, pod: &str) -> Answer<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer: PodSandboxStatusResponse =
            self.ask("/runtime.v1.RuntimeService/PodSandboxStatus", request)?;
        Ok(answer.status.unwrap_or_default())
    }

    pub fn pods(&self) -> Answer<Vec<PodSandbox>> {
        let answer: ListPodSandboxResponse = self.ask(
            "/runtime.v1.RuntimeService/ListPodSandbox",
            ListPodSandboxRequest {},
        )?;
        Ok(answer.items)
    }

    /// Makes a container in a pod and gives its id.
    pub fn create(
        &self,
        pod: &str,
        pod_config: &PodSandboxConfig,
        config: &ContainerConfig,
    ) -> Answer<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        let answer: CreateContainerResponse =
            self.ask("/runtime.v1.RuntimeService/CreateContainer", request)?;
        Ok(answer.container_id)
    }

    pub fn start(&self, container: &str) -> Answer<Empty> {
        let container_id = container.to_owned();
        let request = StartContainerRequest { container_id };
        self.ask("/runtime.v1.RuntimeService/StartContainer", request)
    }

    /// Asks it to end, and after `grace` seconds makes it.
    pub fn stop(&self, container: &str, grace: i64) -> Answer<Empty> {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout: grace,
        };
        self.ask("/runtime.v1.RuntimeService/StopContainer", request)
    }

    pub fn remove(&self, container: &str) -> Answer<Empty> {
        let container_id = container.to_owned();
        let request = RemoveContainerRequest { container_id };
        self.ask("/runtime.v1.RuntimeService/RemoveContainer", request)
    }

    pub fn container_status(&self, container: &str) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
        };
        let answer: ContainerStatusResponse =
            self.ask("/runtime.v1.RuntimeService/ContainerStatus", request)?;
        Ok(answer.status.unwrap_or_default())
    }

    pub fn containers(&self) -> Answer<Vec<Container>> {
        let answer: ListContainersResponse = self.ask(
            "/runtime.v1.RuntimeService/ListContainers",
            ListContainersRequest {},
        )?;
        Ok(answer.containers)
    }

    /// Runs a program in a container, for at most `timeout` seconds unless that is 0.
    pub fn exec_sync(
        &self,
        container: &str,
        words: &[&str],
        timeout: i64,
    ) -> Answer<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        self.ask("/runtime.v1.RuntimeService/ExecSync", request)
    }

    pub fn reopen_log(&self, container: &str) -> Answer<Empty> {
        let container_id = container.to_owned();
        let request = ReopenContainerLogRequest { container_id };
        self.ask("/runtime.v1.RuntimeService/ReopenContainerLog", request)
    }

    pub fn update(&self, container: &str, resources: LinuxContainerResources) -> Answer<Empty> {
        let request = UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..UpdateContainerResourcesRequest::default()
        };
        self.ask(
            "/runtime.v1.RuntimeService/UpdateContainerResources",
            request,
        )
    }

    pub fn stats(&self, container: &str) -> Answer<ContainerStats> {
        let container_id = container.to_owned();
        let request = ContainerStatsRequest { container_id };
        let answer: ContainerStatsResponse =
            self.ask("/runtime.v1.RuntimeService/ContainerStats", request)?;
        Ok(answer.stats.unwrap_or_default())
    }

    pub fn pod_stats(&self, pod: &str) -> Answer<PodSandboxStats> {
        let pod_sandbox_id = pod.to_owned();
        let request = PodSandboxStatsRequest { pod_sandbox_id };
        let answer: PodSandboxStatsResponse =
            self.ask("/runtime.v1.RuntimeService/PodSandboxStats", request)?;
        Ok(answer.stats.unwrap_or_default())
    }
}
