//! Requests of `grpc.AgentService` and `grpc.Health`, and their answers.

mod figures;

use super::{oci, types};
pub use figures::*;

/// The answer where there is nothing to say.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct Empty {}

/// Asks how `service` is.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CheckRequest {
    #[prost(string, tag = "1")]
    pub service: String,
}

/// How a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ::prost::Enumeration)]
#[repr(i32)]
pub enum ServingStatus {
    Unknown = 0,
    Serving = 1,
    NotServing = 2,
}

/// The answer to [`CheckRequest`]: how the service is.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct HealthCheckResponse {
    #[prost(enumeration = "ServingStatus", tag = "1")]
    pub status: i32,
}

/// The versions of the agent's protocol and of the agent.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct VersionCheckResponse {
    #[prost(string, tag = "1")]
    pub grpc_version: String,
    #[prost(string, tag = "2")]
    pub agent_version: String,
}

/// Makes a container, whose first process waits to be started.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(message, optional, tag = "3")]
    pub string_user: Option<StringUser>,
    #[prost(message, repeated, tag = "4")]
    pub devices: Vec<Device>,
    #[prost(message, repeated, tag = "5")]
    pub storages: Vec<Storage>,
    #[prost(message, optional, tag = "6")]
    pub oci: Option<oci::Spec>,
    #[prost(bool, tag = "7")]
    pub sandbox_pidns: bool,
    #[prost(message, repeated, tag = "8")]
    pub shared_mounts: Vec<SharedMount>,
    #[prost(uint32, optional, tag = "9")]
    pub stdin_port: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    pub stdout_port: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    pub stderr_port: Option<u32>,
}

/// Lets the first process go.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct StartContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Kills what is left and forgets the container; `timeout` is in seconds, 0 is none.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct RemoveContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "2")]
    pub timeout: u32,
}

/// Starts one more process in a container.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ExecProcessRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(message, optional, tag = "3")]
    pub string_user: Option<StringUser>,
    #[prost(message, optional, tag = "4")]
    pub process: Option<oci::Process>,
    #[prost(uint32, optional, tag = "5")]
    pub stdin_port: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    pub stdout_port: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    pub stderr_port: Option<u32>,
}

/// Without an `exec_id`, SIGKILL is for all of the container.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct SignalProcessRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub signal: u32,
}

/// Waits for a process, which is then forgotten.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct WaitProcessRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// How a process ended: its own status, or 128 + N if signal N ended it.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct WaitProcessResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
}

/// Changes what a container may use.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct UpdateContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(message, optional, tag = "2")]
    pub resources: Option<oci::LinuxResources>,
}

/// Asks what a container has used.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct StatsContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Freezes a container.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct PauseContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Lets a frozen container go on.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ResumeContainerRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Writes to a process's standard input; no data closes it.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct WriteStreamRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(bytes = "vec", tag = "3")]
    pub data: Vec<u8>,
}

/// How many bytes of the input were taken.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct WriteStreamResponse {
    #[prost(uint32, tag = "1")]
    pub len: u32,
}

/// Waits for at most `len` bytes.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ReadStreamRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub len: u32,
}

/// Bytes of a process's output; none at the end.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ReadStreamResponse {
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
}

/// Ends standard input.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CloseStdinRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Tells a terminal its size.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct TtyWinResizeRequest {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub row: u32,
    #[prost(uint32, tag = "4")]
    pub column: u32,
}

/// Prepares the guest for containers.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CreateSandboxRequest {
    #[prost(string, tag = "1")]
    pub hostname: String,
    #[prost(string, repeated, tag = "2")]
    pub dns: Vec<String>,
    #[prost(message, repeated, tag = "3")]
    pub storages: Vec<Storage>,
    #[prost(bool, tag = "4")]
    pub sandbox_pidns: bool,
    #[prost(string, tag = "5")]
    pub sandbox_id: String,
    #[prost(string, tag = "6")]
    pub guest_hook_path: String,
    #[prost(message, repeated, tag = "7")]
    pub kernel_modules: Vec<KernelModule>,
}

/// A kernel module to be loaded.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct KernelModule {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, repeated, tag = "2")]
    pub parameters: Vec<String>,
}

/// Ends all containers, and then the guest.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct DestroySandboxRequest {}

/// Something to be mounted for containers.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Storage {
    #[prost(string, tag = "1")]
    pub driver: String,
    #[prost(string, repeated, tag = "2")]
    pub driver_options: Vec<String>,
    #[prost(string, tag = "3")]
    pub source: String,
    #[prost(string, tag = "4")]
    pub fstype: String,
    #[prost(string, repeated, tag = "5")]
    pub options: Vec<String>,
    #[prost(string, tag = "6")]
    pub mount_point: String,
    #[prost(message, optional, tag = "7")]
    pub fs_group: Option<FsGroup>,
    #[prost(bool, tag = "8")]
    pub shared: bool,
}

/// Whom the files of a volume belong to.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct FsGroup {
    #[prost(uint32, tag = "2")]
    pub group_id: u32,
    #[prost(enumeration = "types::FsGroupChangePolicy", tag = "3")]
    pub group_change_policy: i32,
}

/// A device for a container.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Device {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub r#type: String,
    #[prost(string, tag = "3")]
    pub vm_path: String,
    #[prost(string, tag = "4")]
    pub container_path: String,
    #[prost(string, repeated, tag = "5")]
    pub options: Vec<String>,
}

