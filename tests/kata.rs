//! The call sequences of Kata's two Cloud Hypervisor drivers, byte for byte: what they write, in
//! which pieces, and how they read what comes back.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::helper::virtiofsd;
use tests::network::{alone, tap};
use tests::payload::Protocol;
use tests::podvmm::{Running, kvm_is_here};
use tests::{Payload, Podvmm, code};

code!(spin, ".code32", "1: pause", "jmp 1b");

/// The memory of a host, which both drivers make the limit of what can be plugged: no whole number of
/// the blocks in which it is plugged.
const HOST_MIB: u64 = 3921;

/// How long either driver waits for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

fn plain(path: &Path) -> &str {
    path.to_str().expect("temporary files have plain names")
}

/// podvmm as both drivers start it: with their arguments, and its output kept open.
fn start(folder: &Path) -> Running {
    let socket = folder.join("clh-api.sock");
    let running = Podvmm::new(["--api-socket", plain(&socket), "-v", "--seccomp", "false"]).spawn();
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "it never serves");
        thread::sleep(Duration::from_millis(5));
    }
    running
}

fn connect(folder: &Path) -> UnixStream {
    let stream = UnixStream::connect(folder.join("clh-api.sock")).expect("it serves");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream
}

/// Writes `bytes` and passes `fds` along, in one call.
fn send(stream: &UnixStream, bytes: &str, fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(bytes.as_bytes())],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(bytes.len()));
}

/// Status, the head as it is, and the body by its Content-Length.
fn answer(stream: &mut UnixStream) -> (u16, String, String) {
    let mut bytes = Vec::new();
    let head = loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer in time");
        bytes.extend_from_slice(&byte);
        if bytes.ends_with(b"\r\n\r\n") {
            break String::from_utf8(bytes).expect("ASCII");
        }
    };
    let status = head
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .and_then(|status| status.parse().ok());
    let len = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |len| len.parse().expect("a number"));
    let mut body = vec![0; len];
    stream.read_exact(&mut body).expect("all of the body");
    let body = String::from_utf8(body).expect("ASCII");
    (status.expect("a status"), head, body)
}

/// The Go driver: net/http on a connection of its own for each call, generated models with all
/// their defaults, and a body that ends with a newline.
mod go {
    use super::*;

    pub(super) fn call(
        folder: &Path,
        method: &str,
        name: &str,
        body: Option<&Value>,
    ) -> (u16, String) {
        let mut stream = connect(folder);
        let body = body.map(|body| {
            let mut text = serde_json::to_string_pretty(body).expect("JSON");
            text.push('\n');
            text
        });
        let mut head = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\n\
             User-Agent: OpenAPI-Generator/1.0.0/go\r\n"
        );
        match &body {
            Some(body) => head.push_str(&format!(
                "Content-Length: {}\r\nAccept: application/json\r\n\
                 Content-Type: application/json\r\n",
                body.len()
            )),
            None if method == "PUT" => head.push_str("Content-Length: 0\r\n"),
            None => head.push_str("Accept: application/json\r\n"),
        }
        head.push_str("Accept-Encoding: gzip\r\n\r\n");
        send(&stream, &(head + &body.unwrap_or_default()), &[]);
        let (status, _, body) = answer(&mut stream);
        (status, body)
    }

    /// vm.add-net is written by hand: all of it and the tap in one message, and the answer read with
    /// http.ReadResponse.
    pub(super) fn add_net(folder: &Path, tap: BorrowedFd<'_>) -> u16 {
        let net = json!({
            "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "02:00:00:00:00:05",
            "iommu": false, "num_queues": 2, "queue_size": 256, "vhost_user": false,
            "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true, "offload_csum": true,
        });
        let body = net.to_string();
        let mut stream = connect(folder);
        let request = format!(
            "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
             Content-Length: {}\r\nAccept: application/json\r\nContent-Type: application/json\r\n\r\n\
             {body}",
            body.len()
        );
        send(&stream, &request, &[tap]);
        answer(&mut stream).0
    }

    pub(super) fn vm(kernel: &Path, disk: &Path, folder: &Path) -> Value {
        json!({
            "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
            "memory": {
                "size": 256 << 20, "mergeable": false, "hotplug_method": "Acpi",
                "hotplug_size": HOST_MIB << 20, "shared": true, "hugepages": false, "prefault": false,
                "thp": true,
            },
            "payload": {"kernel": kernel, "cmdline": "root=/dev/vda1 panic=1 quiet"},
            "disks": [{
                "path": disk, "readonly": true, "direct": false, "iommu": false, "num_queues": 1,
                "queue_size": 128, "vhost_user": false, "backing_files": false, "sparse": true,
                "image_type": "Raw",
            }],
            "fs": [{
                "tag": "kataShared", "socket": folder.join("virtiofsd.sock"), "num_queues": 1,
                "queue_size": 1024, "pci_segment": 1,
            }],
            "rng": {"src": "/dev/urandom", "iommu": false},
            "serial": {"mode": "Null", "iommu": false},
            "console": {"mode": "Off", "iommu": false},
            "vsock": {"cid": 3, "socket": folder.join("clh.sock"), "iommu": false},
            "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
            "platform": {"num_pci_segments": 2},
        })
    }
}

