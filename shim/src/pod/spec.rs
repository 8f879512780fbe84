//! From containerd's description of a container to the one the guest's agent is given: what cannot
//! be in a VM of its own is refused, what is the host's business is taken out.

pub(crate) mod hooks;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::agent::oci::{LinuxDevice, LinuxNamespace, LinuxResources, Process, Spec};
use protocol::contract::SHARED;
use serde::de::DeserializeOwned;
use serde_json::Value;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Why a container cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{what} makes no sense")]
    Parse {
        what: String,
        source: serde_json::Error,
    },
    #[error("{what} is not possible: {why}")]
    Impossible { what: String, why: &'static str },
    #[error("{0} is missing")]
    Missing(&'static str),
}

/// What containerd says with this JSON.
pub(crate) fn parse<T: DeserializeOwned>(json: &[u8], what: &str) -> Result<T, Error> {
    let wrong = |source| Error::Parse {
        what: what.into(),
        source,
    };
    let mut value: Value = serde_json::from_slice(json).map_err(wrong)?;
    drop_nulls(&mut value);
    T::deserialize(value).map_err(wrong)
}

/// Go writes what it has not as null, where it might as well leave it out.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(values) => values.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The description of the container in `bundle`.
pub(crate) fn read(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let json = fs::read(&path).map_err(|source| Error::Read {
        path: path.clone(),
        source,
    })?;
    parse(&json, &path.display().to_string())
}

/// The pod that the container `id` belongs to: its sandbox, or itself.
pub(crate) fn pod_of<'a>(id: &'a str, annotations: &'a BTreeMap<String, String>) -> &'a str {
    match annotations.get(CONTAINER_TYPE).map(String::as_str) {
        Some("container") => annotations.get(SANDBOX_ID).map_or(id, String::as_str),
        _ => id,
    }
}

/// Whether it is the sandbox of a pod of Kubernetes, rather than a container alone.
pub(crate) fn is_sandbox(spec: &Spec) -> bool {
    spec.annotations
        .get(CONTAINER_TYPE)
        .is_some_and(|kind| kind == "sandbox")
}

/// Refuses what a container in a VM of its pod's cannot have.
pub(crate) fn check(spec: &Spec, is_pod: bool) -> Result<(), Error> {
    let impossible = |what: &str, why| {
        Err(Error::Impossible {
            what: what.into(),
            why,
        })
    };
    spec.hooks.iter().try_for_each(hooks::check)?;
    let linux = spec.linux.as_ref().ok_or(Error::Missing("linux"))?;
    spec.process.as_ref().ok_or(Error::Missing("process"))?;
    let has = |kind: &str| {
        let mut namespaces = linux.namespaces.iter();
        namespaces.any(|namespace| namespace.r#type == kind)
    };
    if is_pod && !has("network") {
        return impossible("hostNetwork", "the pod has a VM, whose network is its own");
    }
    if !has("pid") {
        return impossible("hostPID", "the pod has a VM, whose processes are its own");
    }
    if !has("ipc") {
        return impossible("hostIPC", "the pod has a VM, whose IPC is its own");
    }
    if has("user") {
        return impossible("a user namespace", "the guest's agent makes none");
    }
    let is_privileged = linux.resources.as_ref().is_some_and(allows_all_devices);
    for device in &linux.devices {
        check_device(device, is_privileged)?;
    }
    let mut pages = linux.resources.iter().flat_map(|it| &it.hugepage_limits);
    // Of sizes that are not asked for there are limits of 0.
    if let Some(pages) = pages.find(|pages| pages.limit > 0) {
        return Err(Error::Impossible {
            what: format!("memory in huge pages of {}", pages.pagesize),
            why: "the pod has a VM, which has none of the host's huge pages",
        });
    }
    for mount in &spec.mounts {
        if mount
            .options
            .iter()
            .any(|option| option == "rshared" || option == "shared")
        {
            return Err(Error::Impossible {
                what: format!("Bidirectional mount propagation of {}", mount.destination),
                why: "what is mounted in the guest stays there",
            });
        }
    }
    Ok(())
}

/// Whether a character device of these numbers is in the guest what it is on the host: memory and
/// terminals, FUSE, tun (Linux, Documentation/admin-guide/devices.txt), or any device.
fn is_in_guest(major: i64, minor: i64) -> bool {
    matches!((major, minor), (-1 | 1 | 5 | 136, _) | (10, 229 | 200))
}

/// Whether a container may use any device, as privileged ones may.
fn allows_all_devices(resources: &LinuxResources) -> bool {
    let mut rules = resources.devices.iter();
    rules.any(|rule| rule.allow && matches!(rule.r#type.as_str(), "" | "a"))
}

/// Lets through the devices that the guest has as well.
fn check_device(device: &LinuxDevice, is_privileged: bool) -> Result<(), Error> {
    if device.r#type == "c" && is_in_guest(device.major, device.minor) {
        return Ok(());
    }
    let why = match (is_privileged, device.r#type.as_str()) {
        (true, _) => {
            "the pod has a VM, which has none of the host's devices; for privileged containers \
             set privileged_without_host_devices in containerd's configuration"
        }
        (false, "b") => {
            "the pod has a VM, which has none of the host's disks; use the volume with \
             volumeMode: Filesystem"
        }
        (false, _) => "the pod has a VM, which has none of the host's devices",
    };
    Err(Error::Impossible {
        what: format!("device {}", device.path),
        why,
    })
}

/// The host's CPUs that a container may use, as a list; empty for all.
pub(crate) fn cpus(resources: &LinuxResources) -> String {
    resources
        .cpu
        .as_ref()
        .map_or_else(String::new, |cpu| cpu.cpus.trim().into())
}

/// An error if it is no list of CPUs.
pub(crate) fn check_cpus(text: &str) -> Result<(), Error> {
    match crate::host::cpus::list(text) {
        Some(_) => Ok(()),
        None => Err(Error::Impossible {
            what: format!("the set of CPUs {text:?}"),
            why: "it is no list of numbers and ranges",
        }),
    }
}

/// The path of the pid namespace that the container is to enter: its pod's, or another container's.
pub(crate) fn pid_namespace(spec: &Spec) -> Option<&str> {
    let mut namespaces = spec.linux.iter().flat_map(|linux| &linux.namespaces);
    let pid = namespaces.find(|namespace| namespace.r#type == "pid")?;
    (!pid.path.is_empty()).then_some(&pid.path)
}

/// The process whose pid namespace is at such a path.
pub(crate) fn process_of(path: &str) -> Option<u32> {
    let pid = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
    pid.parse().ok()
}

/// Has the guest's container enter the pid namespace of another one.
pub(crate) fn see_processes_of(spec: &mut Spec, container: &str) {
    if let Some(linux) = &mut spec.linux {
        linux.namespaces.push(LinuxNamespace {
            r#type: "pid".into(),
            path: container.into(),
        });
    }
}

/// The path of the network namespace that containerd or its client made for the pod.
pub(crate) fn network_namespace(spec: &Spec) -> Option<&Path> {
    let mut namespaces = spec.linux.iter().flat_map(|linux| &linux.namespaces);
    let network = namespaces.find(|namespace| namespace.r#type == "network")?;
    (!network.path.is_empty()).then(|| Path::new(&network.path))
}

/// Makes it what the guest's agent is to know of it. Mounts are another matter.
pub(crate) fn for_guest(spec: &mut Spec, id: &str, seccomp: bool, unified: bool) {
    // They are the shim's to run.
    spec.hooks = None;
    if let Some(root) = &mut spec.root {
        root.path = format!("{SHARED}/{id}/rootfs");
    }
    if let Some(process) = &mut spec.process {
        process_for_guest(process);
    }
    let sees_all = unified
        && spec.mounts.iter().any(|mount| {
            let is_readonly = mount.options.iter().any(|option| option == "ro");
            matches!(mount.r#type.as_str(), "cgroup" | "cgroup2") && !is_readonly
        });
    let Some(linux) = &mut spec.linux else { return };
    linux.mount_label.clear();
    linux.intel_rdt = None;
    if !seccomp && linux.seccomp.take().is_some() {
        log::warn!("{id}: the guest's agent knows no seccomp, so its profile is left out");
    }
    let elsewhere = |kind: &str| matches!(kind, "network" | "time" | "pid");
    let namespaces = &mut linux.namespaces;
    namespaces.retain(|namespace| !elsewhere(&namespace.r#type));
    namespaces
        .iter_mut()
        .for_each(|namespace| namespace.path.clear());
    // By runc, a container without a cgroup namespace sees the host's cgroups. A privileged one, which may
    // write to them, sees the guest's in the same way. Others see their own, which is where they look for
    // their limits. Hosts with cgroups of version 1 say nothing of the namespace; the guest has version 2.
    let is_named = namespaces
        .iter()
        .any(|namespace| namespace.r#type == "cgroup");
    if !is_named && !sees_all {
        namespaces.push(LinuxNamespace {
            r#type: "cgroup".into(),
            path: String::new(),
        });
    }
    if let Some(resources) = &mut linux.resources {
        let cpu = resources.cpu.as_ref();
        if let Some(cpu) = cpu.filter(|cpu| !cpu.mems.is_empty()) {
            log::warn!(
                "{id}: its memory may be of any NUMA node, not of {} alone",
                cpu.mems
            );
        }
        resources_for_guest(resources);
    }
}

/// The host's security modules are not the guest's.
pub(crate) fn process_for_guest(process: &mut Process) {
    process.apparmor_profile.clear();
    process.selinux_label.clear();
}

/// What is said of the host's devices, processors and packets is not for the guest, by whatever name.
pub(crate) fn resources_for_guest(resources: &mut LinuxResources) {
    // What is allowed by the numbers of a device of the host's may be another device in the guest.
    resources
        .devices
        .retain(|rule| !rule.allow || is_in_guest(rule.major, rule.minor));
    resources.network = None;
    resources.block_io = None;
    resources.hugepage_limits.clear();
    if let Some(cpu) = &mut resources.cpu {
        cpu.cpus.clear();
        cpu.mems.clear();
    }
    let of_the_host = |file: &str| {
        let controller = file.split('.').next().unwrap_or_default();
        matches!(controller, "cpuset" | "io" | "hugetlb" | "rdma" | "misc")
    };
    resources.unified.retain(|file, _| !of_the_host(file));
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::agent::oci::Mount;

    fn spec(more: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","process":{{"args":["sh"],"capabilities":null}},
            "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"ipc"}},{{"type":"mount"}}]{more}}}}}"#
        );
        parse(json.as_bytes(), "it").unwrap()
    }

    fn with_network(more: &str) -> Spec {
        let mut spec = spec(more);
        let network = parse(br#"{"type":"network","path":"/run/netns/x"}"#, "it").unwrap();
        spec.linux.as_mut().unwrap().namespaces.push(network);
        spec
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused_by_its_name() {
        let refused = |spec: &Spec| check(spec, true).unwrap_err().to_string();
        assert!(refused(&spec("")).starts_with("hostNetwork is not possible"));
        let mut host = with_network("");
        let namespaces = &mut host.linux.as_mut().unwrap().namespaces;
        namespaces.retain(|namespace| namespace.r#type != "pid");
        assert!(refused(&host).starts_with("hostPID is not possible"));
        let disk =
            with_network(r#","devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}]"#);
        assert!(refused(&disk).starts_with("device /dev/sda is not possible"));
        assert!(refused(&disk).ends_with("volumeMode: Filesystem"));
        let privileged = with_network(
            r#","devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]}"#,
        );
        assert!(refused(&privileged).contains("privileged_without_host_devices"));
        let pages = |limit| {
            with_network(&format!(
                r#","resources":{{"hugepageLimits":[{{"pageSize":"2MB","limit":{limit}}}]}}"#
            ))
        };
        let said = refused(&pages(4 << 20));
        assert!(
            said.starts_with("memory in huge pages of 2MB is not possible"),
            "{said}"
        );
        check(&pages(0), true).unwrap();
        let said = check_cpus("0-x").unwrap_err().to_string();
        assert!(
            said.starts_with("the set of CPUs \"0-x\" is not possible"),
            "{said}"
        );
        check(&with_network(""), true).unwrap();
        check(&spec(""), false).unwrap();
    }

    #[test]
    fn a_container_is_its_sandboxes() {
        let annotations = |kind: &str| {
            BTreeMap::from([
                (CONTAINER_TYPE.to_owned(), kind.to_owned()),
                (SANDBOX_ID.to_owned(), "pod".to_owned()),
            ])
        };
        assert_eq!(pod_of("c", &annotations("container")), "pod");
        assert_eq!(pod_of("pod", &annotations("sandbox")), "pod");
        assert_eq!(pod_of("alone", &BTreeMap::new()), "alone");
    }

    #[test]
    fn json_fills_the_fields_that_proto_names_otherwise() {
        let json = br#"{"linux":{"resources":{
            "memory":{"limit":5,"disableOOMKiller":true},"blockIO":{"weight":7},
            "hugepageLimits":[{"pageSize":"2MB","limit":3}],"pids":null},
            "uidMappings":[{"containerID":1,"hostID":2,"size":3}],
            "seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {"names":["read"],"action":"SCMP_ACT_ALLOW","errnoRet":null,
                 "args":[{"index":1,"value":2,"valueTwo":3,"op":"SCMP_CMP_EQ"}]}]}}}"#;
        let spec: Spec = parse(json, "it").unwrap();
        let linux = spec.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert!(resources.memory.unwrap().disable_oom_killer);
        assert_eq!(resources.block_io.unwrap().weight, 7);
        assert_eq!(resources.hugepage_limits[0].pagesize, "2MB");
        assert_eq!(linux.uid_mappings[0].host_id, 2);
        assert_eq!(linux.seccomp.unwrap().syscalls[0].args[0].value_two, 3);
    }

    #[test]
    fn a_pid_namespace_is_its_pods_or_anothers() {
        let with_pids = |path: &str| {
            let mut spec = with_network("");
            let namespaces = &mut spec.linux.as_mut().unwrap().namespaces;
            let mut pid = namespaces.iter_mut().filter(|it| it.r#type == "pid");
            pid.next().unwrap().path = path.into();
            spec
        };
        assert_eq!(pid_namespace(&with_pids("")), None);
        let mut spec = with_pids("/proc/4711/ns/pid");
        assert_eq!(pid_namespace(&spec).and_then(process_of), Some(4711));
        for path in ["/proc/self/ns/pid", "/proc/1/ns/net", "/run/pids", ""] {
            assert_eq!(process_of(path), None, "{path}");
        }
        for_guest(&mut spec, "c", true, false);
        assert_eq!(pid_namespace(&spec), None);
        see_processes_of(&mut spec, "target");
        assert_eq!(pid_namespace(&spec), Some("target"));
    }

    #[test]
    fn the_guest_is_told_only_what_is_its_own() {
        let mut spec = with_network(
            r#","resources":{"devices":[{"allow":false},{"allow":true,"type":"c","major":1,"minor":3},
            {"allow":true,"type":"b","major":254,"minor":0},{"allow":true,"type":"b","access":"m"}],"cpu":{"cpus":"0-3","shares":5},
            "unified":{"memory.oom.group":"1","cpuset.cpus":"0-3","io.max":"8:0 rbps=1"}}"#,
        );
        for_guest(&mut spec, "c", true, false);
        let linux = spec.linux.unwrap();
        let kinds: Vec<_> = linux
            .namespaces
            .iter()
            .map(|namespace| &*namespace.r#type)
            .collect();
        assert_eq!(kinds, ["ipc", "mount", "cgroup"]);
        let resources = linux.resources.unwrap();
        let rules = resources
            .devices
            .iter()
            .map(|rule| (rule.allow, rule.major));
        assert_eq!(
            rules.collect::<Vec<_>>(),
            [(false, -1), (true, 1), (true, -1)]
        );
        let cpu = resources.cpu.unwrap();
        assert_eq!((cpu.cpus.as_str(), cpu.shares), ("", 5));
        let unified: Vec<_> = resources.unified.keys().collect();
        assert_eq!(unified, ["memory.oom.group"]);
    }

    #[test]
    fn a_privileged_container_sees_all_cgroups_of_the_guest() {
        let sees_all = |options: &[&str], named: bool, unified: bool| {
            let mut spec = Spec::default();
            spec.mounts.push(Mount {
                r#type: "cgroup".into(),
                options: options.iter().map(|option| (*option).into()).collect(),
                ..Mount::default()
            });
            let linux = spec.linux.get_or_insert_default();
            if named {
                linux.namespaces.push(LinuxNamespace {
                    r#type: "cgroup".into(),
                    path: String::new(),
                });
            }
            for_guest(&mut spec, "c", true, unified);
            spec.linux.unwrap().namespaces.is_empty()
        };
        assert!(sees_all(&["nosuid", "rw"], false, true));
        assert!(!sees_all(&["nosuid", "ro"], false, true), "it has its own");
        assert!(!sees_all(&["rw"], true, true), "it asks for its own");
        assert!(
            !sees_all(&["rw"], false, false),
            "version 1 has none to ask for"
        );
    }
}
