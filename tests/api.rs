//! The HTTP API of the real binary, with guests of a few instructions.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::{Value, json};
use tests::network::{alone, tap};
use tests::podvmm::kvm_is_here;
use tests::service::{Service, get, put, refusal};
use tests::{Podvmm, code};

#[path = "api/resize.rs"]
mod resize;

code!(spin, ".code32", "1: pause", "jmp 1b");
code!(
    reset,
    ".code32",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: hlt",
    "jmp 1b"
);

code!(halt, ".code32", "cli", "1: hlt", "jmp 1b");

// Says what it is told, up to a q.
code!(
    echo,
    ".code32",
    "1: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 1b",
    "mov dx, 0x3f8",
    "in al, dx",
    "out dx, al",
    "cmp al, 'q'",
    "jne 1b",
    "mov al, 0xfe",
    "out 0x64, al",
    "2: hlt",
    "jmp 2b"
);

/// What memory may differ by, as the allocator likes.
const SLACK: u64 = 512 << 10;

#[test]
fn a_vm_is_created_booted_looked_at_paused_and_ended() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    assert!(get(&mut client, "vmm.ping")["pid"].is_u64());
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Created");
    put(&mut client, "vm.boot", None).unwrap();
    let info = get(&mut client, "vm.info");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["memory_actual_size"], 64 << 20);
    assert_eq!(info["config"]["cpus"]["max_vcpus"], 3);
    put(&mut client, "vm.pause", None).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Paused");
    put(&mut client, "vm.resume", None).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Running");
    put(&mut client, "vm.shutdown", None).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Shutdown");
    put(&mut client, "vm.boot", None).unwrap();
    put(&mut client, "vm.reboot", None).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Running");
    put(&mut client, "vm.delete", None).unwrap();
    let (status, _) = refusal(client.call("GET", "/api/v1/vm.info", None, &[]));
    assert_eq!(status, 409);
    service.dismiss();
}

#[test]
fn a_request_in_the_wrong_state_is_told_the_right_one() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    assert_eq!(
        refusal(put(&mut client, "vm.boot", None)),
        (
            409,
            "vm.boot: the VM is not created, it must be Created or Shutdown".into()
        )
    );
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    assert_eq!(
        refusal(put(&mut client, "vm.create", Some(service.definition()))),
        (
            409,
            "vm.create: the VM is Created, it must be not created".into()
        )
    );
    let (status, _) = refusal(put(&mut client, "vm.resume", None));
    assert_eq!(status, 409);
    service.dismiss();
}

#[test]
fn a_vm_that_cannot_be_says_why_and_stays_as_it_was() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    let mut definition = service.definition();
    definition["payload"]["kernel"] = "/nonexistent".into();
    put(&mut client, "vm.create", Some(definition)).unwrap();
    let (status, why) = refusal(put(&mut client, "vm.boot", None));
    assert_eq!(status, 400);
    assert!(why.contains("/nonexistent"), "{why}");
    assert_eq!(get(&mut client, "vm.info")["state"], "Created");
    service.dismiss();
}

/// KVM does not tell podvmm that a guest halted, so podvmm looks by itself, however many requests
/// clients send meanwhile.
#[test]
fn a_halted_guest_is_noticed_while_a_client_asks_without_a_pause() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(halt());
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let start = Instant::now();
    // It ends with its guest, and its connections with it.
    while client.call("GET", "/api/v1/vm.info", None, &[]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(30), "it goes on");
    }
    let outcome = service.running.wait();
    assert!(outcome.stderr.contains("the guest halted"), "{outcome:?}");
}

#[test]
fn counters_and_metrics_name_devices_and_exits() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let counters = get(&mut client, "vm.counters");
    assert_eq!(counters["rng"]["requests"], 0);
    assert!(counters["exits"]["io_out"].is_u64());
    let metrics = client.call("GET", "/metrics", None, &[]).unwrap();
    let metrics = String::from_utf8(metrics).unwrap();
    for line in [
        "podvmm_vm_state{state=\"Running\"} 1",
        "podvmm_device_requests_total{device=\"rng\"} 0",
        "# TYPE podvmm_vcpu_exits_total counter",
    ] {
        assert!(metrics.lines().any(|have| have == line), "{metrics}");
    }
    service.dismiss();
}

