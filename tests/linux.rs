//! Linux in the guest: tens of seconds a boot where KVM emulates, so each boot
//! checks several things. Needs the guest that `resources/guest/build` makes.
//!
//! They are about booting: kernels, their command lines, and a command, whose streams no snapshot takes
//! along.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use api::http::Client;
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};
use tests::podvmm::kvm_is_here;
use tests::{Outcome, Podvmm, guest};

/// Boots the default guest with `options` and runs `script` in it.
fn shell(options: &[&str], script: &str) -> Outcome {
    let _one = guest::one_at_a_time();
    let transport = guest::transport();
    let shell = ["--transport", &transport, "--", "/bin/sh", "-c", script];
    Podvmm::new(options.iter().chain(&shell))
        .input(b"from the host\n")
        .run()
}

/// An ext4 image of 8 MiB.
fn ext4() -> NamedTempFile {
    let image = NamedTempFile::new().expect("there is a temporary folder");
    image.as_file().set_len(8 << 20).expect("and room in it");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(image.path())
        .status();
    assert!(made.expect("e2fsprogs is installed").success());
    image
}

/// What is in `file` on an ext4 image.
fn read_ext4(image: &Path, file: &str) -> String {
    let output = Command::new("debugfs")
        .arg("-R")
        .arg(format!("cat {file}"))
        .arg(image)
        .output();
    let output = output.expect("e2fsprogs is installed");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_command_has_its_streams_and_its_status() {
    if !kvm_is_here() {
        return;
    }
    let outcome = shell(
        &["--memory", "size=128M"],
        "uname -r; nproc; cat; echo oops >&2; exit 7",
    );
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(outcome.code, Some(7), "{outcome:?}");
    assert!(lines[0].starts_with("6.12."), "{outcome:?}");
    assert_eq!(lines[1..], ["1", "from the host"], "{outcome:?}");
    assert_eq!(outcome.stderr, "oops\n");
}

#[test]
fn cpus_memory_and_disks_are_as_configured_and_what_is_written_stays() {
    if !kvm_is_here() {
        return;
    }
    let (readonly, writable) = (ext4(), ext4());
    let disks = [&readonly, &writable].map(|image| format!("path={}", image.path().display()));
    let readonly_disk = format!("{},readonly=on", disks[0]);
    let writable_disk = format!("{},queues=2,id=data", disks[1]);
    let options = [
        ["--cpus", "boot=2"],
        ["--memory", "size=4G"],
        ["--disk", &readonly_disk],
        ["--disk", &writable_disk],
    ];
    let script = "nproc; awk '/MemTotal/ {print ($2 > 3900000)}' /proc/meminfo
        mkdir /tmp/r /tmp/w; mount -t ext4 -o ro /dev/vdb /tmp/r && ls -d /tmp/r/lost+found
        cat /sys/block/vdb/ro /sys/block/vdc/ro /sys/block/vdc/serial; echo
        mount -t ext4 /dev/vdc /tmp/w && echo kept > /tmp/w/file
        dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null || echo refused
        echo scratch > /root.txt && cat /root.txt";
    let outcome = shell(options.as_flattened(), script);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let expected = [
        "2",
        "1",
        "/tmp/r/lost+found",
        "1",
        "0",
        "data",
        "refused",
        "scratch",
    ];
    let words: Vec<_> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, expected, "{outcome:?}");
    assert_eq!(read_ext4(writable.path(), "/file"), "kept\n");
}

#[test]
fn a_file_beyond_the_hosts_file_size_limit_is_an_error_for_the_guest() {
    if !kvm_is_here() {
        return;
    }
    const LIMIT: u64 = 2 << 20;
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(8 << 20).unwrap();
    let folder = TempDir::new().unwrap();
    let disk = format!("path={}", disk.path().display());
    let share = format!("tag=data,shared_dir={}", folder.path().display());
    let script =
        "dd if=/dev/zero of=/dev/vdb bs=1M count=4 conv=fsync 2>&1 | grep -o 'Input/output error'
        mkdir /tmp/d; mount -t virtiofs data /tmp/d
        dd if=/dev/zero of=/tmp/d/file bs=1M count=4 2>&1 | grep -o 'File too large'
        truncate -s 4M /tmp/d/file 2>&1 | grep -o 'File too large'
        echo small > /tmp/d/small && cat /tmp/d/small";
    let _one = guest::one_at_a_time();
    let outcome = Podvmm::new([
        "--disk", &disk, "--fs", &share, "--", "/bin/sh", "-c", script,
    ])
    .file_size_limit(LIMIT)
    .run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let lines: Vec<_> = outcome.stdout.lines().collect();
    let too_large = "File too large";
    assert_eq!(lines, ["Input/output error", too_large, too_large, "small"]);
    assert_eq!(folder.path().join("file").metadata().unwrap().len(), LIMIT);
}

#[test]
fn a_bzimage_boots_with_a_folder_as_root() {
    if !kvm_is_here() {
        return;
    }
    let root = guest::root(&["sh"]);
    fs::write(root.path().join("etc/greeting"), "from a folder\n").unwrap();

    let kernel = guest::folder().join("bzImage");
    let options = [
        "--kernel",
        kernel.to_str().unwrap(),
        "--rootfs",
        root.path().to_str().unwrap(),
    ];
    let outcome = shell(&options, "busybox cat /etc/greeting; exit 3");
    let got = (outcome.code, outcome.stdout.as_str());
    assert_eq!(got, (Some(3), "from a folder\n"), "{outcome:?}");
}

#[test]
fn a_command_is_asked_to_end_and_what_happened_is_told() {
    if !kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let folder = TempDir::new().unwrap();
    let (socket, events) = (folder.path().join("api"), folder.path().join("events"));
    let script = "trap 'echo asked; exit 5' TERM; while :; do sleep 1; done";
    let monitor = format!("path={}", events.display());
    let options = [
        "--event-monitor",
        &monitor,
        "--api-socket",
        socket.to_str().unwrap(),
    ];
    let running = Podvmm::new(options.iter().chain(&["--", "/bin/sh", "-c", script])).spawn();
    let told = |event: &str| {
        let text = fs::read_to_string(&events).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.rev().find(|line: &Value| line["event"] == event)
    };
    while told("agent-ready").is_none() {
        thread::sleep(Duration::from_millis(100));
    }
    // The shell needs a moment to set its trap.
    thread::sleep(Duration::from_secs(3));
    let mut client = Client::connect(&socket).unwrap();
    client
        .call("PUT", "/api/v1/vm.power-button", None, &[])
        .unwrap();
    let outcome = running.wait();
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(5), "asked\n")
    );
    let phases = told("booted").unwrap()["properties"]["phases_us"].clone();
    assert!(phases["kernel"].as_u64().unwrap() > 0, "{phases}");
    let end = told("exited").unwrap()["properties"].clone();
    assert_eq!(
        (&end["reason"], &end["code"]),
        (&"command".into(), &5.into())
    );
}

#[test]
fn a_kernel_panic_is_told_from_a_reset() {
    if !kvm_is_here() {
        return;
    }
    let cmdline = ["--cmdline", "rdinit=/nonexistent root=/dev/nonexistent"];
    let outcome = shell(&cmdline, "true");
    assert_eq!(outcome.code, Some(122), "{outcome:?}");
    assert!(
        outcome.stderr.contains("the guest kernel panicked: "),
        "{outcome:?}"
    );
}
