//! What containerd from 2.3 on says to a shim that it starts, and hears of it (containerd,
//! api/runtime/bootstrap/v1), and what it is told of a runtime (api/types/introspection.proto).

use std::collections::BTreeMap;

use prost_types::Any;

/// The most verbose level of a log that is not for debugging.
pub const LOG_LEVEL_DEBUG: i32 = -4;

/// What containerd says to a shim when it starts it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BootstrapParams {
    #[prost(string, tag = "1")]
    pub instance_id: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(int32, tag = "3")]
    pub log_level: i32,
    #[prost(string, tag = "5")]
    pub containerd_ttrpc_address: String,
    #[prost(string, tag = "6")]
    pub containerd_grpc_address: String,
    #[prost(message, repeated, tag = "8")]
    pub extensions: Vec<Extension>,
}

/// One more thing that containerd says at a shim's start, such as the runtime's options. Its type
/// tells which.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Extension {
    #[prost(message, optional, tag = "1")]
    pub value: Option<Any>,
}

/// Where a shim answers, and how.
#[derive(Clone, PartialEq, prost::Message, serde::Serialize)]
pub struct BootstrapResult {
    #[prost(int32, tag = "1")]
    pub version: i32,
    #[prost(string, tag = "2")]
    pub address: String,
    #[prost(string, tag = "3")]
    pub protocol: String,
}

/// What containerd is told of this runtime.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub version: Option<RuntimeVersion>,
    /// The runtime's options that containerd asked with.
    #[prost(message, optional, tag = "3")]
    pub options: Option<Any>,
    /// The features document of the OCI runtime specification, as JSON.
    #[prost(message, optional, tag = "4")]
    pub features: Option<Any>,
    #[prost(btree_map = "string, string", tag = "5")]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeVersion {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(string, tag = "2")]
    pub revision: String,
}
