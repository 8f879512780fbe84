//! What a container may do: users, capabilities, seccomp, what is masked.

use tests::cri::config::{Capability, ContainerConfig, Int64Value, ProfileType, SecurityProfile};
use tests::node::{self, Node, Pod, step};

pub(crate) fn cases(node: &Node, pod: &Pod) {
    restricted(node, pod);
    plain(node, pod);
    privileged(node, pod);
}

fn run(node: &Node, pod: &Pod, name: &str, change: impl FnOnce(&mut ContainerConfig)) -> String {
    let mut config = node::waiting(name);
    change(&mut config);
    node.run(pod, &config)
}

fn end(node: &Node, container: &str) {
    step("its end", || {
        node.cri.stop(container, 30).unwrap();
        node.cri.remove(container).unwrap();
    });
}

/// One line of the status of a container's first process.
fn status(node: &Node, container: &str, key: &str) -> String {
    node.sh(
        container,
        &format!("awk '$1 == \"{key}:\" {{ print $2 }}' /proc/1/status"),
    )
}

/// As the restricted policy of Kubernetes has it, and more.
fn restricted(node: &Node, pod: &Pod) {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let restricted = run(node, pod, "restricted", |config| {
        let security = node::security(config);
        security.run_as_user = Some(Int64Value { value: 1234 });
        security.run_as_group = Some(Int64Value { value: 2345 });
        security.supplemental_groups = vec![3456, 4567];
        security.readonly_rootfs = true;
        security.no_new_privs = true;
        security.capabilities = Some(Capability {
            drop_capabilities: words(&["ALL"]),
            ..Capability::default()
        });
        security.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault as i32,
            localhost_ref: String::new(),
        });
        security.masked_paths =
            words(&["/proc/kcore", "/proc/scsi", "/sys/firmware", "/etc/passwd"]);
        security.readonly_paths = words(&["/proc/sys", "/proc/bus"]);
    });
    assert_eq!(
        node.sh(&restricted, "id -u; id -g; id -G"),
        "1234\n2345\n2345 3456 4567"
    );
    let all = ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp"];
    let all = all.map(|key| status(node, &restricted, key));
    assert_eq!(all, ["0000000000000000", "0000000000000000", "1", "2"]);
    let exec = node.exec(&restricted, &["sh", "-c", "echo x > /x"]);
    assert!(exec.stderr.contains("Read-only file system"), "{exec:?}");
    let masked = node.sh(&restricted, "wc -c < /etc/passwd; ls /sys/firmware | wc -l");
    assert_eq!(masked, "0\n0");
    let exec = node.exec(
        &restricted,
        &["sh", "-c", "echo 1 > /proc/sys/kernel/printk"],
    );
    assert_ne!(exec.status, 0, "{exec:?}");
    let exec = node.exec(&restricted, &["unshare", "-U", "true"]);
    assert_ne!(
        exec.status, 0,
        "the profile of the runtime does not allow it: {exec:?}"
    );
    end(node, &restricted);
}

/// What containerd gives where nothing is asked for.
fn plain(node: &Node, pod: &Pod) {
    let plain = run(node, pod, "plain", |config| {
        let security = node::security(config);
        security.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["CHOWN".into()],
            ..Capability::default()
        });
        security.masked_paths = vec!["/proc/kcore".into()];
    });
    assert_eq!(node.sh(&plain, "id -u; id -g"), "0\n0");
    let set = u64::from_str_radix(&status(node, &plain, "CapEff"), 16).unwrap();
    let has = |number: u32| set & (1 << number) != 0;
    let (chown, kill, net_admin, sys_admin) = (has(0), has(5), has(12), has(21));
    assert_eq!(
        (chown, kill, net_admin, sys_admin),
        (false, true, true, false),
        "{set:x}"
    );
    let exec = node.exec(&plain, &["chown", "1", "/tmp"]);
    assert_ne!(exec.status, 0, "{exec:?}");
    node.sh(
        &plain,
        "ip link add pvmtest9 type bridge && ip link delete pvmtest9",
    );
    let exec = node.exec(&plain, &["mount", "-t", "tmpfs", "none", "/tmp"]);
    assert_ne!(exec.status, 0, "{exec:?}");
    end(node, &plain);
}

fn privileged(node: &Node, pod: &Pod) {
    if !node.is_podvmm() {
        // A privileged container of runc is let loose on the host; nothing is learnt from it here.
        return;
    }
    // containerd refuses it in a pod that is not said to be privileged itself.
    let mut pod = pod.clone();
    node::pod_security(&mut pod.config).privileged = true;
    let privileged = run(node, &pod, "privileged", |config| {
        node::security(config).privileged = true;
    });
    node.sh(&privileged, "mount -t tmpfs none /mnt && umount /mnt");
    let devices = node.sh(&privileged, "ls /dev");
    let of_the_host = |name: &str| ["kvm", "vda", "mem"].contains(&name);
    assert!(!devices.lines().any(of_the_host), "{devices}");
    end(node, &privileged);
}
