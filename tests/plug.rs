//! Devices that come and go while a guest runs, with guests of a few instructions that never look at them;
//! tests/plugged.rs has Linux, which does.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use api::http::Client;
use serde_json::{Value, json};
use tests::code;
use tests::counter::url;
use tests::network::{alone, tap};
use tests::podvmm::kvm_is_here;
use tests::service::{Service, get, put, refusal};

code!(spin, ".code32", "1: pause", "jmp 1b");

/// Rounds of devices that come and go.
const ROUNDS: usize = 100;
/// What memory may differ by, as the allocator likes.
const SLACK: u64 = 512 << 10;

/// A guest that runs, with its devices on a PCI bus or not.
fn booted(transport: &str) -> (Service, Client) {
    let service = Service::start(spin());
    let mut client = service.client();
    let mut definition = service.definition();
    definition["transport"] = transport.into();
    put(&mut client, "vm.create", Some(definition)).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    (service, client)
}

fn disk_of(folder: &Path, name: &str) -> PathBuf {
    let disk = folder.join(name);
    fs::write(&disk, [0; 4096]).unwrap();
    disk
}

/// What the client is told of a device that it adds: its name, and its place.
fn add(client: &mut Client, request: &str, body: Value) -> (String, String) {
    let answer = put(client, request, Some(body)).unwrap();
    told(&answer)
}

fn told(answer: &[u8]) -> (String, String) {
    let answer: Value = serde_json::from_slice(answer).unwrap();
    let word = |name: &str| answer[name].as_str().unwrap().to_owned();
    (word("id"), word("bdf"))
}

fn remove(client: &mut Client, id: &str) -> (u16, String) {
    match put(client, "vm.remove-device", Some(json!({ "id": id }))) {
        Ok(_) => (204, String::new()),
        refused => refusal(refused),
    }
}

#[test]
fn devices_come_and_go_a_hundred_times_and_leave_nothing() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        let (service, mut client) = booted("pci");
        let disk = disk_of(service.folder.path(), "disk");
        let folder = service.folder.path().join("share");
        fs::create_dir(&folder).unwrap();
        let mut before = None;
        for round in 0..ROUNDS {
            let shared = json!({"tag": "t", "shared_dir": folder});
            let vsock = json!({"cid": 3, "socket": service.folder.path().join("vsock")});
            let added = [
                add(
                    &mut client,
                    "vm.add-disk",
                    json!({"path": disk, "num_queues": 2}),
                ),
                add_net(&mut client),
                add(&mut client, "vm.add-fs", shared),
                add(&mut client, "vm.add-vsock", vsock),
            ];
            let added = added
                .each_ref()
                .map(|(id, bdf)| (id.as_str(), bdf.as_str()));
            // The entropy device is there from the start.
            assert_eq!(
                added,
                [
                    ("disk0", "0000:00:02.0"),
                    ("net0", "0000:00:03.0"),
                    ("fs0", "0000:00:04.0"),
                    ("vsock", "0000:00:05.0"),
                ]
            );
            let info = get(&mut client, "vm.info");
            assert_eq!(info["config"]["disks"][0]["id"], "disk0");
            let counters = get(&mut client, "vm.counters");
            for (id, _) in added {
                assert_eq!(counters[id]["requests"], 0, "{id}");
                assert_eq!(remove(&mut client, id).0, 204);
                assert_eq!(remove(&mut client, id).0, 404, "it is gone at once");
            }
            let info = get(&mut client, "vm.info");
            for gone in ["disks", "net", "fs", "vsock"] {
                assert_eq!(info["config"][gone], Value::Null, "{gone}");
            }
            assert_eq!(info["leaving"], Value::Null);
            assert!(!service.folder.path().join("vsock").exists());
            let now = (service.proc("fd"), service.proc("task"), service.resident());
            let (descriptors, threads, resident) = *before.get_or_insert(now);
            assert_eq!((now.0, now.1), (descriptors, threads), "in round {round}");
            assert!(now.2 < resident + SLACK, "{resident}, then {}", now.2);
        }
        service.dismiss();
    });
}

/// As Kata writes it: no tap's name.
fn add_net(client: &mut Client) -> (String, String) {
    let tap = tap("podplug0");
    let body = json!({"mac": "02:00:00:00:00:05", "num_queues": 2}).to_string();
    let answer = client.call("PUT", "/api/v1/vm.add-net", Some(&body), &[tap.as_fd()]);
    told(&answer.unwrap())
}

