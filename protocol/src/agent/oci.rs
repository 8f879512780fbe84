//! Containers as the OCI runtime specification has them, but for what the protocol does not carry:
//! time offsets and mapped mounts. They are read from the specification's JSON too, once its nulls
//! are taken out.
//!
//! Fields numbered from 1000 on are podvmm's own. Kata's protocol has no such numbers, and its agent
//! and shim pass over fields they do not know.

use std::collections::BTreeMap;

/// What a container is to be (OCI runtime specification, config.json), as far as Linux is concerned.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    #[prost(string, tag = "1")]
    #[serde(rename = "ociVersion")]
    pub version: String,
    #[prost(message, optional, tag = "2")]
    pub process: Option<Process>,
    #[prost(message, optional, tag = "3")]
    pub root: Option<Root>,
    #[prost(string, tag = "4")]
    pub hostname: String,
    #[prost(message, repeated, tag = "5")]
    pub mounts: Vec<Mount>,
    #[prost(message, optional, tag = "6")]
    pub hooks: Option<Hooks>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

/// The process that runs in a container.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    #[prost(bool, tag = "1")]
    pub terminal: bool,
    #[prost(message, optional, tag = "2")]
    pub console_size: Option<Size>,
    #[prost(message, optional, tag = "3")]
    pub user: Option<User>,
    #[prost(string, repeated, tag = "4")]
    pub args: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub env: Vec<String>,
    #[prost(string, tag = "6")]
    pub cwd: String,
    #[prost(message, optional, tag = "7")]
    pub capabilities: Option<LinuxCapabilities>,
    #[prost(message, repeated, tag = "8")]
    pub rlimits: Vec<PosixRlimit>,
    #[prost(bool, tag = "9")]
    pub no_new_privileges: bool,
    #[prost(string, tag = "10")]
    pub apparmor_profile: String,
    #[prost(int64, tag = "11")]
    pub oom_score_adj: i64,
    #[prost(string, tag = "12")]
    pub selinux_label: String,
}

/// A terminal's size, in characters.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Size {
    #[prost(uint32, tag = "1")]
    pub height: u32,
    #[prost(uint32, tag = "2")]
    pub width: u32,
}

/// Whom a process runs as.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    #[prost(uint32, tag = "1")]
    pub uid: u32,
    #[prost(uint32, tag = "2")]
    pub gid: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub additional_gids: Vec<u32>,
    #[prost(string, tag = "4")]
    pub username: String,
}

/// Capabilities of a process, by name, as `CAP_CHOWN`.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxCapabilities {
    #[prost(string, repeated, tag = "1")]
    pub bounding: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub effective: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub inheritable: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub permitted: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub ambient: Vec<String>,
}

/// A limit by name, as `RLIMIT_NOFILE`.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PosixRlimit {
    #[prost(string, tag = "1")]
    pub r#type: String,
    #[prost(uint64, tag = "2")]
    pub hard: u64,
    #[prost(uint64, tag = "3")]
    pub soft: u64,
}

/// Where the root file system is.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Root {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(bool, tag = "2")]
    pub readonly: bool,
}

/// Something mounted in the container.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub destination: String,
    #[prost(string, tag = "2")]
    pub source: String,
    #[prost(string, tag = "3")]
    pub r#type: String,
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// Programs to run at turning points of a container's life.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    #[prost(message, repeated, tag = "1")]
    pub prestart: Vec<Hook>,
    #[prost(message, repeated, tag = "2")]
    pub poststart: Vec<Hook>,
    #[prost(message, repeated, tag = "3")]
    pub poststop: Vec<Hook>,
    #[prost(message, repeated, tag = "4")]
    pub create_runtime: Vec<Hook>,
    #[prost(message, repeated, tag = "5")]
    pub create_container: Vec<Hook>,
    #[prost(message, repeated, tag = "6")]
    pub start_container: Vec<Hook>,
}

/// A program; `timeout` is in seconds.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hook {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, repeated, tag = "2")]
    pub args: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub env: Vec<String>,
    #[prost(int64, tag = "4")]
    pub timeout: i64,
}

