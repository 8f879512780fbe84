//! Where a pod's things are on the host: one folder below `/run/podvmm`, named so that the shim, a
//! later shim started to clean up, and a person all find it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub(crate) const ROOT: &str = "/run/podvmm";

/// A pod's folder.
#[derive(Clone, Debug)]
pub(crate) struct Place(PathBuf);

impl Place {
    /// The folder of the pod `id`. Several containerds on one host may know pods of the same name.
    pub(crate) fn new(containerd: &str, namespace: &str, id: &str) -> Self {
        let owner = fnv1a(format!("{containerd}\0{namespace}").as_bytes());
        Self(Path::new(ROOT).join(format!("{owner:08x}")).join(id))
    }

    pub(crate) fn at(path: &Path) -> Self {
        Self(path.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Where the shim answers containerd.
    pub(crate) fn shim(&self) -> PathBuf {
        self.0.join("shim.sock")
    }

    /// Where podvmm makes its sockets. What else the folder has it neither needs nor sees.
    pub(crate) fn vm(&self) -> PathBuf {
        self.0.join("vm")
    }

    /// Where podvmm answers the shim.
    pub(crate) fn api(&self) -> PathBuf {
        self.vm().join("api")
    }

    /// The host's end of the guest's vsock.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.vm().join("vsock")
    }

    /// What the guest sees of the host.
    pub(crate) fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }

    /// What would outlive the shim.
    pub(crate) fn record(&self) -> PathBuf {
        self.0.join("record.json")
    }
}

/// Makes a folder that is root's alone, and those above it, unless they are there.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(folder)
}

/// FNV-1a, folded: short, and the same in every version of the shim.
pub(crate) fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_one_name_in_two_containerds_are_two() {
        let place = |containerd, namespace| Place::new(containerd, namespace, "pod").shim();
        assert_ne!(place("/a.sock", "default"), place("/b.sock", "default"));
        assert_ne!(place("/a.sock", "default"), place("/a.sock", "k8s.io"));
        assert_eq!(place("/a.sock", "default"), place("/a.sock", "default"));
    }

    #[test]
    fn sockets_of_the_longest_names_have_room() {
        // containerd's names are at most 76 bytes long, a socket's path 107.
        let place = Place::new("/run/containerd/containerd.sock", "k8s.io", &"a".repeat(76));
        for path in [place.shim(), place.api(), place.vsock()] {
            assert!(path.as_os_str().len() <= 107, "{}", path.display());
        }
    }
}
