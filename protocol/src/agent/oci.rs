//! Containers as the OCI runtime specification has them, but for what the protocol does not carry:
//! time offsets and mapped mounts. They are read from the specification's JSON too, once its nulls
//! are taken out.
//!
//! Fields numbered from 1000 on are podvmm's own. Kata's protocol has no such numbers, and its agent
//! and shim pass over fields they do not know.

include!(concat!(env!("OUT_DIR"), "/agent.oci.rs"));

/// What a device number stands for that the JSON does not have; `build.rs` tells serde.
fn any_number() -> i64 {
    -1
}