#[test]
fn devices_are_added_before_boot_with_descriptors_passed_along() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        let service = Service::start(spin());
        let mut client = service.client();
        put(&mut client, "vm.create", Some(service.definition())).unwrap();
        let tap = tap("podapi0");
        // As Kata writes it: no tap's name, and numbers that are the client's own.
        let net = json!({
            "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "02:00:00:00:00:05",
            "iommu": false, "num_queues": 2, "queue_size": 256, "vhost_user": false,
            "vhost_mode": "Client", "fds": [99], "id": null, "rate_limiter_config": null,
        });
        let body = net.to_string();
        let path = "/api/v1/vm.add-net";
        client
            .call("PUT", path, Some(&body), &[tap.as_fd()])
            .unwrap();
        let vsock = service.folder.path().join("vsock");
        let vsock = json!({"cid": 3, "socket": vsock});
        put(&mut client, "vm.add-vsock", Some(vsock)).unwrap();
        let disk = service.folder.path().join("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        put(
            &mut client,
            "vm.add-disk",
            Some(json!({"path": disk, "readonly": true})),
        )
        .unwrap();
        let none = client.call("PUT", path, Some(&body), &[]);
        assert_eq!(refusal(none).0, 400);
        put(&mut client, "vm.boot", None).unwrap();
        let info = get(&mut client, "vm.info");
        assert_eq!(info["config"]["net"][0]["mac"], "02:00:00:00:00:05");
        assert_eq!(info["config"]["net"][0]["fds"], Value::Null);
        assert_eq!(info["config"]["disks"][0]["num_queues"], 1);
        let counters = get(&mut client, "vm.counters");
        for device in ["net0", "vsock", "disk0"] {
            assert_eq!(counters[device]["requests"], 0, "{device}");
        }
        // The descriptor is kept for another life.
        put(&mut client, "vm.reboot", None).unwrap();
        let late = client.call("PUT", path, Some(&body), &[tap.as_fd()]);
        assert_eq!(refusal(late).0, 409);
        service.dismiss();
    });
}

#[test]
fn what_cannot_be_asked_of_a_guest_is_said() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    let (status, why) = refusal(put(&mut client, "vm.power-button", None));
    assert_eq!(status, 409, "{why}");
    let disk = service.folder.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    put(&mut client, "vm.add-disk", Some(json!({"path": disk}))).unwrap();
    let remove =
        |client: &mut Client, id: &str| put(client, "vm.remove-device", Some(json!({ "id": id })));
    remove(&mut client, "disk0").unwrap();
    let gone = refusal(remove(&mut client, "disk0"));
    assert_eq!(gone, (404, "there is no device 'disk0'".into()));
    put(&mut client, "vm.boot", None).unwrap();
    assert_eq!(get(&mut client, "vm.counters")["disk0"], Value::Null);
    let (status, why) = refusal(put(&mut client, "vm.power-button", None));
    assert_eq!(status, 400);
    assert!(why.starts_with("podvmm's agent runs no command"), "{why}");
    let (status, _) = refusal(remove(&mut client, "rng"));
    assert_eq!(status, 409);
    service.dismiss();
}

#[test]
fn shares_that_contradict_one_another_or_the_memory_are_refused() {
    let service = Service::start(spin());
    let mut client = service.client();
    let mut definition = service.definition();
    definition["fs"] = json!([{"tag": "a", "socket": "/s"}]);
    let (status, why) = refusal(put(&mut client, "vm.create", Some(definition.clone())));
    assert_eq!(status, 400);
    assert!(why.contains("needs memory with shared=on"), "{why}");
    definition["memory"]["shared"] = true.into();
    put(&mut client, "vm.create", Some(definition)).unwrap();
    let share = json!({"tag": "a", "shared_dir": "/tmp"});
    let (status, why) = refusal(put(&mut client, "vm.add-fs", Some(share)));
    assert_eq!((status, why.as_str()), (400, "two shares have the tag 'a'"));
    assert_eq!(get(&mut client, "vm.info")["config"]["fs"][1], Value::Null);
    service.dismiss();
}

