use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::error::tests::printed;

fn definition(json: &Value) -> Definition {
    Definition::parse(json.to_string().as_bytes()).unwrap()
}

fn refusal(json: &Value) -> String {
    let error = Definition::parse(json.to_string().as_bytes()).unwrap_err();
    printed(&error)
}

#[test]
fn a_kernel_is_enough() {
    let Definition { config, json } = definition(&json!({"payload": {"kernel": "/k"}}));
    assert_eq!(config.cpus.boot().get(), 1);
    assert_eq!(config.memory.size.bytes(), 512 << 20);
    assert_eq!((config.serial, config.console), (Output::Null, Output::Off));
    assert_eq!(json["serial"]["mode"], "Null");
    assert_eq!(json["memory"]["size"], 512 << 20);
    assert_eq!(json["cpus"]["max_phys_bits"], 46);
}

#[test]
fn nulls_and_unknown_fields_mean_nothing() {
    let config = definition(&json!({
        "payload": {"kernel": "/k", "initramfs": null, "cmdline": null, "mrconfigid": null},
        "cpus": null, "memory": {"size": null, "zones": null}, "disks": null, "devices": [],
        "iommu": false, "rng": {"src": "/dev/urandom", "iommu": false}, "flavour": {"sweet": true},
    }))
    .config;
    assert!(config.disks.is_empty());
}

#[test]
fn what_kata_sends_is_understood() {
    let config = definition(&json!({
        "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
        "landlock_rules": null, "rate_limit_groups": [],
        "payload": {"kernel": "/k", "cmdline": "quiet"},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4, "kvm_hyperv": false, "nested": true,
                 "topology": {"threads_per_core": 1, "cores_per_die": 4, "dies_per_package": 1,
                              "packages": 1},
                 "core_scheduling": "Off", "affinity": [], "features": {"amx": false}},
        "memory": {"size": 2147483648_u64, "mergeable": false, "hotplug_method": "Acpi",
                   "shared": true, "hugepages": false, "prefault": false, "thp": true},
        "disks": [{"path": "/d", "readonly": true, "direct": false, "iommu": false,
                   "num_queues": 1, "queue_size": 128, "vhost_user": false,
                   "backing_files": false, "sparse": true, "image_type": "Unknown"}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "serial": {"mode": "Off", "iommu": false}, "console": {"mode": "Off", "iommu": false},
        "platform": {"num_pci_segments": 2, "tdx": false, "sev_snp": false},
    }))
    .config;
    assert_eq!((config.cpus.boot().get(), config.cpus.max().get()), (1, 4));
    assert!(config.memory.shared);
    assert_eq!(config.disks, [crate::DiskConfig::new("/d".into(), true)]);
}

/// What both of Kata's drivers ask for on a host with so many KiB of memory.
fn hotplug_sizes(host_kib: u64, size_mib: u64) -> [u64; 2] {
    // The Go driver asks for the host's memory in MiB; the Rust driver for what the VM leaves of it, up
    // to the next 2 MiB.
    let go = (host_kib >> 10) << 20;
    let left = (host_kib << 10).saturating_sub(size_mib << 20);
    [go, left.next_multiple_of(2 << 20)]
}

proptest! {
    #[test]
    fn what_kata_asks_for_on_any_host_is_possible(
        host_kib in 64_u64 << 10..24 << 30,
        size_mib in (16_u64..1024).prop_map(|step| 2 * step),
    ) {
        for asked in hotplug_sizes(host_kib, size_mib) {
            let Definition { config, json } = definition(&json!({
                "payload": {"kernel": "/k"},
                "memory": {"size": size_mib << 20, "hotplug_method": "Acpi", "hotplug_size": asked},
            }));
            let possible = config.memory.hotplug_size.0;
            prop_assert_eq!(possible % (128 << 20), 0);
            let most = (1 << 40) - (size_mib << 20);
            prop_assert!(possible <= asked && possible + (128 << 20) > asked.min(most));
            prop_assert_eq!(&json["memory"]["hotplug_size"], possible);
        }
    }
}

#[test]
fn memory_plugged_at_start_is_part_of_what_can_be_plugged() {
    let memory = |plugged_mib: u64| {
        let memory = json!({"hotplug_size": 200 << 20, "hotplugged_size": plugged_mib << 20});
        json!({"payload": {"kernel": "/k"}, "memory": memory})
    };
    let plugged = |mib| definition(&memory(mib)).config.memory.hotplugged_size.0;
    assert_eq!([plugged(64), plugged(200)], [64 << 20, 128 << 20]);
    assert_eq!(
        refusal(&memory(256)),
        "memory: hotplugged_size=256M is more than hotplug_size=128M"
    );
}

