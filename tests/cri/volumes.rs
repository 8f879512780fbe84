//! Files and folders of the host, and the kubelet's empty ones, in a container.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use tests::cri::config::ContainerConfig;
use tests::guest;
use tests::node::{Node, Pod, container, mount, step, waiting};

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
    let memory = memory(node, pod, "memory", "8m");
    let disk = on_disk(node, pod);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o777)).unwrap();
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
            // A file mounted by itself is another to a guest than in its folder, for a second.
            "sleep 1.5; cat /read-only/single; { echo x > /read-only/x; } 2>&1 || echo refused",
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
        let mut config = waiting("also");
        config.mounts.push(mount(&in_memory(node, pod), "/m"));
        config.mounts.push(mount(&on_disk(node, pod), "/d"));
        let also = node.run(pod, &config);
        let notes = node.sh(&also, "cat /m/note /d/note");
        assert_eq!(notes, "of /memory\nof /disk");
        node.cri.stop(&also, 30).unwrap();
        node.cri.remove(&also).unwrap();
    });
}

/// Volumes that are one for all containers of a pod: memory that an ended one leaves behind, a part of
/// it, and pipes, sockets and files on the host's.
pub(crate) fn shared(node: &Node, pod: &Pod) {
    let left = memory(node, pod, "left", "8m");
    let part = node.folder().join("volume-subpaths/left/0");
    fs::create_dir_all(left.join("part")).unwrap();
    fs::create_dir_all(&part).unwrap();
    // As the kubelet has a subPath.
    command(
        "mount",
        &[
            "--bind",
            left.join("part").to_str().unwrap(),
            part.to_str().unwrap(),
        ],
    );
    let mut first = container(
        "first",
        &[
            "sh",
            "-c",
            "echo whole > /left/note; echo part > /part/note",
        ],
    );
    first
        .mounts
        .extend([mount(&left, "/left"), mount(&part, "/part")]);
    let first = node.run(pod, &first);
    assert_eq!(node.ended(&first).exit_code, 0);
    node.cri.remove(&first).unwrap();

    let between = node.folder().join("between");
    fs::create_dir(&between).unwrap();
    let shm = memory(node, pod, "shm", "96m");
    let tools = guest::root(&[]);
    let [one, two] = ["one-of-both", "two-of-both"].map(|name| {
        let mut config = waiting(name);
        config.mounts.extend([
            mount(&left, "/left"),
            mount(&part, "/part"),
            mount(&between, "/v"),
            mount(&between, "/w"),
            mount(&shm, "/dev/shm"),
            mount(&tools.path().join("bin"), "/tools"),
        ]);
        if name.starts_with("two") {
            config.mounts[2].readonly = true;
        }
        node.run(pod, &config)
    });
    let [notes, shm_kib] = node.sh_each(
        &one,
        [
            "cat /left/note /left/part/note; echo x > /dev/shm/of-one",
            "df -k /dev/shm | awk 'END { print $2 }'",
        ],
    );
    assert_eq!(notes, "whole\npart");
    assert_eq!(shm_kib, "98304");
    step("a pipe and a socket between containers", || {
        node.sh(
            &one,
            "mkfifo /v/pipe; { echo through > /v/pipe; } >/dev/null 2>&1 & ln -sf /v/socket /dev/log; \
             syslogd -O /tmp/messages; while ! test -S /v/socket; do sleep 0.1; done",
        );
        let [note, through, refused] = node.sh_each(
            &two,
            [
                "cat /part/note /dev/shm/of-one",
                "timeout 20 cat /v/pipe; ln -sf /v/socket /dev/log; logger -t test said",
                "{ echo x > /v/refused; } 2>&1 || echo refused",
            ],
        );
        assert_eq!(note, "part\nx");
        assert_eq!(through, "through");
        assert!(refused.ends_with("refused"), "{refused}");
        let [said, twice] = node.sh_each(
            &one,
            [
                "i=0; until grep -c 'test: said' /tmp/messages; do i=$((i + 1)); test $i -lt 50 || exit; sleep 0.2; done",
                "{ echo twice > /w/pipe; } >/dev/null 2>&1 & timeout 20 cat /v/pipe",
            ],
        );
        assert_eq!((said.as_str(), twice.as_str()), ("1", "twice"));
    });
    step("locks, watches and mappings between containers", || {
        let script = "mkdir /v/of-both; /tools/guest_load shares /v/of-both >/tmp/shares 2>&1 </dev/null & \
            until grep ready /tmp/shares; do sleep 0.1; done";
        assert_eq!(node.sh(&one, script), "ready");
        // The same folder, by a mount that lets it be written to.
        let met = node.sh(&two, "/tools/guest_load meets /w/of-both");
        assert_eq!(met, "flock is held: true\nfcntl is held: true\nmapped: 1");
        let script = "i=0; until grep mapped /tmp/shares; do i=$((i + 1)); test $i -lt 50 || exit; \
            sleep 0.2; done; grep told /tmp/shares";
        assert_eq!(node.sh(&one, script), "mapped: 2\ntold of made: true");
    });
    step("access control lists", || lists(node, &one));
    for id in [one, two] {
        node.cri.stop(&id, 30).unwrap();
        node.cri.remove(&id).unwrap();
    }
    command("umount", &[part.to_str().unwrap()]);
}

/// On the container's root and on a volume, who is on a folder's list may read what is made in it.
fn lists(node: &Node, container: &str) {
    for place in ["/listed", "/v/listed"] {
        let said = node.sh(container, &format!("/tools/guest_load lists {place}"));
        assert_eq!(said, "1000: read\n1001: \nmode 100660", "{place}");
    }
}

/// A volume of memory as the kubelet makes it.
fn memory(node: &Node, pod: &Pod, name: &str, size: &str) -> PathBuf {
    let uid = &pod.config.metadata.as_ref().unwrap().uid;
    let folder = node.volume(uid, "empty-dir", name);
    let size = format!("size={size}");
    command(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            &size,
            "tmpfs",
            folder.to_str().unwrap(),
        ],
    );
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    folder
}

fn command(program: &str, words: &[&str]) {
    let status = Command::new(program).args(words).status();
    assert!(status.unwrap().success(), "{program} {words:?}");
}

/// As the kubelet does once the pod is gone.
pub(crate) fn remove(node: &Node, pod: &Pod) {
    let uid = &pod.config.metadata.as_ref().unwrap().uid;
    for name in ["memory", "left", "shm"] {
        let folder = node.volume(uid, "empty-dir", name);
        // It fails while something uses it.
        command("umount", &[folder.to_str().unwrap()]);
    }
}
