//! What a container or pod has used, as containerd takes it from hosts with cgroups of version 2.
//! It takes that on others too, so these are the only figures there are.

/// The name of [`Metrics`].
pub(crate) const NAME: &str = "io.containerd.cgroups.v2.Metrics";

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Metrics {
    #[prost(message, optional, tag = "1")]
    pub(crate) pids: Option<Pids>,
    #[prost(message, optional, tag = "2")]
    pub(crate) cpu: Option<Cpu>,
    #[prost(message, optional, tag = "4")]
    pub(crate) memory: Option<Memory>,
    #[prost(message, optional, tag = "6")]
    pub(crate) io: Option<Io>,
    #[prost(message, repeated, tag = "7")]
    pub(crate) hugetlb: Vec<Hugetlb>,
    #[prost(message, optional, tag = "8")]
    pub(crate) memory_events: Option<MemoryEvents>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Pids {
    #[prost(uint64, tag = "1")]
    pub(crate) current: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) limit: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Cpu {
    #[prost(uint64, tag = "1")]
    pub(crate) usage_usec: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) user_usec: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) system_usec: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) nr_periods: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) nr_throttled: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) throttled_usec: u64,
}

/// Bytes, but for the counts of pages and faults.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Memory {
    #[prost(uint64, tag = "1")]
    pub(crate) anon: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) file: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) kernel_stack: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) slab: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) sock: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) shmem: u64,
    #[prost(uint64, tag = "7")]
    pub(crate) file_mapped: u64,
    #[prost(uint64, tag = "8")]
    pub(crate) file_dirty: u64,
    #[prost(uint64, tag = "9")]
    pub(crate) file_writeback: u64,
    #[prost(uint64, tag = "11")]
    pub(crate) inactive_anon: u64,
    #[prost(uint64, tag = "12")]
    pub(crate) active_anon: u64,
    #[prost(uint64, tag = "13")]
    pub(crate) inactive_file: u64,
    #[prost(uint64, tag = "14")]
    pub(crate) active_file: u64,
    #[prost(uint64, tag = "15")]
    pub(crate) unevictable: u64,
    #[prost(uint64, tag = "16")]
    pub(crate) slab_reclaimable: u64,
    #[prost(uint64, tag = "17")]
    pub(crate) slab_unreclaimable: u64,
    #[prost(uint64, tag = "18")]
    pub(crate) pgfault: u64,
    #[prost(uint64, tag = "19")]
    pub(crate) pgmajfault: u64,
    #[prost(uint64, tag = "32")]
    pub(crate) usage: u64,
    #[prost(uint64, tag = "33")]
    pub(crate) usage_limit: u64,
    #[prost(uint64, tag = "34")]
    pub(crate) swap_usage: u64,
    #[prost(uint64, tag = "35")]
    pub(crate) swap_limit: u64,
    #[prost(uint64, tag = "36")]
    pub(crate) max_usage: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct MemoryEvents {
    #[prost(uint64, tag = "3")]
    pub(crate) max: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) oom: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) oom_kill: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Io {
    #[prost(message, repeated, tag = "1")]
    pub(crate) usage: Vec<IoEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct IoEntry {
    #[prost(uint64, tag = "1")]
    pub(crate) major: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) minor: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) rbytes: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) wbytes: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) rios: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) wios: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Hugetlb {
    #[prost(uint64, tag = "1")]
    pub(crate) current: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) max: u64,
    #[prost(string, tag = "3")]
    pub(crate) pagesize: String,
}