/// A user by name or number.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct StringUser {
    #[prost(string, tag = "1")]
    pub uid: String,
    #[prost(string, tag = "2")]
    pub gid: String,
    #[prost(string, repeated, tag = "3")]
    pub additional_gids: Vec<String>,
}

/// A mount taken from another container.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct SharedMount {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub src_ctr: String,
    #[prost(string, tag = "3")]
    pub src_path: String,
    #[prost(string, tag = "4")]
    pub dst_ctr: String,
    #[prost(string, tag = "5")]
    pub dst_path: String,
}

/// All interfaces.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Interfaces {
    #[prost(message, repeated, tag = "1")]
    pub interfaces: Vec<types::Interface>,
}

/// All routes.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Routes {
    #[prost(message, repeated, tag = "1")]
    pub routes: Vec<types::Route>,
    /// podvmm's own: how many of the request's [`ExactRoutes`] were understood. An agent that does not know
    /// them says none.
    #[prost(uint32, tag = "1000")]
    pub exact: u32,
}

/// podvmm's own: routes and routing rules for which the Kata agent's protocol has no fields (metrics,
/// tables, several gateways, blackholes), as the host's kernel lists them (rtnetlink(7)). The guest's
/// kernel reads the same.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ExactRoutes {
    /// Names of the interfaces that the routes have by number.
    #[prost(message, repeated, tag = "1")]
    pub interfaces: Vec<NumberedInterface>,
    /// The routes, each as the payload of an RTM_NEWROUTE.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub routes: Vec<Vec<u8>>,
    /// The routing rules, each as the payload of an RTM_NEWRULE.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub rules: Vec<Vec<u8>>,
}

/// What an interface of the host's is called.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NumberedInterface {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(string, tag = "2")]
    pub name: String,
}

/// Neighbours to be known.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ArpNeighbors {
    #[prost(message, repeated, tag = "1")]
    pub neighbors: Vec<types::ArpNeighbor>,
}

/// Sets an interface up.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct UpdateInterfaceRequest {
    #[prost(message, optional, tag = "1")]
    pub interface: Option<types::Interface>,
}

/// Sets routes.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct UpdateRoutesRequest {
    #[prost(message, optional, tag = "1")]
    pub routes: Option<Routes>,
    #[prost(message, optional, tag = "1000")]
    pub exact: Option<ExactRoutes>,
}

/// Asks for all interfaces.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct ListInterfacesRequest {}

/// Asks for all routes.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct ListRoutesRequest {}

/// Sets neighbours.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct AddArpNeighborsRequest {
    #[prost(message, optional, tag = "1")]
    pub neighbors: Option<ArpNeighbors>,
}

/// Brings plugged CPUs online.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct OnlineCpuMemRequest {
    #[prost(bool, tag = "1")]
    pub wait: bool,
    #[prost(uint32, tag = "2")]
    pub nb_cpus: u32,
    #[prost(bool, tag = "3")]
    pub cpu_only: bool,
}

/// Gives entropy to the guest.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ReseedRandomDevRequest {
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// Tells the guest the time of day.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct SetGuestDateTimeRequest {
    #[prost(int64, tag = "1")]
    pub sec: i64,
    #[prost(int64, tag = "2")]
    pub usec: i64,
}

/// Asks what the guest can do.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct GuestDetailsRequest {
    #[prost(bool, tag = "1")]
    pub mem_block_size: bool,
    #[prost(bool, tag = "2")]
    pub mem_hotplug_probe: bool,
}

/// What the guest can do.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct GuestDetailsResponse {
    #[prost(uint64, tag = "1")]
    pub mem_block_size_bytes: u64,
    #[prost(message, optional, tag = "2")]
    pub agent_details: Option<AgentDetails>,
    #[prost(bool, tag = "3")]
    pub support_mem_hotplug_probe: bool,
}

/// What the agent can do.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct AgentDetails {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(bool, tag = "2")]
    pub init_daemon: bool,
    #[prost(string, repeated, tag = "3")]
    pub device_handlers: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub storage_handlers: Vec<String>,
    #[prost(bool, tag = "5")]
    pub supports_seccomp: bool,
    #[prost(string, repeated, tag = "6")]
    pub extra_features: Vec<String>,
}

/// A piece of a file.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CopyFileRequest {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(int64, tag = "2")]
    pub file_size: i64,
    #[prost(uint32, tag = "3")]
    pub file_mode: u32,
    #[prost(uint32, tag = "4")]
    pub dir_mode: u32,
    #[prost(int32, tag = "5")]
    pub uid: i32,
    #[prost(int32, tag = "6")]
    pub gid: i32,
    #[prost(int64, tag = "7")]
    pub offset: i64,
    #[prost(bytes = "vec", tag = "8")]
    pub data: Vec<u8>,
}

/// Waits for a container to run out of memory.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct GetOomEventRequest {}

/// Names a container that ran out of memory.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct OomEvent {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Asks for the agent's own figures.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct GetMetricsRequest {}

/// The agent's own figures, in Prometheus' text format.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Metrics {
    #[prost(string, tag = "1")]
    pub metrics: String,
}

/// Mounts these once more, with their options changed.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct UpdateEphemeralMountsRequest {
    #[prost(message, repeated, tag = "1")]
    pub storages: Vec<Storage>,
}
