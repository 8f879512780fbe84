//! What containerd and its shims say to each other (containerd, api/runtime/task/v2, api/events,
//! api/services/ttrpc/events/v1), and the figures of a cgroup (containerd/cgroups, cgroup2/stats).

pub mod bootstrap;
pub mod events;
pub mod figures;
pub mod task;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::{Any, Timestamp};

/// A message with its type, as containerd writes that: the name alone.
pub fn any(name: &str, message: &impl prost::Message) -> Any {
    Any {
        type_url: name.into(),
        value: message.encode_to_vec(),
    }
}

pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Timestamp {
        seconds: since.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
    }
}