/// What of a container only Linux has.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    #[prost(message, repeated, tag = "1")]
    pub uid_mappings: Vec<LinuxIdMapping>,
    #[prost(message, repeated, tag = "2")]
    pub gid_mappings: Vec<LinuxIdMapping>,
    #[prost(btree_map = "string, string", tag = "3")]
    pub sysctl: BTreeMap<String, String>,
    #[prost(message, optional, tag = "4")]
    pub resources: Option<LinuxResources>,
    #[prost(string, tag = "5")]
    pub cgroups_path: String,
    #[prost(message, repeated, tag = "6")]
    pub namespaces: Vec<LinuxNamespace>,
    #[prost(message, repeated, tag = "7")]
    pub devices: Vec<LinuxDevice>,
    #[prost(message, optional, tag = "8")]
    pub seccomp: Option<LinuxSeccomp>,
    #[prost(string, tag = "9")]
    pub rootfs_propagation: String,
    #[prost(string, repeated, tag = "10")]
    pub masked_paths: Vec<String>,
    #[prost(string, repeated, tag = "11")]
    pub readonly_paths: Vec<String>,
    #[prost(string, tag = "12")]
    pub mount_label: String,
    #[prost(message, optional, tag = "13")]
    pub intel_rdt: Option<LinuxIntelRdt>,
}

/// Users of a user namespace.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxIdMapping {
    #[prost(uint32, tag = "1")]
    #[serde(rename = "hostID")]
    pub host_id: u32,
    #[prost(uint32, tag = "2")]
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[prost(uint32, tag = "3")]
    pub size: u32,
}

/// A namespace of its own, or with `path` that one.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxNamespace {
    #[prost(string, tag = "1")]
    pub r#type: String,
    #[prost(string, tag = "2")]
    pub path: String,
}

/// A device node.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxDevice {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, tag = "2")]
    pub r#type: String,
    #[prost(int64, tag = "3")]
    pub major: i64,
    #[prost(int64, tag = "4")]
    pub minor: i64,
    #[prost(uint32, tag = "5")]
    pub file_mode: u32,
    #[prost(uint32, tag = "6")]
    pub uid: u32,
    #[prost(uint32, tag = "7")]
    pub gid: u32,
}

/// What a container may use.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxResources {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<LinuxDeviceCgroup>,
    #[prost(message, optional, tag = "2")]
    pub memory: Option<LinuxMemory>,
    #[prost(message, optional, tag = "3")]
    pub cpu: Option<LinuxCpu>,
    #[prost(message, optional, tag = "4")]
    pub pids: Option<LinuxPids>,
    #[prost(message, optional, tag = "5")]
    #[serde(rename = "blockIO")]
    pub block_io: Option<LinuxBlockIo>,
    #[prost(message, repeated, tag = "6")]
    pub hugepage_limits: Vec<LinuxHugepageLimit>,
    #[prost(message, optional, tag = "7")]
    pub network: Option<LinuxNetwork>,
    /// Values for files of a cgroup of version 2, by the files' names.
    #[prost(btree_map = "string, string", tag = "1000")]
    pub unified: BTreeMap<String, String>,
}

/// A rule for the devices that a container may open.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxDeviceCgroup {
    #[prost(bool, tag = "1")]
    pub allow: bool,
    #[prost(string, tag = "2")]
    pub r#type: String,
    /// The device's major number; -1 is any.
    #[prost(int64, tag = "3")]
    #[serde(default = "any_number")]
    pub major: i64,
    #[prost(int64, tag = "4")]
    #[serde(default = "any_number")]
    pub minor: i64,
    #[prost(string, tag = "5")]
    pub access: String,
}

/// What a number that is not said stands for.
fn any_number() -> i64 {
    -1
}

/// Limits of a container's memory, in bytes; -1 is no limit, 0 is not said.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxMemory {
    #[prost(int64, tag = "1")]
    pub limit: i64,
    #[prost(int64, tag = "2")]
    pub reservation: i64,
    #[prost(int64, tag = "3")]
    pub swap: i64,
    #[prost(int64, tag = "4")]
    pub kernel: i64,
    #[prost(int64, tag = "5")]
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: i64,
    #[prost(uint64, tag = "6")]
    pub swappiness: u64,
    #[prost(bool, tag = "7")]
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: bool,
}

