//! What this host offers a microVM, what is slow or missing, and the remedy.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::host::{KvmKind, is_virtual_machine};

/// One thing that was looked at.
struct Finding {
    what: &'static str,
    state: String,
    /// What to do about it, if something is slow or missing.
    remedy: Option<&'static str>,
}

/// KVM capabilities podvmm uses.
const CAPABILITIES: [(Cap, &str); 6] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::Pit2, "PIT2"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
];

/// The report, a line for each finding and an indented one for each remedy.
pub(crate) fn report() -> String {
    let mut findings = kvm();
    findings.extend([
        device("network", "/dev/net/tun", "needed for --net: modprobe tun"),
        device(
            "vhost-net",
            "/dev/vhost-net",
            "optional, faster networking: modprobe vhost_net",
        ),
        device(
            "vhost-vsock",
            "/dev/vhost-vsock",
            "optional: modprobe vhost_vsock",
        ),
        huge_pages(),
        transparent_huge_pages(),
        cgroups(),
        sibling_threads(),
        mitigations(Path::new("/sys/devices/system/cpu/vulnerabilities")),
        merged_pages(),
    ]);
    let mut text = String::new();
    for finding in findings {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<14} {}", finding.what, finding.state);
        if let Some(remedy) = finding.remedy {
            let _ = writeln!(text, "{:<14}   -> {remedy}", "");
        }
    }
    text
}

fn kvm() -> Vec<Finding> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            return vec![Finding {
                what: "/dev/kvm",
                state: format!("cannot be opened: {error}"),
                remedy: Some("load kvm_intel or kvm_amd, and let this user open it (group kvm)"),
            }];
        }
    };
    let kind = KvmKind::of_this_host();
    let nested = if is_virtual_machine() {
        ", in a virtual machine"
    } else {
        ""
    };
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    vec![
        Finding {
            what: "KVM",
            state: format!("{kind}{nested}"),
            remedy: (kind == KvmKind::Emulating).then_some(
                "guest kernels run at about 1.5 million instructions a second; \
                 use bare metal or nested virtualization for speed",
            ),
        },
        Finding {
            what: "KVM API",
            state: format!(
                "version {}, {} vCPUs a VM",
                kvm.get_api_version(),
                kvm.get_max_vcpus()
            ),
            remedy: None,
        },
        Finding {
            what: "capabilities",
            state: if missing.is_empty() {
                format!("all {} that podvmm uses", CAPABILITIES.len())
            } else {
                format!("missing: {}", missing.join(", "))
            },
            remedy: (!missing.is_empty()).then_some("podvmm needs a newer host kernel"),
        },
    ]
}

fn device(what: &'static str, path: &str, remedy: &'static str) -> Finding {
    let exists = Path::new(path).exists();
    Finding {
        what,
        state: format!("{path} {}", if exists { "is there" } else { "is missing" }),
        remedy: (!exists).then_some(remedy),
    }
}

fn huge_pages() -> Finding {
    let free = read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    Finding {
        what: "huge pages",
        state: format!("{} free of 2 MiB", free.as_deref().unwrap_or("none")),
        remedy: matches!(free.as_deref(), None | Some("0"))
            .then_some("only for hugepages=on: set /proc/sys/vm/nr_hugepages"),
    }
}

fn transparent_huge_pages() -> Finding {
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = setting
        .split_whitespace()
        .find_map(|word| word.strip_prefix('['));
    let chosen = chosen.map_or("missing", |word| word.trim_end_matches(']'));
    Finding {
        what: "THP",
        state: chosen.into(),
        remedy: matches!(chosen, "never" | "missing")
            .then_some("set /sys/kernel/mm/transparent_hugepage/enabled to madvise"),
    }
}

fn cgroups() -> Finding {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    Finding {
        what: "cgroups",
        state: if unified {
            "version 2"
        } else {
            "version 1 or none"
        }
        .into(),
        remedy: (!unified)
            .then_some("Kubernetes wants version 2: systemd.unified_cgroup_hierarchy=1"),
    }
}

/// What guests on two threads of one core can learn of each other.
fn sibling_threads() -> Finding {
    let active = read("/sys/devices/system/cpu/smt/active");
    let is_active = active.as_deref() == Some("1");
    Finding {
        what: "SMT",
        state: if is_active { "on" } else { "off or none" }.into(),
        remedy: is_active.then_some(
            "guests on one core can learn of each other: nosmt, or core scheduling, for hostile pods",
        ),
    }
}

/// Faults of the processor that the kernel does not make up for, by the folder that lists them.
fn mitigations(folder: &Path) -> Finding {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let open = entries.filter(|entry| {
        let state = fs::read_to_string(entry.path()).unwrap_or_default();
        state.starts_with("Vulnerable")
    });
    let mut open: Vec<_> = open
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    open.sort();
    Finding {
        what: "mitigations",
        state: match &open[..] {
            [] => "none is missing".into(),
            open => format!("missing: {}", open.join(", ")),
        },
        remedy: (!open.is_empty()).then_some(
            "guests can learn of the host: boot without mitigations=off, and update microcode",
        ),
    }
}

/// Whether the kernel merges equal pages of all processes, by which a guest can tell what another has.
fn merged_pages() -> Finding {
    let runs = read("/sys/kernel/mm/ksm/run");
    let is_on = runs.as_deref() == Some("1");
    Finding {
        what: "KSM",
        state: if is_on { "on" } else { "off or none" }.into(),
        remedy: is_on
            .then_some("guests can tell what pages others have: echo 2 > /sys/kernel/mm/ksm/run"),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_leaves_open_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for (name, state) in [
            ("meltdown", "Not affected"),
            (
                "mds",
                "Vulnerable: Clear CPU buffers attempted, no microcode",
            ),
            ("spectre_v2", "Mitigation: Retpolines"),
            ("l1tf", "Vulnerable"),
        ] {
            fs::write(folder.path().join(name), state).unwrap();
        }
        let found = mitigations(folder.path());
        assert_eq!(found.state, "missing: l1tf, mds");
        assert!(found.remedy.is_some());
        let found = mitigations(Path::new("/nonexistent"));
        assert_eq!(
            (found.state.as_str(), found.remedy),
            ("none is missing", None)
        );
    }
}
