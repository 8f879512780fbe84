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

/// Prints one line of the status of a container's first process for each of `keys`.
fn status(keys: &str) -> String {
    format!("awk '/^({keys}):/ {{ print $2 }}' /proc/1/status")
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
    let status = status("CapEff|CapBnd|NoNewPrivs|Seccomp");
    let [who, may, writes, masked, sysctl, apart] = node.sh_each(
        &restricted,
        [
            "id",
            &status,
            "{ echo x > /x; } 2>&1 || echo refused",
            "test -s /etc/passwd || echo empty; echo /sys/firmware/*",
            "{ echo 1 > /proc/sys/kernel/printk; } 2>&1 || echo refused",
            "unshare -U true 2>&1 || echo refused",
        ],
    );
    assert_eq!(who, "uid=1234 gid=2345 groups=2345,3456,4567");
    assert_eq!(may, "0000000000000000\n0000000000000000\n1\n2");
    assert!(writes.contains("Read-only file system"), "{writes}");
    assert_eq!(masked, "empty\n/sys/firmware/*");
    assert!(sysctl.ends_with("refused"), "{sysctl}");
    // The profile of the runtime does not allow it.
    assert!(apart.ends_with("refused"), "{apart}");
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
    let [who, set, chown, link, mount] = node.sh_each(
        &plain,
        [
            "id",
            &status("CapEff"),
            "chown 1 /tmp 2>&1 || echo refused",
            "ip link add pvmtest9 type bridge && ip link delete pvmtest9",
            "mount -t tmpfs none /tmp 2>&1 || echo refused",
        ],
    );
    assert!(who.starts_with("uid=0(root) gid=0(root)"), "{who}");
    assert!(chown.ends_with("refused"), "{chown}");
    assert_eq!(link, "");
    assert!(mount.ends_with("refused"), "{mount}");
    let set = u64::from_str_radix(&set, 16).unwrap();
    let has = |number: u32| set & (1 << number) != 0;
    let (chown, kill, net_admin, sys_admin) = (has(0), has(5), has(12), has(21));
    assert_eq!(
        (chown, kill, net_admin, sys_admin),
        (false, true, true, false),
        "{set:x}"
    );
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
    let script = "mount -t tmpfs none /mnt && umount /mnt && ls /dev";
    let devices = node.sh(&privileged, script);
    let of_the_host = |name: &str| ["kvm", "vda", "mem"].contains(&name);
    assert!(!devices.lines().any(of_the_host), "{devices}");
    end(node, &privileged);
}