/// The Rust driver: one connection, requests in up to four writes, no Content-Type, answers read in
/// pieces of 256 bytes that are decoded one by one.
mod rs {
    use super::*;

    pub(super) fn call(
        stream: &mut UnixStream,
        method: &str,
        name: &str,
        body: Option<&str>,
        fds: &[BorrowedFd<'_>],
    ) -> (u16, Option<String>) {
        let head =
            format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        send(stream, &head, fds);
        if let Some(body) = body {
            stream
                .write_all(format!("Content-Length: {}\r\n", body.len()).as_bytes())
                .expect("it reads");
        }
        stream.write_all(b"\r\n").expect("it reads");
        if let Some(body) = body {
            stream.write_all(body.as_bytes()).expect("it reads");
        }
        response(stream)
    }

    fn response(stream: &mut UnixStream) -> (u16, Option<String>) {
        let mut text = String::new();
        let mut rest = None;
        loop {
            let mut bytes = [0; 256];
            let count = stream.read(&mut bytes).expect("an answer in time");
            assert!(count > 0, "it hung up: {text}");
            text.push_str(str::from_utf8(&bytes[..count]).expect("no character is cut in two"));
            let (Some(head_end), true) = (text.find("\r\n\r\n"), rest.is_none()) else {
                match rest {
                    Some(end) if text.len() >= end => break,
                    _ => continue,
                }
            };
            let len = text
                .find("Content-Length: ")
                .filter(|at| *at < head_end)
                .map_or(0, |at| {
                    let digits = &text[at + "Content-Length: ".len()..];
                    let (digits, _) = digits.split_once("\r\n").expect("a line");
                    digits.trim().parse::<usize>().expect("a number")
                });
            let end = head_end + 4 + len;
            if text.len() >= end {
                break;
            }
            rest = Some(end);
        }
        let (_, after) = text.split_once("HTTP/1.1 ").expect("a status line");
        let (status, _) = after.split_once('\r').expect("its end");
        let status = status.trim().parse().expect("nothing but a number");
        let (_, body) = text.split_once("\r\n\r\n").expect("a head");
        (status, (!body.is_empty()).then(|| body.to_owned()))
    }

    pub(super) fn vm(kernel: &Path, disk: &Path, folder: &Path) -> Value {
        json!({
            "cpus": {
                "boot_vcpus": 1, "max_vcpus": 2, "topology": null, "kvm_hyperv": false,
                "max_phys_bits": 46, "affinity": null, "features": {"amx": false},
            },
            "memory": {
                "size": 256 << 20, "mergeable": false, "hotplug_method": "Acpi",
                "hotplug_size": (HOST_MIB - 256).next_multiple_of(2) << 20,
                "hotplugged_size": null, "shared": true,
                "hugepages": false, "hugepage_size": null, "prefault": false, "zones": null,
                "thp": true,
            },
            "payload": {
                "firmware": null, "kernel": kernel, "cmdline": "reboot=k panic=1 quiet",
                "initramfs": null, "mrconfigid": null, "host_data": null,
            },
            "rate_limit_groups": null,
            "disks": [{
                "path": disk, "readonly": true, "direct": false, "iommu": false, "num_queues": 1,
                "queue_size": 128, "vhost_user": false, "vhost_socket": null,
                "rate_limiter_config": null, "id": null, "disable_io_uring": false,
                "pci_segment": 0, "image_type": "Unknown",
            }],
            "net": null, "rng": {"src": "/dev/urandom", "iommu": false}, "balloon": null,
            "fs": [], "pmem": null, "serial": {"file": null, "mode": "Off", "iommu": false},
            "console": {"file": null, "mode": "Off", "iommu": false}, "devices": [],
            "user_devices": null, "vdpa": null,
            "vsock": {
                "cid": 3, "socket": folder.join("ch-vm.sock"), "iommu": false, "id": null,
                "pci_segment": 0,
            },
            "pvpanic": false, "iommu": false, "sgx_epc": null, "numa": null, "watchdog": false,
            "gdb": false, "platform": null, "tpm": null, "landlock_enable": false,
            "landlock_rules": null,
        })
    }
}

/// A kernel of a few instructions and a disk, which neither driver minds.
fn parts(folder: &Path) -> Payload {
    fs::write(folder.join("image"), [0; 4096]).expect("it is writable");
    Payload::new(spin(), Protocol::Pvh)
}

fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let names = tasks.map(|task| fs::read_to_string(task.expect("it runs").path().join("comm")));
    names
        .map(|name| name.expect("it runs").trim().into())
        .collect()
}

