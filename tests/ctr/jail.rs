//! What a pod's podvmm is left with, as the node sees it.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tests::ctr::Container;
use tests::node::{eventually, within};

use super::on_a_node;

/// Capabilities by their bits (linux/capability.h): CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP.
const OF_A_SHARE: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31;

/// The shim's `first_user`.
const FIRST_USER: u32 = 0x7000_0000;

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
    // It is a user that no other process is, and root for files alone.
    let users = status("Uid");
    let users: Vec<_> = users.split_whitespace().collect();
    let [real, effective, saved, files] = users[..] else {
        panic!("{users:?}")
    };
    assert_eq!((effective, saved, files), (real, real, "0"));
    let parent: u32 = status("PPid").parse().unwrap();
    assert_eq!(
        real.parse(),
        Ok(FIRST_USER + parent),
        "the shim's number tells"
    );
    assert!(status("Groups").split_whitespace().count() <= 1, "KVM's");
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
    // Nothing is run from its files, and no device opened but that one.
    for line in fs::read_to_string(process.join("mountinfo"))
        .unwrap()
        .lines()
    {
        let fields: Vec<_> = line.split(' ').collect();
        let mut wanted = vec!["nosuid", "noexec"];
        wanted.extend((fields[4] != "/dev/kvm").then_some("nodev"));
        let options: Vec<_> = fields[5].split(',').collect();
        assert!(wanted.iter().all(|it| options.contains(it)), "{line}");
        // What the host mounts below it later is seen if the shim shows it.
        assert!(
            !line.contains(" shared:") && (!line.contains(" master:") || fields[4] == "/"),
            "{line}"
        );
    }
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

/// A namespace of AppArmor's with a profile of its own: one that needs no compiler of profiles.
const NAMESPACE: &str = "podvmm-test";

/// The profile that a pod names is podvmm's: the guest's kernel has no AppArmor.
#[test]
fn a_podvmm_has_the_profile_that_its_pod_names() {
    let namespace = Path::new("/sys/kernel/security/apparmor/policy/namespaces").join(NAMESPACE);
    if fs::create_dir(&namespace).is_err() {
        eprintln!("SKIPPED: the host has no AppArmor, or this user no say in it");
        return;
    }
    on_a_node(|node| {
        if !node.is_podvmm() {
            return;
        }
        let container = Container::new(node, "profile");
        let profile = format!(":{NAMESPACE}://unconfined");
        let options = ["--rm", "--apparmor-profile", &profile];
        let mut command = container.run(&node.containerd, &options, &["cat"]);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        eventually("podvmm runs", || !container.vmms().is_empty());
        let label = format!("/proc/{}/attr/apparmor/current", container.vmm());
        eventually("it has the profile", || {
            fs::read_to_string(&label).is_ok_and(|label| label.contains(NAMESPACE))
        });
        // What its threads do, too, they do by this profile.
        let threads = format!("/proc/{}/task", container.vmm());
        for thread in fs::read_dir(threads).unwrap() {
            let label = thread.unwrap().path().join("attr/apparmor/current");
            // It may have ended since.
            if let Ok(label) = fs::read_to_string(label) {
                assert!(label.contains(NAMESPACE), "{label}");
            }
        }
        eventually("the container runs", || {
            container.state(&node.containerd) == "RUNNING"
        });
        drop(child.stdin.take());
        within(Duration::from_secs(20), "ctr ends", || {
            child.try_wait().unwrap().is_some()
        });
        assert!(child.wait().unwrap().success());
    });
    fs::remove_dir(&namespace).unwrap();
}