#[test]
fn what_cannot_be_honoured_is_named() {
    let with = |key: &str, value: Value| {
        let mut vm = json!({"payload": {"kernel": "/k"}});
        vm[key] = value;
        refusal(&vm)
    };
    assert_eq!(
        with("devices", json!([{"path": "/sys/x"}])),
        "devices: there is no PCI, and so no VFIO"
    );
    assert_eq!(
        with(
            "disks",
            json!([{"path": "/a"}, {"path": "/b", "iommu": true}])
        ),
        "disks.*.iommu: there is no virtual IOMMU"
    );
    assert_eq!(
        with("memory", json!({"size": 5 << 20})),
        "memory.size: 5M of RAM: 32M to 1024G is possible"
    );
    assert_eq!(
        with("cpus", json!({"boot_vcpus": 2, "max_vcpus": 1})),
        "cpus: max=1 is less than boot=2"
    );
    assert_eq!(
        with("disks", json!([{"path": "/a", "num_queues": 99}])),
        "disks: queues=99: 1 to 16 are possible"
    );
    assert_eq!(
        with("serial", json!({"mode": "File"})),
        "serial: mode File needs a file"
    );
    assert_eq!(
        with("console", json!({"mode": "Socket"})),
        "console: mode Socket needs a socket"
    );
    let cookie = "give podvmm a core scheduling cookie before it starts: its threads inherit it";
    for mode in ["Vm", "Vcpu"] {
        let refused = with("cpus", json!({"boot_vcpus": 1, "core_scheduling": mode}));
        assert_eq!(refused, format!("cpus.core_scheduling: {cookie}"));
    }
    let shape = "guests have one package with one die, max_vcpus cores and one thread each";
    for (key, count) in [
        ("threads_per_core", 2),
        ("dies_per_package", 2),
        ("packages", 4),
        ("cores_per_die", 3),
    ] {
        let cpus = json!({"boot_vcpus": 1, "max_vcpus": 4, "topology": {key: count}});
        let refused = with("cpus", cpus);
        assert_eq!(refused, format!("cpus.topology.{key}: {shape}"));
    }
    let limit = "each disk has a limit of its own";
    assert_eq!(
        with("rate_limit_groups", json!([{"id": "group"}])),
        format!("rate_limit_groups: {limit}")
    );
    assert_eq!(
        with(
            "disks",
            json!([{"path": "/a", "rate_limit_group": "group"}])
        ),
        format!("disks.*.rate_limit_group: {limit}")
    );
    assert_eq!(
        with("landlock_rules", json!([{"path": "/a", "access": "r"}])),
        "landlock_rules: podvmm does not use Landlock"
    );
    let pty = with("console", json!({"mode": "Pty"}));
    assert!(
        pty.starts_with("console.mode: unknown variant `Pty`"),
        "{pty}"
    );
    let qcow = with("disks", json!([{"path": "/a", "image_type": "Qcow2"}]));
    assert!(
        qcow.starts_with("disks[0].image_type: unknown variant `Qcow2`"),
        "{qcow}"
    );
}

#[test]
fn a_body_that_is_no_vm_says_where_it_stops_being_one() {
    assert!(refusal(&json!({})).starts_with(".: missing field `payload`"));
    assert!(refusal(&json!({"payload": {}})).starts_with("payload: missing field `kernel`"));
    assert!(refusal(&json!([1])).contains("invalid"));
    let error = printed(&Definition::parse(b"{} x").unwrap_err());
    assert!(error.contains("trailing characters"), "{error}");
}

#[test]
fn answers_are_ascii() {
    let value = json!({"path": "/größe/🦀"});
    let text = ascii(&value);
    assert!(text.is_ascii());
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
}

#[test]
fn devices_are_removed_by_their_clients_name_or_ours() {
    let body = r#"{"payload":{"kernel":"/k"},"vsock":{"cid":3,"socket":"/s"},
        "disks":[{"path":"/a"},{"path":"/b","id":"_disk7"},{"path":"/c"}],
        "fs":[{"tag":"t","shared_dir":"/d"}]}"#;
    let mut vm = Definition::parse(body.as_bytes()).unwrap();
    for (id, there) in [
        ("_disk7", true),
        ("_disk7", false),
        ("disk1", true),
        ("net0", false),
        ("fs0", true),
        ("vsock", true),
        ("vsock", false),
        ("", false),
    ] {
        assert_eq!(vm.remove(id), there, "{id}");
    }
    assert_eq!(vm.config.disks.len(), 1);
    assert_eq!(vm.json["disks"][0]["path"], "/a");
    assert!(vm.config.vsock.is_none() && vm.config.shares.is_empty());
}