#[test]
fn a_guest_that_ends_ends_podvmm() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(reset());
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let outcome = service.running.wait();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(
        outcome.stderr.contains("the guest reset itself"),
        "{outcome:?}"
    );
    assert!(!service.folder.path().join("api").exists());
}

#[test]
fn a_signal_ends_podvmm_and_removes_its_socket() {
    let service = Service::start(spin());
    // A client that is there and says nothing does not delay the end.
    let _client = service.client();
    service.running.signal(libc::SIGTERM);
    let outcome = service.running.wait();
    assert_eq!(outcome.code, Some(128 + libc::SIGTERM), "{outcome:?}");
    assert!(!service.folder.path().join("api").exists());
}

#[test]
fn two_hundred_lives_leave_nothing_behind() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    let mut definition = service.definition();
    for end in ["serial", "console"] {
        let socket = service.folder.path().join(end);
        definition[end] = json!({"mode": "Socket", "socket": socket});
    }
    let mut live = || {
        put(&mut client, "vm.create", Some(definition.clone())).unwrap();
        put(&mut client, "vm.boot", None).unwrap();
        put(&mut client, "vm.delete", None).unwrap();
    };
    let idle = service.proc("task");
    // Who reads a console notices by itself that its VM is gone.
    let settle = || {
        while service.proc("task") > idle {
            thread::sleep(Duration::from_millis(1));
        }
    };
    // The first lives warm up what stays: allocator arenas, thread stacks.
    (0..5).for_each(|_| live());
    settle();
    let before = (service.proc("fd"), service.proc("task"), service.maps());
    let (files, resident) = (service.files(), service.resident());
    (0..200).for_each(|_| live());
    settle();
    let after = (service.proc("fd"), service.proc("task"), service.maps());
    assert_eq!((before.0, before.1), (after.0, after.1));
    assert!(
        after.2 <= before.2 + 8,
        "{} maps, then {}",
        before.2,
        after.2
    );
    assert_eq!(service.files(), files);
    assert!(service.resident() < resident + SLACK);
    service.dismiss();
}

#[test]
fn many_requests_and_connections_leave_nothing_behind() {
    let service = Service::start(spin());
    let mut client = service.client();
    let mut many = |count: usize| {
        for _ in 0..count {
            get(&mut client, "vmm.ping");
        }
        let clients: Vec<_> = (0..count / 10).map(|_| service.client()).collect();
        drop(clients);
        get(&mut client, "vmm.ping");
    };
    many(1);
    // With this client alone.
    let idle = service.proc("fd");
    many(10_000);
    while service.proc("fd") > idle {
        thread::sleep(Duration::from_millis(1));
    }
    let before = (service.proc("fd"), service.proc("task"), service.maps());
    let resident = service.resident();
    many(10_000);
    // Those that left are noticed in the order in which they come to be looked at.
    while service.proc("fd") > before.0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(
        before,
        (service.proc("fd"), service.proc("task"), service.maps())
    );
    assert!(service.resident() < resident + SLACK);
    service.dismiss();
}

#[test]
fn kata_rust_clients_read_the_status_their_own_way() {
    let service = Service::start(spin());
    let mut stream = UnixStream::connect(service.socket()).unwrap();
    for piece in [
        "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n",
        "\r\n",
    ] {
        stream.write_all(piece.as_bytes()).unwrap();
    }
    let mut bytes = [0; 256];
    let count = stream.read(&mut bytes).unwrap();
    let text = str::from_utf8(&bytes[..count]).unwrap();
    let (_, rest) = text.split_once("HTTP/1.1 ").unwrap();
    let (status, _) = rest.split_once('\r').unwrap();
    assert_eq!(status.trim().parse::<u16>().unwrap(), 200);
    assert!(text.contains("\r\nContent-Length: "), "{text}");
    service.dismiss();
}