#[test]
fn the_go_drivers_sequence_is_understood() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        let folder = TempDir::new().unwrap();
        let at = folder.path();
        let payload = parts(at);
        let shared = TempDir::new().unwrap();
        let _virtiofsd = virtiofsd(shared.path(), &at.join("virtiofsd.sock"));
        let running = start(at);
        let tap = tap("katago0");
        let (status, ping) = go::call(at, "GET", "vmm.ping", None);
        let ping: Value = serde_json::from_str(&ping).unwrap();
        assert_eq!(status, 200);
        assert_eq!(ping["pid"], running.pid());
        assert!(ping["version"].is_string() && ping["build_version"].is_string());
        let vm = go::vm(payload.path(), &at.join("image"), at);
        assert_eq!(
            go::call(at, "PUT", "vm.create", Some(&vm)),
            (204, String::new())
        );
        let info = || -> Value {
            let (status, info) = go::call(at, "GET", "vm.info", None);
            assert_eq!(status, 200);
            serde_json::from_str(&info).unwrap()
        };
        assert_eq!(info()["state"], "Created");
        assert_eq!(go::add_net(at, tap.as_fd()), 204);
        assert_eq!(go::call(at, "PUT", "vm.boot", None), (204, String::new()));
        let booted = info();
        assert_eq!(booted["state"], "Running");
        assert_eq!(booted["memory_actual_size"], 256 << 20);
        assert_eq!(booted["config"]["cpus"]["boot_vcpus"], 1);
        assert_eq!(booted["config"]["memory"]["size"], 256 << 20);
        assert_eq!(booted["config"]["memory"]["hotplug_size"], 3840_u64 << 20);
        // It looks for the vCPUs' threads by their names.
        assert!(threads(running.pid()).contains(&"vcpu0".into()));
        // vCPUs are told even when they stay as they are.
        for (sizes, vcpus) in [
            (json!({"desired_vcpus": 1}), 1),
            (json!({"desired_ram": 384 << 20}), 1),
            (json!({"desired_vcpus": 2}), 2),
        ] {
            let resized = go::call(at, "PUT", "vm.resize", Some(&sizes));
            assert_eq!(resized, (204, String::new()));
            assert_eq!(info()["config"]["cpus"]["boot_vcpus"], vcpus);
        }
        assert_eq!(go::call(at, "GET", "vmm.ping", None).0, 200);
        assert_eq!(
            go::call(at, "PUT", "vmm.shutdown", None),
            (200, String::new())
        );
        assert_eq!(running.wait().code, Some(0));
    });
}

