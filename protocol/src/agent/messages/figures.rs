//! What has been used, by containers and on volumes.

use std::collections::BTreeMap;

/// Asks how full a volume is.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct VolumeStatsRequest {
    #[prost(string, tag = "1")]
    pub volume_guest_path: String,
}

/// How full a volume is, in each unit.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct VolumeStatsResponse {
    #[prost(message, repeated, tag = "1")]
    pub usage: Vec<VolumeUsage>,
    #[prost(message, optional, tag = "2")]
    pub volume_condition: Option<VolumeCondition>,
}

/// What a volume's usage is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ::prost::Enumeration)]
#[repr(i32)]
pub enum VolumeUsageUnit {
    Unknown = 0,
    Bytes = 1,
    Inodes = 2,
}

/// How full a volume is, in one unit.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct VolumeUsage {
    #[prost(uint64, tag = "1")]
    pub available: u64,
    #[prost(uint64, tag = "2")]
    pub total: u64,
    #[prost(uint64, tag = "3")]
    pub used: u64,
    #[prost(enumeration = "VolumeUsageUnit", tag = "4")]
    pub unit: i32,
}

/// Whether something is wrong with a volume, and what.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct VolumeCondition {
    #[prost(bool, tag = "1")]
    pub abnormal: bool,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// What a container has used.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct StatsContainerResponse {
    #[prost(message, optional, tag = "1")]
    pub cgroup_stats: Option<CgroupStats>,
    #[prost(message, repeated, tag = "2")]
    pub network_stats: Vec<NetworkStats>,
}

/// What a container has used, by its cgroup.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CgroupStats {
    #[prost(message, optional, tag = "1")]
    pub cpu_stats: Option<CpuStats>,
    #[prost(message, optional, tag = "2")]
    pub memory_stats: Option<MemoryStats>,
    #[prost(message, optional, tag = "3")]
    pub pids_stats: Option<PidsStats>,
    #[prost(message, optional, tag = "4")]
    pub blkio_stats: Option<BlkioStats>,
    #[prost(btree_map = "string, message", tag = "5")]
    pub hugetlb_stats: BTreeMap<String, HugetlbStats>,
}

/// CPU time that a container has used, and how its quota held it up.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CpuStats {
    #[prost(message, optional, tag = "1")]
    pub cpu_usage: Option<CpuUsage>,
    #[prost(message, optional, tag = "2")]
    pub throttling_data: Option<ThrottlingData>,
}

/// CPU time that a container has used, in nanoseconds.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct CpuUsage {
    #[prost(uint64, tag = "1")]
    pub total_usage: u64,
    #[prost(uint64, repeated, tag = "2")]
    pub percpu_usage: Vec<u64>,
    #[prost(uint64, tag = "3")]
    pub usage_in_kernelmode: u64,
    #[prost(uint64, tag = "4")]
    pub usage_in_usermode: u64,
}

/// How often and how long a container's CPU quota held it up; the time is in nanoseconds.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct ThrottlingData {
    #[prost(uint64, tag = "1")]
    pub periods: u64,
    #[prost(uint64, tag = "2")]
    pub throttled_periods: u64,
    #[prost(uint64, tag = "3")]
    pub throttled_time: u64,
}

/// Memory that a container has used.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct MemoryStats {
    #[prost(uint64, tag = "1")]
    pub cache: u64,
    #[prost(message, optional, tag = "2")]
    pub usage: Option<MemoryData>,
    #[prost(message, optional, tag = "3")]
    pub swap_usage: Option<MemoryData>,
    #[prost(message, optional, tag = "4")]
    pub kernel_usage: Option<MemoryData>,
    #[prost(bool, tag = "5")]
    pub use_hierarchy: bool,
    #[prost(btree_map = "string, uint64", tag = "6")]
    pub stats: BTreeMap<String, u64>,
}

/// One kind of memory that a container has used, in bytes.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct MemoryData {
    #[prost(uint64, tag = "1")]
    pub usage: u64,
    #[prost(uint64, tag = "2")]
    pub max_usage: u64,
    #[prost(uint64, tag = "3")]
    pub failcnt: u64,
    #[prost(uint64, tag = "4")]
    pub limit: u64,
}

/// How many processes and threads a container has, and may have.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct PidsStats {
    #[prost(uint64, tag = "1")]
    pub current: u64,
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

/// Huge pages of one size that a container has used, in bytes.
#[derive(Clone, Copy, PartialEq, ::prost::Message)]
pub struct HugetlbStats {
    #[prost(uint64, tag = "1")]
    pub usage: u64,
    #[prost(uint64, tag = "2")]
    pub max_usage: u64,
    #[prost(uint64, tag = "3")]
    pub failcnt: u64,
}

/// What a container has read from and written to disks.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct BlkioStats {
    #[prost(message, repeated, tag = "1")]
    pub io_service_bytes_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "2")]
    pub io_serviced_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "3")]
    pub io_queued_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "4")]
    pub io_service_time_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "5")]
    pub io_wait_time_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "6")]
    pub io_merged_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "7")]
    pub io_time_recursive: Vec<BlkioStatsEntry>,
    #[prost(message, repeated, tag = "8")]
    pub sectors_recursive: Vec<BlkioStatsEntry>,
}

/// A figure for one disk and one kind of operation.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct BlkioStatsEntry {
    #[prost(uint64, tag = "1")]
    pub major: u64,
    #[prost(uint64, tag = "2")]
    pub minor: u64,
    #[prost(string, tag = "3")]
    pub op: String,
    #[prost(uint64, tag = "4")]
    pub value: u64,
}

/// What a network interface has received and sent.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NetworkStats {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub rx_bytes: u64,
    #[prost(uint64, tag = "3")]
    pub rx_packets: u64,
    #[prost(uint64, tag = "4")]
    pub rx_errors: u64,
    #[prost(uint64, tag = "5")]
    pub rx_dropped: u64,
    #[prost(uint64, tag = "6")]
    pub tx_bytes: u64,
    #[prost(uint64, tag = "7")]
    pub tx_packets: u64,
    #[prost(uint64, tag = "8")]
    pub tx_errors: u64,
    #[prost(uint64, tag = "9")]
    pub tx_dropped: u64,
}
