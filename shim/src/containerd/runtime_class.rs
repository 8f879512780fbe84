//! The RuntimeClass that tells Kubernetes of podvmm (node.k8s.io/v1), with what a pod costs beyond
//! its limits.

use crate::config::Config;

/// What the shim, podvmm and the host's kernel take for a pod: 4.7, 4.4 and 1.5 MiB by
/// `benches/pods`, rounded up, as they grow with the files that the guest has open.
const HOST_MIB: u32 = 12;
/// What a pod takes of a processor while it does nothing much, in thousandths: the shim and podvmm
/// 1 at most by `benches/pods`; the rest is for the guest's kernel.
const MILLI_CPUS: u32 = 50;

/// The RuntimeClass for this configuration, as a manifest.
pub(crate) fn yaml(config: &Config) -> String {
    let memory = config.guest_overhead_mib + HOST_MIB;
    format!(
        "\
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: podvmm
handler: podvmm
overhead:
  podFixed:
    memory: {memory}Mi
    cpu: {MILLI_CPUS}m
scheduling:
  nodeSelector:
    podvmm.io/runtime: \"true\"
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_has_the_figures_of_this_version() {
        let config = "kernel = \"vmlinux\"\ninitramfs = \"initramfs.cpio\"";
        let config: Config = toml::from_str(config).unwrap();
        let manifest = include_str!("../../../resources/kubernetes/runtimeclass.yaml");
        let lines = manifest.lines().filter(|line| !line.starts_with('#'));
        let lines: Vec<_> = lines.collect();
        assert_eq!(yaml(&config).lines().collect::<Vec<_>>(), lines);
    }
}