#[test]
fn the_rust_drivers_sequence_is_understood() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        let folder = TempDir::new().unwrap();
        let at = folder.path();
        let payload = parts(at);
        let running = start(at);
        let tap = tap("katars0");
        let mut stream = connect(at);
        let (status, ping) = rs::call(&mut stream, "GET", "vmm.ping", None, &[]);
        assert_eq!(status, 200);
        assert!(ping.unwrap().contains("build_version"));
        // A name that is not ASCII must not be cut in two by its pieces.
        let image = at.join("bild-äöü-äöü-äöü");
        fs::copy(at.join("image"), &image).unwrap();
        let vm = rs::vm(payload.path(), &image, at);
        let vm = serde_json::to_string_pretty(&vm).unwrap();
        let done = (204, None);
        assert_eq!(
            rs::call(&mut stream, "PUT", "vm.create", Some(&vm), &[]),
            done
        );
        let net = json!({
            "tap": null, "ip": "192.168.249.1", "mask": "255.255.255.0",
            "mac": "02:00:00:00:00:06", "host_mac": null, "mtu": null, "iommu": false,
            "num_queues": 2, "queue_size": 256, "vhost_user": false, "vhost_socket": null,
            "vhost_mode": "Client", "id": null, "fds": [17], "rate_limiter_config": null,
            "pci_segment": 0,
        });
        let net = net.to_string();
        let fds = [tap.as_fd()];
        assert_eq!(
            rs::call(&mut stream, "PUT", "vm.add-net", Some(&net), &fds),
            done
        );
        assert_eq!(rs::call(&mut stream, "PUT", "vm.boot", None, &[]), done);
        let info = |stream: &mut UnixStream| -> Value {
            let (status, info) = rs::call(stream, "GET", "vm.info", None, &[]);
            assert_eq!(status, 200);
            serde_json::from_str(&info.unwrap()).unwrap()
        };
        let booted = info(&mut stream);
        // What its own types insist on.
        assert_eq!(booted["state"], "Running");
        let config = &booted["config"];
        assert!(config["cpus"]["max_phys_bits"].is_u64());
        assert_eq!(config["serial"]["mode"], "Off");
        assert_eq!(config["rng"]["src"], "/dev/urandom");
        assert_eq!(config["disks"][0]["image_type"], "Unknown");
        assert_eq!(config["disks"][0]["path"], plain(&image));
        assert_eq!(config["net"][0]["ip"], "192.168.249.1");
        assert_eq!(config["net"][0]["queue_size"], 256);
        let cpus = r#"{"desired_vcpus":2,"desired_ram":null,"desired_balloon":null}"#;
        assert_eq!(
            rs::call(&mut stream, "PUT", "vm.resize", Some(cpus), &[]),
            done
        );
        let ram = format!(
            r#"{{"desired_vcpus":null,"desired_ram":{},"desired_balloon":null}}"#,
            512 << 20
        );
        assert_eq!(
            rs::call(&mut stream, "PUT", "vm.resize", Some(&ram), &[]),
            done
        );
        assert_eq!(info(&mut stream)["config"]["cpus"]["boot_vcpus"], 2);
        let (status, body) = rs::call(&mut stream, "PUT", "vmm.shutdown", None, &[]);
        assert_eq!((status, body), (200, None));
        assert_eq!(running.wait().code, Some(0));
    });
}

