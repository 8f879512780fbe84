//! Files and folders of the host, and the kubelet's empty ones, in a container.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use tests::cri::config::ContainerConfig;
use tests::node::{Node, Pod, mount, step};

/// The empty volume in memory, a tmpfs as the kubelet mounts it.
fn in_memory(node: &Node, pod: &Pod) -> PathBuf {
    let uid = &pod.config.metadata.as_ref().unwrap().uid;
    node.volume(uid, "empty-dir", "memory")
}

fn on_disk(node: &Node, pod: &Pod) -> PathBuf {
    let uid = &pod.config.metadata.as_ref().unwrap().uid;
    node.volume(uid, "empty-dir", "disk")
}

pub(crate) fn add(node: &Node, pod: &Pod, config: &mut ContainerConfig) {
    let data = node.folder().join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("sub/file"), "of the host\n").unwrap();
    fs::write(data.join("single"), "one file\n").unwrap();
    symlink("data", node.folder().join("link")).unwrap();
    let memory = in_memory(node, pod);
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
        .arg(&memory)
        .status();
    assert!(mounted.unwrap().success(), "root can mount");
    let disk = on_disk(node, pod);
    for folder in [&memory, &disk] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    }
    config.mounts.extend([
        mount(&data, "/data"),
        mount(&data.join("single"), "/etc/single"),
        mount(&node.folder().join("link"), "/link"),
        mount(&memory, "/memory"),
        mount(&disk, "/disk"),
    ]);
    let mut read_only = mount(&data, "/read-only");
    read_only.readonly = true;
    config.mounts.push(read_only);
}

pub(crate) fn seen(node: &Node, pod: &Pod, container: &str) {
    let data = node.folder().join("data");
    let [files, by_link, _] = node.sh_each(
        container,
        [
            "cat /data/sub/file /etc/single",
            "cat /link/single",
            "echo of the pod > /data/new; chown 12:34 /data/new; echo more >> /etc/single",
        ],
    );
    assert_eq!(files, "of the host\none file");
    assert_eq!(by_link, "one file");
    assert_eq!(
        fs::read_to_string(data.join("new")).unwrap(),
        "of the pod\n"
    );
    let metadata = fs::metadata(data.join("new")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12, 34));
    assert_eq!(
        fs::read_to_string(data.join("single")).unwrap(),
        "one file\nmore\n"
    );
    fs::write(data.join("later"), "written later\n").unwrap();
    let [later, read_only, kind, notes, modes] = node.sh_each(
        container,
        [
            "cat /data/later",
            "cat /read-only/single; { echo x > /read-only/x; } 2>&1 || echo refused",
            "awk '$2 == \"/memory\" { print $3 }' /proc/mounts",
            "for to in /memory /disk; do echo of $to > $to/note; \
                 dd if=/dev/zero of=$to/zeros bs=64k count=64 2>/dev/null || exit; done; \
             cat /memory/note /disk/note",
            "stat -c %a /memory /disk",
        ],
    );
    assert_eq!(later, "written later");
    assert!(read_only.contains("one file\nmore\n"), "{read_only}");
    assert!(read_only.contains("Read-only file system"), "{read_only}");
    assert!(read_only.ends_with("refused"), "{read_only}");
    assert!(!data.join("x").exists(), "it cannot be written");
    assert_eq!(kind, "tmpfs");
    assert_eq!(notes, "of /memory\nof /disk");
    assert_eq!(modes, "777\n777");
    let zeros = on_disk(node, pod).join("zeros");
    assert_eq!(fs::metadata(zeros).unwrap().len(), 4 << 20);
    also_seen(node, pod);
}

/// Both empty volumes are the pod's.
fn also_seen(node: &Node, pod: &Pod) {
    step("another container sees both", || {
        let mut config = tests::node::waiting("also");
        config.mounts.push(mount(&in_memory(node, pod), "/m"));
        config.mounts.push(mount(&on_disk(node, pod), "/d"));
        let also = node.run(pod, &config);
        let notes = node.sh(&also, "cat /m/note /d/note");
        assert_eq!(notes, "of /memory\nof /disk");
        node.cri.stop(&also, 30).unwrap();
        node.cri.remove(&also).unwrap();
    });
}

/// As the kubelet does once the pod is gone.
pub(crate) fn remove(node: &Node, pod: &Pod) {
    let unmounted = Command::new("umount").arg(in_memory(node, pod)).status();
    assert!(unmounted.unwrap().success(), "nothing uses it any more");
}