#[test]
fn a_person_talks_to_it_with_the_same_binary() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let socket = service.socket();
    let socket = socket.to_str().unwrap();
    let ask = |command: &[&str]| {
        let arguments = ["api", "--socket", socket].into_iter();
        Podvmm::new(arguments.chain(command.iter().copied())).run()
    };
    let definition = service.folder.path().join("vm.json");
    fs::write(&definition, service.definition().to_string()).unwrap();
    assert_eq!(ask(&["create", definition.to_str().unwrap()]).code, Some(0));
    assert_eq!(ask(&["boot"]).code, Some(0));
    let info = ask(&["info"]);
    assert!(
        info.stdout
            .lines()
            .any(|line| line.split_whitespace().eq(["state", "Running"]))
    );
    let info: Value = serde_json::from_str(&ask(&["--json", "info"]).stdout).unwrap();
    assert_eq!(info["vcpus_actual"], 1);
    let refused = ask(&["resize", "--cpus", "9"]);
    assert_eq!(refused.code, Some(125));
    assert_eq!(
        refused.stderr,
        "podvmm: desired_vcpus: 9: this VM can have 1 to 3\n"
    );
    assert_eq!(ask(&["exit"]).code, Some(0));
    assert_eq!(service.running.wait().code, Some(0));
}

#[test]
fn a_person_is_on_the_guests_console() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(echo());
    let socket = service.socket();
    let console = ["api", "--socket", socket.to_str().unwrap(), "console"];
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    let none = Podvmm::new(console).run();
    assert_eq!(
        none.stderr,
        "podvmm: neither console nor serial has mode Socket\n"
    );
    put(&mut client, "vm.delete", None).unwrap();

    let mut definition = service.definition();
    let path = service.folder.path().join("serial");
    definition["serial"] = json!({"mode": "Socket", "socket": path});
    put(&mut client, "vm.create", Some(definition)).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let seen = Podvmm::new(console).input(b"who is there? q").run();
    assert_eq!(seen.stdout, "who is there? q");
    assert_eq!(seen.code, Some(0), "{seen:?}");
    assert_eq!(service.running.wait().code, Some(0));
    assert!(!path.exists());
}

#[test]
fn a_jail_has_what_clients_may_name_and_nothing_else() {
    if !kvm_is_here() || !rustix::process::geteuid().is_root() {
        return;
    }
    let service = Service::start_with(spin(), |kernel| {
        let kernel = format!("read={}", kernel.display());
        let user = ["--jail-user", "7777"];
        let jail = ["--jail", "required", "--jail-path", &kernel];
        jail.into_iter().chain(user).map(String::from).collect()
    });
    let mut client = service.client();
    let mut definition = service.definition();
    put(&mut client, "vm.create", Some(definition.clone())).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    assert_eq!(get(&mut client, "vm.info")["state"], "Running");
    put(&mut client, "vm.delete", None).unwrap();
    // What is beside it is not there for podvmm, though it is for others.
    definition["disks"] = json!([{"path": "/etc/passwd", "readonly": true}]);
    put(&mut client, "vm.create", Some(definition)).unwrap();
    let (status, why) = refusal(put(&mut client, "vm.boot", None));
    assert_eq!(status, 400, "{why}");
    assert!(
        why.contains("/etc/passwd") && why.contains("No such file"),
        "{why}"
    );
    service.dismiss();
}

#[test]
fn a_jail_is_ended_by_a_signal_to_the_process_outside() {
    if !kvm_is_here() || !rustix::process::geteuid().is_root() {
        return;
    }
    let service = Service::start_with(spin(), |_| ["--jail", "required"].map(String::from).into());
    let outside = rustix::process::Pid::from_raw(service.running.pid().cast_signed());
    let ended = rustix::process::kill_process(outside.unwrap(), rustix::process::Signal::TERM);
    ended.unwrap();
    let outcome = service.running.wait();
    // As without a jail, 128 and the signal's number; and the socket is gone.
    assert_eq!(outcome.code, Some(143), "{outcome:?}");
    assert!(!outcome.stderr.contains("WARN"), "{outcome:?}");
    assert_eq!(fs::read_dir(service.folder.path()).unwrap().count(), 0);
}
