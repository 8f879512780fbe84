//! Memory that comes and goes, with Linux in the guest: one boot for all of it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tests::podvmm::kvm_is_here;
use tests::{Podvmm, guest};

const MIB: u64 = 1 << 20;
const BOOT: u64 = 256 * MIB;

/// What the guest does, told by the host through its memory's size: 256, 768, 896 and again 256 MiB,
/// of which the kernel keeps some for itself. The first may be over before it looks.
const SCRIPT: &str = "
    total() { while read name kib _; do [ $name = MemTotal: ] && echo $kib; done < /proc/meminfo; }
    at_least() { while [ $(total) -lt $1 ]; do sleep 1; done; }
    mount -t tmpfs none /mnt
    at_least 700000; echo grown
    dd if=/dev/zero of=/mnt/file bs=1M count=64 2>/dev/null; echo written
    at_least 820000; rm /mnt/file; echo removed
    while [ $(total) -gt 262144 ]; do sleep 1; done; echo shrunk";

fn api(socket: &Path, arguments: &[&str]) -> Value {
    let socket = socket.to_str().expect("temporary files have plain names");
    let call = ["api", "--json", "--socket", socket];
    let outcome = Podvmm::new(call.iter().chain(arguments)).run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null)
}

fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).expect("podvmm runs");
    let mut fields = text.split(' ').map(str::parse::<u64>);
    let pages = fields
        .nth(1)
        .expect("statm has seven fields")
        .expect("they are numbers");
    pages * 4096
}

/// Waits until it is so, as long as any guest may take.
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn memory_is_plugged_reported_and_unplugged_and_the_host_has_it_back() {
    if !kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let root = guest::root(&["sh", "sleep", "mount", "dd", "rm"]);
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("api");
    let options = [
        ["--rootfs", root.path().to_str().unwrap()],
        ["--memory", "size=256M,hotplug_size=1G"],
        ["--balloon", "deflate_on_oom=on,free_page_reporting=on"],
        ["--api-socket", socket.to_str().unwrap()],
    ];
    let command = ["--", "/bin/sh", "-c", SCRIPT];
    let running = Podvmm::new(options.as_flattened().iter().chain(&command)).spawn();
    let pid = running.pid();
    wait_until("the API", || socket.exists());
    let resize = |bytes: u64| api(&socket, &["resize", "--memory", &bytes.to_string()]);
    let actual = || {
        api(&socket, &["info"])["memory_actual_size"]
            .as_u64()
            .unwrap()
    };

    resize(BOOT + 512 * MIB);
    wait_until("512 MiB plugged", || actual() == BOOT + 512 * MIB);
    wait_until("a file of 64 MiB", || resident(pid) > 64 * MIB + BOOT / 8);
    let before = {
        // It grows until the file is written; then the guest waits for more memory.
        let mut last = 0;
        wait_until("the file", || {
            thread::sleep(Duration::from_secs(3));
            let now = resident(pid);
            now == std::mem::replace(&mut last, now)
        });
        last
    };
    resize(BOOT + 640 * MIB);
    wait_until("freed pages reported", || resident(pid) + 48 * MIB < before);
    let reported = resident(pid);
    resize(BOOT);
    wait_until("all of it unplugged", || actual() == BOOT);
    wait_until("less resident", || resident(pid) < reported);
    let after = resident(pid);
    eprintln!(
        "resident MiB: written {}, reported {}, unplugged {}",
        before / MIB,
        reported / MIB,
        after / MIB
    );
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stdout, "grown\nwritten\nremoved\nshrunk\n");
}
