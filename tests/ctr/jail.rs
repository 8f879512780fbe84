//! What a pod's podvmm is left with, as the node sees it.

use std::fs;
use std::path::Path;

use tests::ctr::Container;

/// Capabilities by their bits (linux/capability.h): CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP.
const OF_A_SHARE: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31;

/// podvmm sees the pod's files and nothing else of the node, and can do little.
pub(crate) fn a_podvmm_is_in_one(container: &Container) {
    let process = format!("/proc/{}", container.vmm());
    let process = Path::new(&process);
    let text = fs::read_to_string(process.join("status")).unwrap();
    let status = |name: &str| {
        let mut fields = text.lines().filter_map(|line| line.split_once(":\t"));
        let (_, value) = fields.find(|(field, _)| *field == name).unwrap();
        value.trim().to_owned()
    };
    assert_eq!(
        (status("NoNewPrivs"), status("Seccomp")),
        ("1".into(), "2".into())
    );
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(
            u64::from_str_radix(&status(set), 16),
            Ok(OF_A_SHARE),
            "{set}"
        );
    }
    // Its own number is that of the first process of a namespace.
    assert!(status("NSpid").ends_with("\t1"), "{}", status("NSpid"));
    for namespace in ["mnt", "pid", "ipc", "uts", "cgroup", "net"] {
        let link = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(link(process), link("/proc/self".as_ref()), "{namespace}");
    }
    let root = process.join("root");
    for missing in ["etc", "usr/bin/sh", "sys", "var/run", "run/containerd"] {
        assert!(!root.join(missing).exists(), "{missing}");
    }
    let devices = fs::read_dir(root.join("dev")).unwrap();
    let devices: Vec<_> = devices.map(|device| device.unwrap().file_name()).collect();
    assert_eq!(devices, ["kvm"]);
    // Of the pod's folder it sees neither containerd's socket nor what the shim writes down.
    let mut seen = Vec::new();
    for owner in fs::read_dir(root.join("run/podvmm")).unwrap() {
        for pod in fs::read_dir(owner.unwrap().path()).unwrap() {
            let of_pod = fs::read_dir(pod.unwrap().path()).unwrap();
            seen.extend(of_pod.map(|entry| entry.unwrap().file_name()));
        }
    }
    seen.sort();
    assert_eq!(seen, ["shared", "vm"]);
    for line in fs::read_to_string(process.join("limits")).unwrap().lines() {
        if line.starts_with("Max core file size") {
            assert_eq!(line.split_whitespace().nth(4), Some("0"), "{line}");
        }
    }
}
