//! What a container or pod has used, as containerd takes it from hosts with cgroups of version 2.
//! It takes that on others too, so these are the only figures there are.

include!(concat!(env!("OUT_DIR"), "/containerd.figures.rs"));

/// The name of [`Metrics`].
pub const NAME: &str = "io.containerd.cgroups.v2.Metrics";