#[test]
fn what_is_written_of_a_vm_is_the_same_vm() {
    use crate::{KernelConfig, MemoryConfig};
    let kernel = KernelConfig {
        path: "/k".into(),
        initramfs: Some("/i".into()),
        cmdline: "quiet".into(),
    };
    let memory = "size=1G,hotplug_size=1G,hotplugged_size=128M,thp=off,shared=on";
    let config = VmConfig {
        kernel,
        cpus: "boot=2,max=4".parse().unwrap(),
        memory: memory.parse::<MemoryConfig>().unwrap(),
        balloon: Some("size=64M,deflate_on_oom=on".parse().unwrap()),
        disks: vec![
            "path=/d,readonly=on,id=x,bw_size=5,bw_refill_time=7"
                .parse()
                .unwrap(),
        ],
        nets: vec![
            "tap=t,mac=02:00:00:00:00:01,mtu=1400,offload_tso=off"
                .parse()
                .unwrap(),
        ],
        shares: vec![
            "tag=a,shared_dir=/a,readonly=on,cache=always"
                .parse()
                .unwrap(),
            "tag=b,socket=/s".parse().unwrap(),
        ],
        vsock: Some("cid=5,socket=/v".parse().unwrap()),
        serial: Output::File("/log".into()),
        console: Output::Socket("/c".into()),
    };
    let written = Definition::of(config.clone());
    let read = Definition::parse(written.json.to_string().as_bytes()).unwrap();
    assert_eq!(format!("{:?}", read.config), format!("{config:?}"));
    assert_eq!(read.json, written.json);
}

#[test]
fn a_snapshots_configuration_is_patched() {
    let vm = json!({
        "payload": {"kernel": "/k"},
        "net": [{"mac": "02:00:00:00:00:01", "num_queues": 4}],
        "vsock": {"cid": 3, "socket": "/old"},
        "balloon": {"size": 0},
    });
    let patch = json!({"vsock": {"socket": "/new"}, "balloon": null});
    let fds = || (0..2).map(|_| std::fs::File::open("/dev/null").unwrap().into());
    let body = vm.to_string();
    let read = Definition::restored(body.as_bytes(), &patch, fds().collect()).unwrap();
    assert_eq!(read.config.vsock.unwrap().socket.to_str(), Some("/new"));
    assert!(read.config.balloon.is_none());
    assert_eq!(read.config.nets[0].pairs, 2);
    let error = Definition::restored(body.as_bytes(), &patch, Vec::new()).unwrap_err();
    let causes = printed(&error);
    assert!(causes.contains("give either tap=NAME or fd=N"), "{causes}");
}

#[test]
fn new_sizes_are_both_what_is_said_and_what_is_booted() {
    let mut vm = definition(&json!({
        "payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 1, "max_vcpus": 4},
        "memory": {"size": 1 << 29, "hotplug_size": 1 << 30}, "balloon": {"size": 1 << 20},
    }));
    vm.resize(Resize {
        desired_vcpus: Some(3),
        desired_ram: Some((1 << 29) + (1 << 28)),
        desired_balloon: Some(1 << 22),
    })
    .unwrap();
    let again = definition(vm.json());
    for config in [vm.config(), again.config()] {
        assert_eq!((config.cpus.boot().get(), config.cpus.max().get()), (3, 4));
        assert_eq!(config.memory.hotplugged_size.0, 1 << 28);
        assert_eq!(config.balloon.unwrap().size.0, 1 << 22);
    }
}

#[test]
fn a_size_that_cannot_be_changes_nothing() {
    let mut vm = definition(&json!({"payload": {"kernel": "/k"}}));
    let before = vm.json().clone();
    let sizes = [
        (Some(2), None, "max=1 is less than boot=2"),
        (
            None,
            Some(1 << 30),
            "hotplugged_size=512M is more than hotplug_size=0 bytes",
        ),
    ];
    for (desired_vcpus, desired_ram, why) in sizes {
        let error = vm.resize(Resize {
            desired_vcpus,
            desired_ram,
            ..Resize::default()
        });
        assert_eq!(error.unwrap_err().to_string(), why);
    }
    // Not even a device that there is none of.
    vm.resize(Resize {
        desired_balloon: Some(0),
        ..Resize::default()
    })
    .unwrap();
    assert_eq!(vm.json(), &before);
}
