//! The guest that the set-up built: where podvmm finds a kernel, initramfs and
//! root file system when it is told none.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

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
    fn a_missing_part_says_what_to_do() {
        let error = GuestFolder("/nonexistent".into()).kernel().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no vmlinux in /nonexistent: run resources/guest/build to make it, or give --kernel"
        );
    }
}