#[test]
fn what_cannot_come_or_go_says_why_and_changes_nothing() {
    if !kvm_is_here() {
        return;
    }
    let (service, mut client) = booted("pci");
    let before = (service.proc("fd"), service.proc("task"));
    let config = |client: &mut Client| get(client, "vm.info")["config"].clone();
    let was = config(&mut client);
    let disk = disk_of(service.folder.path(), "disk");
    let mut refused = |request: &str, body: Value, status: u16, words: &str| {
        let (found, why) = refusal(put(&mut client, request, Some(body)));
        assert_eq!(found, status, "{why}");
        assert!(why.contains(words), "{why}");
    };
    refused(
        "vm.add-disk",
        json!({"path": "/nowhere"}),
        400,
        "disk /nowhere",
    );
    refused(
        "vm.add-disk",
        json!({"path": disk, "id": "rng"}),
        400,
        "another part of podvmm",
    );
    refused(
        "vm.add-disk",
        json!({"path": disk, "id": "a b"}),
        400,
        "id='a b'",
    );
    refused(
        "vm.remove-device",
        json!({"id": "rng"}),
        404,
        "no device 'rng'",
    );
    refused(
        "vm.resize-disk",
        json!({"id": "disk0", "desired_size": 4096}),
        404,
        "no device 'disk0'",
    );
    refused(
        "vm.resize-disk",
        json!({"id": "rng", "desired_size": 4096}),
        400,
        "no disk",
    );
    assert_eq!(config(&mut client), was);
    assert_eq!((service.proc("fd"), service.proc("task")), before);
    // One image is one disk's, and a bus has 31 places, one of which the entropy device has.
    let (id, _) = add(
        &mut client,
        "vm.add-disk",
        json!({"path": disk, "id": "data"}),
    );
    assert_eq!(id, "data");
    let twice = refusal(put(&mut client, "vm.add-disk", Some(json!({"path": disk}))));
    assert!(twice.1.contains("in use by another process"), "{twice:?}");
    for number in 0..29 {
        let disk = disk_of(service.folder.path(), &format!("d{number}"));
        add(&mut client, "vm.add-disk", json!({"path": disk}));
    }
    let disk = disk_of(service.folder.path(), "one-more");
    let full = refusal(put(&mut client, "vm.add-disk", Some(json!({"path": disk}))));
    assert!(full.1.contains("31 devices are possible"), "{full:?}");
    service.dismiss();

    let (service, mut client) = booted("mmio");
    let disk = disk_of(service.folder.path(), "disk");
    let (status, why) = refusal(put(&mut client, "vm.add-disk", Some(json!({"path": disk}))));
    assert_eq!(status, 409);
    assert!(why.contains("unless its transport is pci"), "{why}");
    assert_eq!(remove(&mut client, "rng").0, 409);
    service.dismiss();
}

#[test]
fn a_disk_gets_longer_and_shorter_with_its_file() {
    if !kvm_is_here() {
        return;
    }
    for transport in ["mmio", "pci"] {
        let service = Service::start(spin());
        let mut client = service.client();
        let [disk, other] = ["disk", "other"].map(|name| disk_of(service.folder.path(), name));
        let mut definition = service.definition();
        definition["transport"] = transport.into();
        definition["disks"] = json!([{"path": disk}, {"path": other, "readonly": true}]);
        put(&mut client, "vm.create", Some(definition)).unwrap();
        let size = |id: &str, bytes: u64| Some(json!({"id": id, "desired_size": bytes}));
        let early = refusal(put(&mut client, "vm.resize-disk", size("disk0", 8192)));
        assert_eq!(early.0, 409);
        put(&mut client, "vm.boot", None).unwrap();
        for bytes in [1 << 20, 512, 0, 4096] {
            put(&mut client, "vm.resize-disk", size("disk0", bytes)).unwrap();
            assert_eq!(fs::metadata(&disk).unwrap().len(), bytes);
        }
        for (id, bytes, words) in [
            ("disk0", 1000, "not a multiple of the 512"),
            ("disk1", 8192, "it is read-only"),
        ] {
            let (status, why) = refusal(put(&mut client, "vm.resize-disk", size(id, bytes)));
            assert_eq!((status, why.contains(words)), (400, true), "{why}");
        }
        assert_eq!(fs::metadata(&other).unwrap().len(), 4096);
        service.dismiss();
    }
}

#[test]
fn devices_are_where_they_were_after_a_restore() {
    if !kvm_is_here() {
        return;
    }
    let folder = tempfile::TempDir::new().unwrap();
    let snapshot = folder.path().join("snapshot");
    let disks = ["a", "b", "c"].map(|name| disk_of(folder.path(), name));
    let place =
        |client: &mut Client, path: &Path| add(client, "vm.add-disk", json!({"path": path}));
    let of = |id: &str, place: &str| (id.to_owned(), place.to_owned());
    let (service, mut client) = booted("pci");
    for (number, disk) in (2..).zip(&disks) {
        let expected = of(
            &format!("disk{}", number - 2),
            &format!("0000:00:0{number}.0"),
        );
        assert_eq!(place(&mut client, disk), expected);
    }
    assert_eq!(remove(&mut client, "disk0").0, 204);
    put(&mut client, "vm.pause", None).unwrap();
    put(
        &mut client,
        "vm.snapshot",
        Some(json!({"destination_url": url(&snapshot)})),
    )
    .unwrap();
    service.dismiss();

    let service = Service::start(spin());
    let mut client = service.client();
    let restore = json!({"source_url": url(&snapshot), "resume": true});
    put(&mut client, "vm.restore", Some(restore)).unwrap();
    let counters = get(&mut client, "vm.counters");
    assert_eq!(counters["disk0"], Value::Null);
    assert_eq!(counters["disk2"]["requests"], 0);
    assert_eq!(place(&mut client, &disks[0]), of("disk0", "0000:00:02.0"));
    assert_eq!(remove(&mut client, "disk2").0, 204);
    assert_eq!(place(&mut client, &disks[2]), of("disk2", "0000:00:04.0"));
    service.dismiss();
}

#[test]
fn a_vm_that_is_shut_down_boots_with_what_it_has_got() {
    if !kvm_is_here() {
        return;
    }
    let (service, mut client) = booted("pci");
    let disk = disk_of(service.folder.path(), "disk");
    add(
        &mut client,
        "vm.add-disk",
        json!({"path": disk, "id": "data"}),
    );
    put(&mut client, "vm.reboot", None).unwrap();
    assert_eq!(get(&mut client, "vm.counters")["data"]["requests"], 0);
    assert_eq!(remove(&mut client, "data").0, 204);
    put(&mut client, "vm.reboot", None).unwrap();
    assert_eq!(get(&mut client, "vm.counters")["data"], Value::Null);
    service.dismiss();
}
