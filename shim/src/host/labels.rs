//! Labels of the host's security modules, which a pod's description may name for its first container: podvmm
//! gets them, as the pod's processes would without a VM. The guest's kernel has no such modules.

use std::fs;
use std::path::Path;

use protocol::agent::oci::Spec;
use rustix::fs::{XattrFlags, setxattr};

/// Where SELinux says which contexts it has for whom (selinux_lxc_contexts_path(3)), by the name of a policy.
const SELINUX: &str = "/etc/selinux";

/// What a pod's description says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Labels {
    apparmor: String,
    selinux: String,
    /// SELinux's, for files that are the pod's alone.
    files: String,
}

impl Labels {
    /// None if none are `wanted`.
    pub(crate) fn of(spec: &Spec, wanted: bool) -> Self {
        if !wanted {
            return Self::default();
        }
        let (process, linux) = (spec.process.as_ref(), spec.linux.as_ref());
        Self {
            apparmor: process.map_or(String::new(), |it| it.apparmor_profile.clone()),
            selinux: process.map_or(String::new(), |it| it.selinux_label.clone()),
            files: linux.map_or(String::new(), |it| it.mount_label.clone()),
        }
    }

    /// Whether podvmm needs none, so that one that runs already will do.
    pub(crate) fn are_none(&self) -> bool {
        *self == Self::default()
    }

    /// The values of podvmm's `--jail-label`.
    pub(crate) fn for_podvmm(&self) -> Vec<String> {
        let mut values = Vec::new();
        if !self.apparmor.is_empty() {
            values.push(format!("apparmor={}", self.apparmor));
        }
        if !self.selinux.is_empty() {
            let context = of_a_vm(&self.selinux, contexts(SELINUX.as_ref()).as_deref());
            values.push(format!("selinux={context}"));
        }
        values
    }

    /// Gives the folder the label of the pod's files, for those that podvmm makes there.
    pub(crate) fn give(&self, folder: &Path) {
        if self.files.is_empty() {
            return;
        }
        let label = [self.files.as_bytes(), &[0]].concat();
        let given = setxattr(folder, "security.selinux", &label, XattrFlags::empty());
        if let Err(error) = given {
            log::warn!("label {}: {error}", folder.display());
        }
    }
}

/// The context for what runs a VM in place of a container's, with the container's level: containerd asks for it
/// itself for runtimes that it knows to have VMs. As it is if the host has none for VMs.
fn of_a_vm(context: &str, contexts: Option<&str>) -> String {
    let for_vms = || {
        let mut lines = contexts?.lines().filter_map(|line| line.split_once('='));
        let (_, value) = lines.find(|(name, _)| name.trim() == "kvm_process")?;
        let mut fields = value.trim().trim_matches('"').splitn(4, ':');
        let (user, role, kind) = (fields.next()?, fields.next()?, fields.next()?);
        let level = context.splitn(4, ':').nth(3)?;
        Some(format!("{user}:{role}:{kind}:{level}"))
    };
    for_vms().unwrap_or_else(|| context.into())
}

/// The text that says which contexts containers and VMs have.
fn contexts(selinux: &Path) -> Option<String> {
    let config = fs::read_to_string(selinux.join("config")).ok()?;
    let policy = config
        .lines()
        .find_map(|line| line.strip_prefix("SELINUXTYPE="))?;
    fs::read_to_string(selinux.join(policy.trim()).join("contexts/lxc_contexts")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_labels_are_those_of_its_first_container() {
        let spec = |text: &str| serde_json::from_str::<Spec>(text).unwrap();
        let plain = spec(r#"{"process":{"args":["x"]},"linux":{}}"#);
        assert!(Labels::of(&plain, true).are_none());
        let labelled = spec(
            r#"{"process":{"apparmorProfile":"pods","selinuxLabel":"u:r:t:s0:c1,c2"},
                "linux":{"mountLabel":"u:object_r:f:s0:c1,c2"}}"#,
        );
        assert!(Labels::of(&labelled, false).are_none());
        let labels = Labels::of(&labelled, true);
        assert!(!labels.are_none());
        let values = labels.for_podvmm();
        assert_eq!(values[0], "apparmor=pods");
        assert!(values[1].starts_with("selinux=") && values[1].ends_with(":s0:c1,c2"));
    }

    #[test]
    fn a_vm_has_its_own_context_at_the_containers_level() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("targeted/contexts")).unwrap();
        assert_eq!(contexts(folder.path()), None);
        fs::write(
            folder.path().join("config"),
            "# x\nSELINUX=enforcing\nSELINUXTYPE=targeted\n",
        )
        .unwrap();
        let text = "process = \"system_u:system_r:container_t:s0\"\n\
                    kvm_process = \"system_u:system_r:container_kvm_t:s0\"\n";
        fs::write(folder.path().join("targeted/contexts/lxc_contexts"), text).unwrap();
        let contexts = contexts(folder.path());
        let context = "system_u:system_r:container_t:s0:c1,c2";
        assert_eq!(
            of_a_vm(context, contexts.as_deref()),
            "system_u:system_r:container_kvm_t:s0:c1,c2"
        );
        assert_eq!(of_a_vm(context, None), context);
        assert_eq!(of_a_vm("odd", contexts.as_deref()), "odd");
    }
}
