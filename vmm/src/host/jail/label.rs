//! The label that a security module of the host's kernel goes by: a profile of AppArmor's, a context of
//! SELinux's. As the shim gives them they are the pod's.
//!
//! podvmm takes its label on itself, once it has mounted its files: labels of containers let no process mount.
//! For SELinux this is a dynamic transition, which a host's policy has to allow for the shim's domain.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// The thread's own attributes (proc(5)). Threads that it starts later have them, too.
pub(super) const ATTRIBUTES: &str = "/proc/thread-self/attr";

/// A label to take on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Label {
    /// A profile's name.
    AppArmor(String),
    /// A context.
    Selinux(String),
}

impl Label {
    /// The value of the option `--jail-label`.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (module, label) = value.split_once('=')?;
        // Both are one word for the kernel, or a line.
        let is_plain = |label: &str| !label.is_empty() && !label.contains(['\0', '\n']);
        let label = Some(label).filter(|label| is_plain(label))?.to_owned();
        match module {
            "apparmor" => Some(Self::AppArmor(label)),
            "selinux" => Some(Self::Selinux(label)),
            _ => None,
        }
    }

    /// Has the kernel give this thread the label, by the files in `attributes`.
    pub(super) fn take_on(&self, attributes: &Path) -> io::Result<()> {
        let (file, text) = match self {
            // Since Linux 5.8; before, the module that came first had the only file.
            Self::AppArmor(profile) => ("apparmor/current", format!("changeprofile {profile}")),
            Self::Selinux(context) => ("current", context.clone()),
        };
        let mut file = OpenOptions::new().write(true).open(attributes.join(file))?;
        // The kernel takes it in one piece.
        let written = file.write(text.as_bytes())?;
        match written == text.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_label_is_of_one_module() {
        assert_eq!(
            Label::parse("apparmor=pods//&x"),
            Some(Label::AppArmor("pods//&x".into()))
        );
        let context = "system_u:system_r:container_kvm_t:s0:c1,c2";
        assert_eq!(
            Label::parse(&format!("selinux={context}")),
            Some(Label::Selinux(context.into()))
        );
        for refused in [
            "",
            "apparmor",
            "apparmor=",
            "smack=x",
            "selinux=a\nb",
            "selinux=a\0",
        ] {
            assert_eq!(Label::parse(refused), None, "{refused:?}");
        }
    }

    #[test]
    fn each_module_is_told_in_its_words() {
        let attributes = tempfile::tempdir().unwrap();
        fs::create_dir(attributes.path().join("apparmor")).unwrap();
        for (label, file, text) in [
            ("apparmor=pods", "apparmor/current", "changeprofile pods"),
            ("selinux=u:r:t:s0", "current", "u:r:t:s0"),
        ] {
            let label = Label::parse(label).unwrap();
            // A kernel without the module has no file.
            let refused = label.take_on(attributes.path()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::NotFound);
            let file = attributes.path().join(file);
            fs::write(&file, "").unwrap();
            label.take_on(attributes.path()).unwrap();
            assert_eq!(fs::read_to_string(file).unwrap(), text);
        }
    }
}
