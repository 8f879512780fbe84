//! The checker of the host, which tests of pods rely on: whatever is left is seen. Needs root.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use tempfile::Builder;
use tests::host::{Cgroup, PREFIX, Snapshot, need_root};
use tests::network;
use tests::podvmm::copy_program;

/// Things of the host are one test's at a time.
static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Makes a thing, looks whether exactly the lines that contain `expected` are new, and unmakes it.
fn seen<T>(expected: &str, make: impl FnOnce() -> T, unmake: impl FnOnce(T)) {
    let _one = ONE.lock();
    need_root();
    let before = Snapshot::take();
    let thing = make();
    let difference = before.difference(&Snapshot::take());
    unmake(thing);
    assert!(
        difference.iter().any(|line| line.contains(expected)),
        "{expected} is not among {difference:?}"
    );
    let left = before.difference_from_now(Duration::from_secs(5));
    let left: Vec<_> = left.iter().filter(|line| line.contains(expected)).collect();
    assert!(left.is_empty(), "seen though it is gone: {left:?}");
}

fn run(line: &str) {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    let status = Command::new(program).args(words).status();
    let status = status.unwrap_or_else(|error| panic!("{line}: {error}"));
    assert!(status.success(), "{line}: {status}");
}

/// A program that is no child of this one, as one that a shim forgot.
fn orphan(line: &str) -> u32 {
    let output = Command::new("setsid")
        .args([
            "--fork",
            "sh",
            "-c",
            &format!("echo $$; exec {line} >/dev/null 2>&1"),
        ])
        .output()
        .expect("util-linux is installed");
    let pid = String::from_utf8_lossy(&output.stdout);
    // Until the shell has become the program.
    std::thread::sleep(Duration::from_millis(500));
    pid.trim().parse().expect("the shell says its pid")
}

fn kill(pid: u32) {
    run(&format!("kill -9 {pid}"));
}

fn end(mut child: Child) {
    child.kill().expect("it is a child of ours");
    child.wait().expect("it is a child of ours");
}

#[test]
fn a_process_in_namespaces_of_its_own_is_seen() {
    seen("sleep", || orphan("unshare --net sleep 1000"), kill);
}

#[test]
fn a_child_of_the_test_is_not_seen() {
    let _one = ONE.lock();
    let before = Snapshot::take();
    let child = Command::new("unshare")
        .args(["--net", "sleep", "1000"])
        .spawn();
    let difference = before.difference(&Snapshot::take());
    end(child.expect("util-linux is installed"));
    let sleeps = difference.iter().filter(|line| line.contains("sleep 1000"));
    assert_eq!(sleeps.count(), 0, "{difference:?}");
}

#[test]
fn a_process_of_a_program_that_runs_pods_is_seen() {
    let folder = Builder::new()
        .tempdir()
        .expect("there is a temporary folder");
    let program = folder.path().join("containerd-shim-podvmm-v2");
    copy_program(Path::new("/bin/sleep"), &program);
    let line = format!("{} 1000", program.display());
    seen("containerd-shim", || orphan(&line), kill);
}

#[test]
fn a_mount_is_seen_even_on_another() {
    let folder = Builder::new()
        .tempdir()
        .expect("there is a temporary folder");
    let point = folder.path().display().to_string();
    run(&format!("mount -t tmpfs none {point}"));
    seen(
        &format!("mount {point} tmpfs 2"),
        || run(&format!("mount -t tmpfs none {point}")),
        |()| run(&format!("umount {point}")),
    );
    run(&format!("umount {point}"));
}

#[test]
fn a_link_is_seen() {
    seen(
        "link host pvmtest0",
        || network::ip("link add pvmtest0 type bridge"),
        |()| network::ip("link delete pvmtest0"),
    );
}

#[test]
fn a_qdisc_and_a_filter_are_seen() {
    network::ip("link add pvmtest1 type bridge");
    network::ip("link set pvmtest1 up");
    seen(
        "qdisc host pvmtest1 ingress",
        || run("tc qdisc add dev pvmtest1 ingress"),
        |()| run("tc qdisc delete dev pvmtest1 ingress"),
    );
    run("tc qdisc add dev pvmtest1 ingress");
    let rule = "filter add dev pvmtest1 ingress protocol all u32 match u32 0 0 action mirred egress redirect dev lo";
    seen(
        "filter host pvmtest1 ingress",
        || run(&format!("tc {rule}")),
        |()| run("tc filter delete dev pvmtest1 ingress"),
    );
    network::ip("link delete pvmtest1");
}

#[test]
fn a_network_namespace_and_a_link_in_it_are_seen() {
    seen(
        "namespace /run/netns/pvmtest2",
        || network::ip("netns add pvmtest2"),
        |()| network::ip("netns delete pvmtest2"),
    );
    network::ip("netns add pvmtest3");
    seen(
        "link /run/netns/pvmtest3 tap0",
        || network::ip("-n pvmtest3 tuntap add tap0 mode tap"),
        |()| network::ip("-n pvmtest3 link delete tap0"),
    );
    network::ip("netns delete pvmtest3");
}

#[test]
fn a_cgroup_is_seen_in_each_hierarchy() {
    seen("/pvmtest4", || Cgroup::new("pvmtest4"), drop);
}

#[test]
fn a_loop_device_is_seen() {
    let file = Builder::new()
        .prefix(".pvmtest")
        .tempfile()
        .expect("there is a temporary folder");
    file.as_file().set_len(1 << 20).expect("and room in it");
    let path = file.path().display().to_string();
    seen(
        &path,
        || {
            let output = Command::new("losetup")
                .args(["--find", "--show", &path])
                .output();
            let output = output.expect("util-linux is installed");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        },
        |device| run(&format!("losetup --detach {device}")),
    );
}

#[test]
fn a_socket_without_a_file_is_seen() {
    let folder = Builder::new()
        .tempdir()
        .expect("there is a temporary folder");
    let path = folder.path().join("podvmm.sock");
    seen(
        "socket",
        || {
            let socket = UnixListener::bind(&path).expect("the folder is writable");
            fs::remove_file(&path).expect("it is there");
            socket
        },
        drop,
    );
}

#[test]
fn files_of_runtimes_and_of_tests_are_seen() {
    fs::create_dir_all("/run/podvmm/pvmtest5").expect("root may");
    seen(
        "/run/podvmm/pvmtest5/socket",
        || File::create("/run/podvmm/pvmtest5/socket").expect("root may"),
        |_| fs::remove_file("/run/podvmm/pvmtest5/socket").expect("it is there"),
    );
    fs::remove_dir("/run/podvmm/pvmtest5").expect("it is empty");
    // Another test may use it.
    let _ = fs::remove_dir("/run/podvmm");
    seen(
        PREFIX,
        || {
            Builder::new()
                .prefix(PREFIX)
                .tempdir()
                .expect("it can be made")
        },
        drop,
    );
}

#[test]
fn what_is_gone_is_seen() {
    let _one = ONE.lock();
    network::ip("link add pvmtest6 type bridge");
    let before = Snapshot::take();
    network::ip("link delete pvmtest6");
    let difference = before.difference(&Snapshot::take());
    assert!(
        difference.contains(&"gone link host pvmtest6".to_owned()),
        "{difference:?}"
    );
}
