use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::error::tests::printed;

/// What the user reads when a command line's `text` is refused as a `T`.
pub(super) fn refusal<T: Part + std::fmt::Debug>(text: &str) -> String {
    printed(&T::from_options(text).unwrap_err())
}

fn vm(json: &Value) -> VmConfig {
    VmConfig::parse(json.to_string().as_bytes()).unwrap()
}

/// What a client reads when `json` is refused as a VM.
fn answer(json: &Value) -> String {
    printed(&VmConfig::parse(json.to_string().as_bytes()).unwrap_err())
}

#[test]
fn a_kernel_is_enough() {
    let config = vm(&json!({"payload": {"kernel": "/k"}}));
    let json = config.json();
    assert_eq!(config.cpus.boot().get(), 1);
    assert_eq!(config.memory.size.bytes(), 512 << 20);
    assert_eq!((config.serial, config.console), (Output::Null, Output::Off));
    assert_eq!(json["serial"]["mode"], "Null");
    assert_eq!(json["memory"]["size"], 512 << 20);
    assert_eq!(json["cpus"]["max_phys_bits"], 46);
    assert_eq!(json["rng"]["src"], "/dev/urandom");
}

#[test]
fn nulls_and_unknown_fields_mean_nothing() {
    let config = vm(&json!({
        "payload": {"kernel": "/k", "initramfs": null, "cmdline": null, "mrconfigid": null},
        "cpus": null, "memory": {"size": null, "zones": null}, "disks": null, "devices": [],
        "iommu": false, "rng": {"src": "/dev/urandom", "iommu": false}, "flavour": {"sweet": true},
    }));
    assert!(config.disks.is_empty());
    // Clients read back what they wrote.
    assert_eq!(config.json()["flavour"]["sweet"], true);
}

#[test]
fn what_kata_sends_is_understood() {
    let config = vm(&json!({
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
    }));
    assert_eq!((config.cpus.boot().get(), config.cpus.max().get()), (1, 4));
    assert!(config.memory.shared);
    assert_eq!(config.disks[0].image_type, ImageType::Unknown);
    let again = VmConfig::parse(config.json().to_string().as_bytes()).unwrap();
    assert_eq!(again.json(), config.json());
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
            let config = vm(&json!({
                "payload": {"kernel": "/k"},
                "memory": {"size": size_mib << 20, "hotplug_method": "Acpi", "hotplug_size": asked},
            }));
            let possible = config.memory.hotplug_size.0;
            prop_assert_eq!(possible % (128 << 20), 0);
            let most = (1 << 40) - (size_mib << 20);
            prop_assert!(possible <= asked && possible + (128 << 20) > asked.min(most));
            prop_assert_eq!(&config.json()["memory"]["hotplug_size"], possible);
        }
    }
}

#[test]
fn memory_plugged_at_start_is_part_of_what_can_be_plugged() {
    let memory = |plugged_mib: u64| {
        let memory = json!({"hotplug_size": 200 << 20, "hotplugged_size": plugged_mib << 20});
        json!({"payload": {"kernel": "/k"}, "memory": memory})
    };
    let plugged = |mib| vm(&memory(mib)).memory.hotplugged_size.0;
    assert_eq!([plugged(64), plugged(200)], [64 << 20, 128 << 20]);
    assert_eq!(
        answer(&memory(256)),
        "memory: hotplugged_size=256M is more than hotplug_size=128M"
    );
}

#[test]
fn what_cannot_be_honoured_is_named() {
    let with = |key: &str, value: Value| {
        let mut vm = json!({"payload": {"kernel": "/k"}});
        vm[key] = value;
        answer(&vm)
    };
    assert_eq!(
        with("devices", json!([{"path": "/sys/x"}])),
        "devices: there is no VFIO"
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
        "serial: missing field `file`"
    );
    assert_eq!(
        with("console", json!({"mode": "Socket"})),
        "console: missing field `socket`"
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
        let cores = "cpus: topology.cores_per_die";
        let at = format!("cpus.topology.{key}").replace("cpus.topology.cores_per_die", cores);
        assert_eq!(refused, format!("{at}: {shape}"));
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
        "landlock_rules: Landlock is part of podvmm's jail, see --jail"
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
    assert_eq!(answer(&json!({})), "payload: 'kernel' is missing");
    assert_eq!(
        answer(&json!({"payload": {}})),
        "payload: 'kernel' is missing"
    );
    assert!(answer(&json!([1])).contains("invalid"));
    let error = printed(&VmConfig::parse(b"{} x").unwrap_err());
    assert!(error.contains("trailing characters"), "{error}");
}

#[test]
fn devices_are_removed_by_their_names() {
    let body = r#"{"payload":{"kernel":"/k"},"vsock":{"cid":3,"socket":"/s"},
        "disks":[{"path":"/a"},{"path":"/b","id":"_disk7"},{"path":"/c"}],
        "fs":[{"tag":"t","shared_dir":"/d"}]}"#;
    let mut vm = VmConfig::parse(body.as_bytes()).unwrap();
    vm.name_devices();
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
    assert_eq!(vm.disks.len(), 1);
    assert_eq!(vm.json()["disks"][0]["path"], "/a");
    assert!(vm.vsock.is_none() && vm.fs.is_empty());
}