/// CPU time that a container may use: shares are relative, quota and period in microseconds.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxCpu {
    #[prost(uint64, tag = "1")]
    pub shares: u64,
    #[prost(int64, tag = "2")]
    pub quota: i64,
    #[prost(uint64, tag = "3")]
    pub period: u64,
    #[prost(int64, tag = "4")]
    pub realtime_runtime: i64,
    #[prost(uint64, tag = "5")]
    pub realtime_period: u64,
    #[prost(string, tag = "6")]
    pub cpus: String,
    #[prost(string, tag = "7")]
    pub mems: String,
}

/// How many processes and threads a container may have.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxPids {
    #[prost(int64, tag = "1")]
    pub limit: i64,
}

/// A limit of huge pages of one size, such as `2MB`, in bytes.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxHugepageLimit {
    #[prost(string, tag = "1")]
    #[serde(rename = "pageSize")]
    pub pagesize: String,
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

/// How a container may use disks. Weights are relative.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxBlockIo {
    #[prost(uint32, tag = "1")]
    pub weight: u32,
    #[prost(uint32, tag = "2")]
    pub leaf_weight: u32,
    #[prost(message, repeated, tag = "3")]
    pub weight_device: Vec<LinuxWeightDevice>,
    #[prost(message, repeated, tag = "4")]
    pub throttle_read_bps_device: Vec<LinuxThrottleDevice>,
    #[prost(message, repeated, tag = "5")]
    pub throttle_write_bps_device: Vec<LinuxThrottleDevice>,
    #[prost(message, repeated, tag = "6")]
    pub throttle_read_iops_device: Vec<LinuxThrottleDevice>,
    #[prost(message, repeated, tag = "7")]
    pub throttle_write_iops_device: Vec<LinuxThrottleDevice>,
}

/// A weight for one device.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxWeightDevice {
    #[prost(int64, tag = "1")]
    pub major: i64,
    #[prost(int64, tag = "2")]
    pub minor: i64,
    #[prost(uint32, tag = "3")]
    pub weight: u32,
    #[prost(uint32, tag = "4")]
    pub leaf_weight: u32,
}

/// A limit of bytes or operations a second for one device.
#[derive(Clone, Copy, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxThrottleDevice {
    #[prost(int64, tag = "1")]
    pub major: i64,
    #[prost(int64, tag = "2")]
    pub minor: i64,
    #[prost(uint64, tag = "3")]
    pub rate: u64,
}

/// How a container's network packets are marked.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxNetwork {
    #[prost(uint32, tag = "1")]
    #[serde(rename = "classID")]
    pub class_id: u32,
    #[prost(message, repeated, tag = "2")]
    pub priorities: Vec<LinuxInterfacePriority>,
}

/// The priority of packets that leave by an interface.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxInterfacePriority {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint32, tag = "2")]
    pub priority: u32,
}

/// A container's share of the processor's cache.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxIntelRdt {
    #[prost(string, tag = "1")]
    pub l3_cache_schema: String,
}

/// Which system calls are let through.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxSeccomp {
    #[prost(string, tag = "1")]
    pub default_action: String,
    #[prost(string, repeated, tag = "2")]
    pub architectures: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub flags: Vec<String>,
    #[prost(message, repeated, tag = "4")]
    pub syscalls: Vec<LinuxSyscall>,
    /// Which error the default action returns, if it returns one.
    #[prost(uint32, optional, tag = "1000")]
    pub default_errno_ret: Option<u32>,
}

/// What becomes of these calls if all `args` match.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxSyscall {
    #[prost(string, repeated, tag = "1")]
    pub names: Vec<String>,
    #[prost(string, tag = "2")]
    pub action: String,
    #[prost(uint32, optional, tag = "3")]
    pub errno_ret: Option<u32>,
    #[prost(message, repeated, tag = "4")]
    pub args: Vec<LinuxSeccompArg>,
}

/// A comparison with one argument.
#[derive(Clone, PartialEq, ::prost::Message, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxSeccompArg {
    #[prost(uint64, tag = "1")]
    pub index: u64,
    #[prost(uint64, tag = "2")]
    pub value: u64,
    #[prost(uint64, tag = "3")]
    pub value_two: u64,
    #[prost(string, tag = "4")]
    pub op: String,
}
