//! The guest that the set-up built: where podvmm finds a kernel, initramfs and
//! root file system when it is told none.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use api::{ConfigError, TransportConfig};
use thiserror::Error;

/// A file that should be there is not.
#[derive(Debug, Error)]
#[error(
    "no {file} in {}: run resources/guest/build to make it, or give {option}",
    .folder.display()
)]
pub(crate) struct MissingPart {
    file: &'static str,
    folder: PathBuf,
    option: &'static str,
}

/// What the folder says of its kernel cannot be used.
#[derive(Debug, Error)]
#[error("{}", .path.display())]
pub(crate) struct TransportError {
    path: PathBuf,
    source: ConfigError,
}

/// A folder with the parts of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestFolder(PathBuf);

impl GuestFolder {
    /// `$PODVMM_GUEST`, or `podvmm/guest` in the user's cache folder.
    pub(super) fn of_this_user() -> Self {
        Self::from_environment(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let cache = || match (variable("PODVMM_CACHE"), variable("XDG_CACHE_HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(caches)) => Path::new(&caches).join("podvmm"),
            (None, None) => {
                let home = variable("HOME").unwrap_or_else(|| "/root".into());
                Path::new(&home).join(".cache/podvmm")
            }
        };
        Self(variable("PODVMM_GUEST").map_or_else(|| cache().join("guest"), PathBuf::from))
    }

    /// The kernel.
    pub(super) fn kernel(&self) -> Result<PathBuf, MissingPart> {
        self.part("vmlinux", "--kernel")
    }

    /// The initramfs with the agent.
    pub(super) fn initramfs(&self) -> Result<PathBuf, MissingPart> {
        self.part("initramfs.cpio", "--initramfs")
    }

    /// The demo root file system.
    pub(super) fn rootfs(&self) -> Result<PathBuf, MissingPart> {
        self.part("rootfs.erofs", "--rootfs")
    }

    /// How the kernel finds its devices, as the file `transport` says; without one it is as our own kernel does.
    pub(super) fn transport(&self) -> Result<TransportConfig, TransportError> {
        let path = self.0.join("transport");
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(TransportConfig::Mmio),
            // What cannot be read as text names no transport.
            text => text
                .unwrap_or_default()
                .trim_end()
                .parse()
                .map_err(|source| TransportError { path, source }),
        }
    }

    fn part(&self, file: &'static str, option: &'static str) -> Result<PathBuf, MissingPart> {
        let path = self.0.join(file);
        if path.exists() {
            Ok(path)
        } else {
            Err(MissingPart {
                file,
                folder: self.0.clone(),
                option,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(variables: &[(&str, &str)]) -> PathBuf {
        let lookup = |name: &str| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        };
        GuestFolder::from_environment(lookup).0
    }

    #[test]
    fn the_folder_is_the_one_named_or_the_users_cache() {
        let home = ("HOME", "/home/u");
        assert_eq!(folder(&[home]), Path::new("/home/u/.cache/podvmm/guest"));
        assert_eq!(
            folder(&[home, ("XDG_CACHE_HOME", "/c")]),
            Path::new("/c/podvmm/guest")
        );
        assert_eq!(
            folder(&[home, ("PODVMM_CACHE", "/p")]),
            Path::new("/p/guest")
        );
        assert_eq!(folder(&[home, ("PODVMM_GUEST", "/g")]), Path::new("/g"));
    }

    #[test]
    fn the_folder_says_how_its_kernel_finds_devices() {
        let folder = tempfile::tempdir().unwrap();
        let guest = GuestFolder(folder.path().into());
        assert_eq!(guest.transport().unwrap(), TransportConfig::Mmio);
        fs::write(folder.path().join("transport"), "pci\n").unwrap();
        assert_eq!(guest.transport().unwrap(), TransportConfig::Pci);
        fs::write(folder.path().join("transport"), "isa\n").unwrap();
        let error = guest.transport().unwrap_err();
        assert!(error.to_string().ends_with("/transport"), "{error}");
        assert_eq!(error.source.to_string(), "'isa' is none of mmio, pci");
    }

    #[test]
    fn a_missing_part_says_what_to_do() {
        let error = GuestFolder("/nonexistent".into()).kernel().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no vmlinux in /nonexistent: run resources/guest/build to make it, or give --kernel"
        );
    }
}
