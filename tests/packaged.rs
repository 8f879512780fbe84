//! Kernels of Debian's as they are packaged, with the modules that resources/guest/packaged chose. Each is booted once,
//! with the transport that its folder names, and does there what pods need of a kernel. For `.ci/long`: they are fetched
//! from Debian's archive.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use tempfile::{NamedTempFile, TempDir};
use tests::host::is_emulating;
use tests::network::alone;
use tests::podvmm::kvm_is_here;
use tests::{Podvmm, guest};

/// What the guest does with each device. The kernel's modules are all there by then, and no process can bring one.
const SCRIPT: &str = r#"
uname -r; nproc; cat /proc/sys/kernel/modules_disabled
cat /sys/class/net/eth0/address
mkdir /tmp/disk /tmp/share
mount -t ext4 /dev/vdb /tmp/disk && cat /tmp/disk/greeting
mount -t virtiofs data /tmp/share && cat /tmp/share/greeting && echo kept > /tmp/share/written
/tmp/share/guest_load vsock-call 77
total() { awk '/MemTotal/ {print $2}' /proc/meminfo; }
while [ $(total) -lt 600000 ]; do sleep 1; done; echo plugged
awk '/PCI-MSI.*virtio/ {print "messages"; exit}' /proc/interrupts
ls /sys/bus/pci/devices | head -n 1
dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c
exit 7"#;

/// The folder of the guest with the kernel of a release: of `PODVMM_TEST_PACKAGED`, words like `trixie=FOLDER`, or made
/// by resources/guest/packaged. `None` where it cannot run.
fn packaged(release: &str) -> Option<PathBuf> {
    if !kvm_is_here() {
        return None;
    }
    if is_emulating() {
        eprintln!("SKIPPED: KVM emulates, and Debian's kernels do not know");
        return None;
    }
    let folders = std::env::var("PODVMM_TEST_PACKAGED").unwrap_or_default();
    let mut folders = folders
        .split_whitespace()
        .filter_map(|it| it.split_once('='));
    if let Some((_, folder)) = folders.find(|(name, _)| *name == release) {
        return Some(folder.into());
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/guest/packaged");
    let output = Command::new(script)
        .arg(release)
        .stderr(Stdio::inherit())
        .output()
        .expect("it is there");
    assert!(output.status.success(), "{script} fails");
    let printed = String::from_utf8_lossy(&output.stdout);
    Some(printed.lines().last().expect("it prints a folder").into())
}

/// An ext4 image with a file in it.
fn disk() -> NamedTempFile {
    let folder = TempDir::new().expect("there is a temporary folder");
    fs::write(folder.path().join("greeting"), "from a disk\n").expect("and room in it");
    let image = NamedTempFile::new().expect("there is a temporary folder");
    image.as_file().set_len(8 << 20).expect("and room in it");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .args([folder.path(), image.path()])
        .status();
    assert!(made.expect("e2fsprogs is installed").success());
    image
}

/// Answers one call of the guest's.
fn answer(listener: &UnixListener) -> String {
    let (mut stream, _) = listener.accept().expect("it listens");
    let mut hello = String::new();
    stream.read_to_string(&mut hello).expect("it is text");
    let answered = stream.write_all(b"hello from the host");
    answered.expect("the guest reads");
    hello
}

/// Boots the kernel of a release, whose name begins so.
fn boot(release: &'static str, version: &'static str) {
    let Some(folder) = packaged(release) else {
        return;
    };
    alone(move || run(&folder, version));
}

fn run(folder: &Path, version: &str) {
    let _one = guest::one_at_a_time();
    let share = TempDir::new().expect("there is a temporary folder");
    let at = |name: &str| share.path().join(name);
    fs::write(at("greeting"), "from a share\n").expect("and room in it");
    fs::copy(guest::guest_load(), at("guest_load")).expect("it was built");
    let sockets = TempDir::new().expect("there is a temporary folder");
    let vsock = sockets.path().join("vsock");
    let listener = UnixListener::bind(sockets.path().join("vsock_77")).expect("it is new");
    let disk = disk();
    let options = [
        ["--cpus", "boot=2"],
        ["--memory", "size=512M,hotplug_size=1G,hotplugged_size=512M"],
        ["--disk", &format!("path={}", disk.path().display())],
        [
            "--fs",
            &format!("tag=data,shared_dir={}", share.path().display()),
        ],
        ["--net", "tap=packaged0,mac=02:00:00:00:00:07"],
        ["--vsock", &format!("cid=3,socket={}", vsock.display())],
        ["--balloon", "free_page_reporting=on"],
    ];
    let shell = ["--", "/bin/sh", "-c", SCRIPT];
    let mut podvmm = Podvmm::new(options.as_flattened().iter().chain(&shell));
    podvmm.command().env("PODVMM_GUEST", folder);
    // Not waited for: the guest may not get as far.
    let hello = thread::spawn(move || answer(&listener));
    let outcome = podvmm.run();
    let lines: Vec<_> = outcome.stdout.lines().collect();
    let expected = [
        "2",
        "1",
        "02:00:00:00:00:07",
        "from a disk",
        "from a share",
        "hello from the host",
        "plugged",
        "messages",
        "0000:00:00.0",
        "16",
    ];
    assert_eq!(outcome.code, Some(7), "{outcome:?}");
    assert!(lines[0].starts_with(version), "{outcome:?}");
    assert_eq!(lines[1..], expected, "{outcome:?}");
    let hello = hello.join().expect("the guest was answered");
    assert_eq!(hello, "hello from the guest");
    let written = fs::read_to_string(at("written"));
    assert_eq!(written.expect("the guest wrote it"), "kept\n");
}

#[test]
fn debian_12s_kernel_boots_unchanged() {
    boot("bookworm", "6.1.");
}

#[test]
fn debian_13s_kernel_boots_unchanged() {
    boot("trixie", "6.12.");
}

/// Whichever that is today.
#[test]
fn the_newest_kernel_of_debians_boots_unchanged() {
    boot("sid", "");
}