/// Block volumes, with devices on a PCI bus: what each driver writes when one is needed, what it reads of the place that
/// its agent then waits for, and how it takes it away.
#[test]
fn disks_come_and_go_as_the_drivers_ask() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    let payload = parts(at);
    let running = start(at);
    let mut vm = rs::vm(payload.path(), &at.join("image"), at);
    vm["transport"] = "pci".into();
    vm["memory"]["shared"] = false.into();
    let mut stream = connect(at);
    let mut rust = |name: &str, body: Option<&Value>| {
        let body = body.map(|body| serde_json::to_string_pretty(body).unwrap());
        rs::call(&mut stream, "PUT", name, body.as_deref(), &[])
    };
    assert_eq!(rust("vm.create", Some(&vm)), (204, None));
    assert_eq!(rust("vm.boot", None), (204, None));
    let volume = at.join("volume");
    fs::write(&volume, [0; 8192]).unwrap();
    // Both take a place apart at its colons, and have the agent look for the two digits of the device.
    let place = |answer: &str| {
        let answer: Value = serde_json::from_str(answer).unwrap();
        let bdf = answer["bdf"].as_str().unwrap().to_owned();
        let digits = bdf
            .strip_prefix("0000:00:")
            .and_then(|it| it.strip_suffix(".0"));
        let device = u8::from_str_radix(digits.unwrap(), 16).unwrap();
        assert!((1..32).contains(&device), "{bdf}");
        answer["id"].as_str().unwrap().to_owned()
    };
    for _ in 0..3 {
        let disk = json!({
            "path": volume, "readonly": false, "direct": false, "iommu": false, "num_queues": 1,
            "queue_size": 1024, "vhost_user": false, "backing_files": false, "sparse": true,
            "image_type": "Raw",
        });
        let (status, body) = go::call(at, "PUT", "vm.add-disk", Some(&disk));
        assert_eq!(status, 200, "{body}");
        let gone = json!({"id": place(&body)});
        let removed = go::call(at, "PUT", "vm.remove-device", Some(&gone));
        assert_eq!(removed, (204, String::new()));

        let disk = json!({
            "path": volume, "readonly": false, "direct": false, "iommu": false, "num_queues": 1,
            "queue_size": 128, "vhost_user": false, "vhost_socket": null,
            "rate_limiter_config": null, "id": null, "disable_io_uring": false,
            "pci_segment": 0, "image_type": "Raw",
        });
        let (status, body) = rust("vm.add-disk", Some(&disk));
        assert_eq!(status, 200, "{body:?}");
        let gone = json!({"id": place(&body.unwrap())});
        assert_eq!(rust("vm.remove-device", Some(&gone)), (204, None));
    }
    assert_eq!(go::call(at, "PUT", "vmm.shutdown", None).0, 200);
    assert_eq!(running.wait().code, Some(0));
}

#[test]
fn answers_are_written_as_the_drivers_read_them() {
    let folder = TempDir::new().unwrap();
    let running = start(folder.path());
    let mut stream = connect(folder.path());
    send(
        &stream,
        "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[],
    );
    let (_, head, body) = answer(&mut stream);
    // No reason phrase, and this case: one driver looks for it as it stands.
    assert!(head.starts_with("HTTP/1.1 200 \r\n"), "{head:?}");
    assert!(
        head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
        "{head:?}"
    );
    send(
        &stream,
        "PUT /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[],
    );
    let (status, head, body) = answer(&mut stream);
    assert_eq!(status, 409);
    assert!(head.starts_with("HTTP/1.1 409 \r\n"), "{head:?}");
    let why: Vec<String> = serde_json::from_str(&body).unwrap();
    assert!(why[0].contains("vm.boot"), "{why:?}");
    running.signal(libc::SIGTERM);
    running.wait();
}