#[test]
fn what_is_written_of_a_vm_is_the_same_vm() {
    fn part<T: Part>(text: &str) -> T {
        T::from_options(text).unwrap()
    }
    let config = VmConfig {
        payload: PayloadConfig {
            kernel: "/k".into(),
            initramfs: Some("/i".into()),
            cmdline: "quiet".into(),
            agent_policy: Some("a line\n".into()),
            ..PayloadConfig::default()
        },
        cpus: part("boot=2,max=4"),
        memory: part("size=1G,hotplug_size=1G,hotplugged_size=128M,thp=off,shared=on"),
        balloon: Some(part("size=64M,deflate_on_oom=on")),
        disks: vec![part("path=/d,readonly=on,id=x,bw_size=5,bw_refill_time=7")],
        net: vec![part("tap=t,mac=02:00:00:00:00:01,mtu=1400,offload_tso=off")],
        fs: vec![
            part("tag=a,shared_dir=/a,readonly=on,cache=always"),
            part("tag=b,socket=/s"),
        ],
        vsock: Some(part("cid=5,socket=/v")),
        serial: Output::File {
            file: "/log".into(),
        },
        console: Output::Socket {
            socket: "/c".into(),
        },
        ..VmConfig::default()
    };
    let read = vm(&config.json());
    assert_eq!(read.json(), config.json());
    assert_eq!((read.disks, read.fs), (config.disks, config.fs));
    assert_eq!((read.serial, read.console), (config.serial, config.console));
}

#[test]
fn what_a_program_fills_in_is_held_to_the_same_ranges() {
    let mut vm = VmConfig::default();
    let why = |vm: &VmConfig| printed(&vm.check().unwrap_err());
    assert_eq!(why(&vm), "'kernel' is missing");
    vm.payload.kernel = "/k".into();
    vm.payload.agent_policy = Some(String::new());
    assert_eq!(why(&vm), "'initramfs' is missing");
    vm.payload.agent_policy = None;
    vm.check().unwrap();
    vm.disks.push(DiskConfig::default());
    assert_eq!(why(&vm), "'path' is missing");
    vm.disks[0].path = "/d".into();
    vm.disks[0].num_queues = 17;
    assert_eq!(why(&vm), "queues=17: 1 to 16 are possible");
}

#[test]
fn a_path_that_json_cannot_say_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let mut vm = vm(&json!({"payload": {"kernel": "/k"}}));
    vm.payload.kernel = std::ffi::OsString::from_vec(vec![b'/', 0xff]).into();
    let why = printed(&vm.check().unwrap_err());
    assert_eq!(
        why,
        "write it as JSON: path contains invalid UTF-8 characters"
    );
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
    let read = VmConfig::restored(body.as_bytes(), &patch, fds().collect()).unwrap();
    assert_eq!(read.vsock.unwrap().socket.to_str(), Some("/new"));
    assert!(read.balloon.is_none());
    assert_eq!(read.net[0].pairs(), 2);
    let error = VmConfig::restored(body.as_bytes(), &patch, Vec::new()).unwrap_err();
    let causes = printed(&error);
    assert!(causes.contains("give either tap=NAME or fd=N"), "{causes}");
}

#[test]
fn new_sizes_are_what_is_said_and_what_is_booted() {
    let mut it = vm(&json!({
        "payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 1, "max_vcpus": 4},
        "memory": {"size": 1 << 29, "hotplug_size": 1 << 30}, "balloon": {"size": 1 << 20},
    }));
    it.resize(Resize {
        desired_vcpus: Some(CpuCount::try_from(3).unwrap()),
        desired_ram: Some(ByteSize((1 << 29) + (1 << 28))),
        desired_balloon: Some(ByteSize(1 << 22)),
    })
    .unwrap();
    for config in [&it, &vm(&it.json())] {
        assert_eq!((config.cpus.boot().get(), config.cpus.max().get()), (3, 4));
        assert_eq!(config.memory.hotplugged_size.0, 1 << 28);
        assert_eq!(config.balloon.as_ref().unwrap().size.0, 1 << 22);
    }
}

#[test]
fn a_size_that_cannot_be_changes_nothing() {
    let mut vm = vm(&json!({"payload": {"kernel": "/k"}}));
    let before = vm.json();
    let sizes = [
        (
            CpuCount::try_from(2).ok(),
            None,
            "max=1 is less than boot=2",
        ),
        (
            None,
            Some(ByteSize(1 << 30)),
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
    // Not even the size of a device that there is none of.
    vm.resize(Resize {
        desired_balloon: Some(ByteSize(0)),
        ..Resize::default()
    })
    .unwrap();
    assert_eq!(vm.json(), before);
}
