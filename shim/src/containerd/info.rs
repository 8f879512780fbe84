//! `-info`: what containerd from 2.0 on asks of a runtime before it runs anything by it, such as
//! whether mounts can be read-only with all that is mounted below them. The document is the OCI
//! runtime specification's (runtime-spec, features.md); it names what is kept to, here or by the agent.

use prost_types::Any;
use serde_json::{Value, json};

use protocol::containerd::bootstrap::{RuntimeInfo, RuntimeVersion};

const NAME: &str = "io.containerd.podvmm.v2";
/// The name by which containerd knows the features document, which is JSON then.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer to options as containerd has them for the runtime.
pub(crate) fn info(options: Option<Any>) -> RuntimeInfo {
    RuntimeInfo {
        name: NAME.into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            revision: String::new(),
        }),
        options,
        features: Some(Any {
            type_url: FEATURES.into(),
            value: features().to_string().into_bytes(),
        }),
        ..RuntimeInfo::default()
    }
}

/// What a container's description may have. What is left out here is unknown to the reader, and what
/// is empty is not there, so all that is refused or ignored is said to be so.
fn features() -> Value {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "SCMP_ARCH_X86_64",
        _ => "SCMP_ARCH_AARCH64",
    };
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        // They would look for the container on the node.
        "hooks": [],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime",
            "nodev", "nodiratime", "noexec", "norelatime", "nosuid", "private", "rbind", "relatime",
            "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "sync",
        ],
        // containerd looks into this part without asking whether it is there.
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": CAPABILITIES,
            "cgroup": {
                "v1": true,
                "v2": true,
                "systemd": true,
                "systemdUser": false,
                "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": [architecture],
                "knownFlags": FLAGS,
                "supportedFlags": FLAGS,
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
        },
    })
}

const FLAGS: &[&str] = &[
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
];

/// All that Linux has (linux/capability.h), in the order of their numbers.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use rustix::thread::CapabilitySet;

    use super::*;

    #[test]
    fn options_come_back_and_features_are_json() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1],
        };
        let info = info(Some(options.clone()));
        assert_eq!((info.name.as_str(), info.options), (NAME, Some(options)));
        let features: Value = serde_json::from_slice(&info.features.unwrap().value).unwrap();
        let has = |pointer: &str, wanted: &str| {
            let names = features.pointer(pointer).unwrap().as_array().unwrap();
            names.iter().any(|name| name == wanted)
        };
        assert!(has("/mountOptions", "rro"));
        // Both would be asked for in vain.
        assert!(!has("/mountOptions", "rshared") && !has("/linux/namespaces", "user"));
        assert_eq!(
            features.pointer("/linux/mountExtensions/idmap/enabled"),
            Some(&Value::Bool(false))
        );
    }

    #[test]
    fn capabilities_are_those_the_agent_knows() {
        let known: Vec<_> = CapabilitySet::all()
            .iter_names()
            .map(|(name, _)| format!("CAP_{name}"))
            .collect();
        assert_eq!(known, CAPABILITIES);
    }
}
