//! `vm.resize`, with guests of a few instructions. More of vCPUs that come and go is in `tests/cpus.rs`, and
//! what Linux does with memory in `tests/devices.rs`.

use api::http::Client;
use serde_json::{Value, json};
use tests::podvmm::kvm_is_here;
use tests::service::{Service, get, put, refusal};

use super::spin;

#[test]
fn vcpus_come_and_go_within_bounds() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    put(&mut client, "vm.create", Some(service.definition())).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let resize = |client: &mut Client, count: u8| {
        put(client, "vm.resize", Some(json!({"desired_vcpus": count})))
    };
    resize(&mut client, 1).unwrap();
    resize(&mut client, 3).unwrap();
    let info = get(&mut client, "vm.info");
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 3);
    assert_eq!(info["vcpus_actual"], 3);
    // The others wait to be started, so they stand still at once.
    resize(&mut client, 1).unwrap();
    assert_eq!(get(&mut client, "vm.info")["vcpus_actual"], 1);
    for (count, why) in [
        (
            0,
            "the body is not what vm.resize takes: desired_vcpus: 0 vCPUs: 1 to 254 is possible",
        ),
        (4, "desired_vcpus: 4: this VM can have 1 to 3"),
    ] {
        let refused = refusal(resize(&mut client, count));
        assert_eq!(refused, (400, why.into()));
    }
    service.dismiss();
}

#[test]
fn memory_that_a_vm_cannot_have_is_refused_by_what_it_can() {
    if !kvm_is_here() {
        return;
    }
    const MIB: u64 = 1 << 20;
    let cases = [
        (
            0,
            "desired_ram",
            128,
            "134217728 bytes: this VM has 67108864 and cannot grow",
        ),
        (0, "desired_balloon", 1, "this VM has no balloon"),
        (
            128,
            "desired_ram",
            256,
            "268435456 bytes: this VM can have 67108864 to 201326592",
        ),
        (
            128,
            "desired_ram",
            32,
            "33554432 bytes: this VM can have 67108864 to 201326592",
        ),
        (
            128,
            "desired_balloon",
            256,
            "268435456 bytes: this VM has 201326592 at most",
        ),
    ];
    for (hotplug_mib, field, mib, why) in cases {
        let service = Service::start(spin());
        let mut client = service.client();
        let mut definition = service.definition();
        definition["memory"]["hotplug_size"] = (hotplug_mib * MIB).into();
        if hotplug_mib > 0 {
            definition["balloon"] = json!({"size": 0});
        }
        put(&mut client, "vm.create", Some(definition)).unwrap();
        put(&mut client, "vm.boot", None).unwrap();
        let before = get(&mut client, "vm.info");
        let refused = refusal(put(
            &mut client,
            "vm.resize",
            Some(json!({field: mib * MIB})),
        ));
        assert_eq!(refused, (400, format!("{field}: {why}")));
        assert_eq!(get(&mut client, "vm.info"), before);
        service.dismiss();
    }
}

#[test]
fn a_vm_has_after_a_reboot_what_it_grew_to() {
    if !kvm_is_here() {
        return;
    }
    let service = Service::start(spin());
    let mut client = service.client();
    let mut definition = service.definition();
    definition["memory"]["hotplug_size"] = (512 << 20).into();
    put(&mut client, "vm.create", Some(definition)).unwrap();
    put(&mut client, "vm.boot", None).unwrap();
    let sizes = json!({"desired_vcpus": 3, "desired_ram": (64 + 128) << 20, "desired_balloon": 0});
    put(&mut client, "vm.resize", Some(sizes)).unwrap();
    put(&mut client, "vm.reboot", None).unwrap();
    let info = get(&mut client, "vm.info");
    assert_eq!(info["vcpus_actual"], 3);
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 3);
    assert_eq!(info["config"]["memory"]["hotplugged_size"], 128 << 20);
    // It has none.
    assert_eq!(info["config"]["balloon"], Value::Null);
    service.dismiss();
}
