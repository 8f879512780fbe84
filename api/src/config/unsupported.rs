//! Fields of Cloud Hypervisor's that podvmm knows and cannot honour.

use serde_json::Value;

use super::JsonError;

/// Paths of fields, `*` being each element of an array, and why podvmm does not have them. Null,
/// false, 0 and what is empty ask for nothing and are let through.
const FIELDS: &[(&str, &str)] = &[
    ("payload.firmware", "podvmm boots kernels"),
    ("payload.igvm", "there are no confidential VMs"),
    ("payload.mrconfigid", "there are no confidential VMs"),
    ("payload.host_data", "there are no confidential VMs"),
    (
        "cpus.affinity",
        "pin the threads vcpu0, vcpu1, ... from outside",
    ),
    ("cpus.kvm_hyperv", "guests are Linux"),
    ("cpus.features.amx", "AMX is not enabled for guests"),
    ("memory.zones", "RAM is one zone"),
    (
        "memory.mergeable",
        "pages are not offered to KSM: it leaks between pods",
    ),
    ("memory.prefault", "RAM is given when it is touched"),
    ("memory.hugepage_size", "huge pages are of 2 MiB"),
    ("disks.*.vhost_user", "disks are files"),
    ("disks.*.iommu", "there is no virtual IOMMU"),
    ("disks.*.backing_files", "images are raw"),
    ("net.*.iommu", "there is no virtual IOMMU"),
    ("net.*.vhost_socket", "networks are taps"),
    ("net.*.vhost_user", "networks are taps"),
    ("fs.*.iommu", "there is no virtual IOMMU"),
    ("vsock.iommu", "there is no virtual IOMMU"),
    ("rng.iommu", "there is no virtual IOMMU"),
    ("console.iommu", "there is no virtual IOMMU"),
    ("serial.iommu", "there is no virtual IOMMU"),
    ("iommu", "there is no virtual IOMMU"),
    ("platform.iommu_segments", "there is no virtual IOMMU"),
    ("platform.tdx", "there are no confidential VMs"),
    ("platform.sev_snp", "there are no confidential VMs"),
    ("devices", "there is no VFIO"),
    ("user_devices", "there is no vfio-user"),
    ("pmem", "use a disk"),
    ("vdpa", "there is no vDPA"),
    ("numa", "guests have one node"),
    ("sgx_epc", "there is no SGX"),
    ("tpm", "there is no TPM"),
    ("ivshmem", "RAM is not shared with other VMs"),
    ("watchdog", "there is no watchdog"),
    ("pvpanic", "a panic is seen on the console"),
    ("landlock_enable", LANDLOCK),
    ("landlock_rules", LANDLOCK),
    ("rate_limit_groups", "each disk has a limit of its own"),
    (
        "disks.*.rate_limit_group",
        "each disk has a limit of its own",
    ),
];

/// Fields like [`FIELDS`], but for one value more that asks for what is so anyway.
const CHOICES: &[(&str, &str, &str)] = &[
    (
        "cpus.core_scheduling",
        "Off",
        "give podvmm a core scheduling cookie before it starts: its threads inherit it",
    ),
    ("cpus.topology.threads_per_core", "1", ONE_PACKAGE),
    ("cpus.topology.dies_per_package", "1", ONE_PACKAGE),
    ("cpus.topology.packages", "1", ONE_PACKAGE),
];

const LANDLOCK: &str = "Landlock is part of podvmm's jail, see --jail";

pub(super) const ONE_PACKAGE: &str =
    "guests have one package with one die, max_vcpus cores and one thread each";

/// Refuses the first field of `vm` that asks for something podvmm has not.
pub(super) fn refuse(vm: &Value) -> Result<(), JsonError> {
    let fields = FIELDS.iter().map(|(path, why)| (path, None, why));
    let choices = CHOICES
        .iter()
        .map(|(path, usual, why)| (path, Some(*usual), why));
    for (path, usual, why) in fields.chain(choices) {
        if asks(vm, path, usual) {
            return Err(JsonError::Unsupported {
                path: (*path).into(),
                why,
            });
        }
    }
    Ok(())
}

fn asks(value: &Value, path: &str, usual: Option<&str>) -> bool {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    match (first, value) {
        ("", Value::Number(number)) if Some(number.to_string().as_str()) == usual => false,
        ("", Value::String(text)) if Some(text.as_str()) == usual => false,
        ("", Value::Null | Value::Bool(false)) => false,
        ("", Value::Bool(true)) => true,
        ("", Value::Number(number)) => number.as_f64() != Some(0.0),
        ("", Value::String(text)) => !text.is_empty(),
        ("", Value::Array(items)) => !items.is_empty(),
        ("", Value::Object(fields)) => !fields.is_empty(),
        ("*", Value::Array(items)) => items.iter().any(|item| asks(item, rest, usual)),
        (key, Value::Object(fields)) => fields
            .get(key)
            .is_some_and(|field| asks(field, rest, usual)),
        _ => false,
    }
}
