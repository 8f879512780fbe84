//! resources/openapi.yaml says what the code does.

use std::collections::BTreeSet;

use api::http::Request;
use api::route::ROUTES;
use api::{CpuCount, Resize, VmConfig};
use serde_json::{Value, json};

/// A VM with every field there is. A share has a folder or a socket, so there are two.
fn all_of_a_vm() -> Value {
    let rate = json!({"size": 1, "one_time_burst": 1, "refill_time": 1});
    let rates = json!({"bandwidth": rate, "ops": rate});
    json!({
        "payload": {"kernel": "/k", "initramfs": "/i", "cmdline": "quiet",
                    "agent_policy": "a line\n"},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 2, "max_phys_bits": 40,
                 "topology": {"cores_per_die": 2}},
        "memory": {"size": 1 << 30, "hotplug_size": 1 << 30, "hotplugged_size": 1 << 27,
                   "hugepages": false, "thp": false, "shared": true},
        "disks": [{"path": "/d", "readonly": true, "direct": true, "num_queues": 2,
                   "queue_size": 64, "serial": "s", "image_type": "Unknown", "disable_io_uring": true,
                   "rate_limiter_config": rates, "id": "_disk0"}],
        "net": [{"tap": "t", "mac": "02:00:00:00:00:01", "mtu": 1400, "num_queues": 4,
                 "queue_size": 64, "offload_tso": false, "offload_ufo": false,
                 "offload_csum": false, "rate_limiter_config": rates, "id": "_net0",
                 "ip": "10.0.0.1", "mask": "255.0.0.0"}],
        "fs": [{"tag": "a", "shared_dir": "/s", "readonly": true, "cache": "none",
                "writeback": true, "num_queues": 2, "queue_size": 64,
                "rate_limiter_config": rates, "id": "_fs0"},
               {"tag": "b", "socket": "/v", "num_queues": 1, "queue_size": 512}],
        "balloon": {"size": 1, "deflate_on_oom": true, "free_page_reporting": true},
        "rng": {"src": "/dev/random"},
        "vsock": {"cid": 3, "socket": "/v", "id": "_vsock0"},
        "serial": {"mode": "File", "file": "/log"},
        "console": {"mode": "Socket", "socket": "/c"},
        "transport": "pci",
    })
}

/// The schema that `name` stands for, or that `schema` refers to.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => document.pointer(&path[1..]).expect("it refers to a schema"),
        None => schema,
    }
}

/// Collects the names of all fields of `value` by where they are, and of `schema` likewise.
fn names(value: &Value, at: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                found.insert(format!("{at}.{name}"));
                names(field, &format!("{at}.{name}"), found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, at, found)),
        _ => {}
    }
}

fn described(document: &Value, schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    let schema = resolved(document, schema);
    if let Some(items) = schema.get("items") {
        return described(document, items, at, found);
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        found.insert(format!("{at}.{name}"));
        described(document, field, &format!("{at}.{name}"), found);
    }
}

#[test]
fn the_fields_of_a_vm_are_those_of_its_structs() {
    let document = document();
    let vm = VmConfig::parse(all_of_a_vm().to_string().as_bytes()).unwrap();
    let unknown = [
        &vm.others,
        &vm.payload.others,
        &vm.memory.others,
        &vm.rng.others,
    ];
    assert!(
        unknown.iter().all(|others| others.is_empty()),
        "{unknown:?}"
    );
    assert!(vm.disks[0].others.is_empty() && vm.net[0].others.is_empty());
    assert!(vm.fs[0].others.is_empty() && vm.vsock.as_ref().unwrap().others.is_empty());
    let (mut read, mut written, mut in_text) = Default::default();
    names(&all_of_a_vm(), "vm", &mut read);
    names(&vm.json(), "vm", &mut written);
    described(
        &document,
        &document["components"]["schemas"]["VmConfig"],
        "vm",
        &mut in_text,
    );
    assert_eq!(read, written, "what is read is written again");
    // A console has a file or a socket.
    read.extend(["vm.serial.socket".into(), "vm.console.file".into()]);
    assert_eq!(read, in_text, "what is read is described");
}

fn document() -> Value {
    serde_norway::from_str(include_str!("../resources/openapi.yaml")).expect("it is YAML")
}

#[test]
fn every_route_is_described_and_every_path_is_a_route() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let mut described: Vec<(String, String)> = Vec::new();
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            described.push((method.to_uppercase(), path.clone()));
        }
    }
    let mut routes: Vec<(String, String)> = ROUTES
        .iter()
        .map(|route| (route.method.into(), route.path.into()))
        .collect();
    described.sort();
    routes.sort();
    assert_eq!(described, routes);
}

#[test]
fn the_examples_are_understood_and_name_every_field() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let example = |name: &str| schemas[name]["example"].to_string();
    VmConfig::parse(example("VmConfig").as_bytes()).unwrap();
    let resize: Resize = serde_json::from_str(&example("VmResize")).unwrap();
    assert_eq!(resize.desired_vcpus.map(CpuCount::get), Some(2));
    for (path, name) in [("vm.snapshot", "Snapshot"), ("vm.restore", "Restore")] {
        let body = example(name).into_bytes();
        let path = format!("{}{path}", api::route::PREFIX);
        api::route::request(Request {
            method: "PUT".into(),
            path,
            body,
            fds: Vec::new(),
        })
        .unwrap();
    }
    for name in ["VmConfig", "VmResize", "Snapshot", "Restore"] {
        let properties = schemas[name]["properties"].as_object().unwrap();
        let shown = schemas[name]["example"].as_object().unwrap();
        assert!(properties.keys().eq(shown.keys()), "{name}");
    }
}
