//! A root file system from a folder: a read-only image of it, which the guest
//! overlays with memory.
//!
//! The image is a nameless file in the temporary folder: it needs no cleaning
//! up, however podvmm ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

/// Why there is no image.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// The path is wrong.
    #[error("root file system {}", .path.display())]
    Open {
        /// Folder or image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No room, or no temporary folder.
    #[error("create a temporary file in {}", .folder.display())]
    Temporary {
        /// The temporary folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tool is missing.
    #[error(
        "--rootfs {}: a folder is made into an image by mkfs.erofs; \
         install erofs-utils, or give an image",
        .path.display()
    )]
    NoTool {
        /// The folder.
        path: PathBuf,
        /// Why it could not be started.
        source: io::Error,
    },
    /// The tool failed.
    #[error("make an image of {}: mkfs.erofs said: {said}", .path.display())]
    Tool {
        /// The folder.
        path: PathBuf,
        /// Its last line.
        said: String,
    },
}

/// A root file system that can be a disk.
#[derive(Debug)]
pub(crate) struct Rootfs {
    /// The image.
    path: PathBuf,
    /// Keeps a nameless image alive until the disk has been opened.
    _image: Option<File>,
}

impl Rootfs {
    /// `path` itself if it is an image, an image of it if it is a folder.
    pub(crate) fn of(path: PathBuf) -> Result<Self, RootfsError> {
        let metadata = std::fs::metadata(&path).map_err(|source| RootfsError::Open {
            path: path.clone(),
            source,
        })?;
        if metadata.is_dir() {
            Self::image_of(&path)
        } else {
            Ok(Self { path, _image: None })
        }
    }

    /// The image's path, valid while `self` lives.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn image_of(folder: &Path) -> Result<Self, RootfsError> {
        let image = temporary_file()?;
        let path = PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            image.as_raw_fd()
        ));
        let output = Command::new("mkfs.erofs")
            .args(["--preserve-mtime", "-x1", "--quiet"])
            .arg(&path)
            .arg(folder)
            .output()
            .map_err(|source| RootfsError::NoTool {
                path: folder.into(),
                source,
            })?;
        if output.status.success() {
            return Ok(Self {
                path,
                _image: Some(image),
            });
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        Err(RootfsError::Tool {
            path: folder.into(),
            said: last.unwrap_or("nothing").trim().into(),
        })
    }
}

fn temporary_file() -> Result<File, RootfsError> {
    let folder = std::env::temp_dir();
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(&folder)
        .map_err(|source| RootfsError::Temporary { folder, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_root_file_system_is_named() {
        let error = Rootfs::of("/nonexistent/root".into()).unwrap_err();
        assert_eq!(error.to_string(), "root file system /nonexistent/root");
    }

    #[test]
    fn an_image_is_taken_as_it_is() {
        let file = Path::new("/proc/self/exe");
        assert_eq!(Rootfs::of(file.into()).unwrap().path(), file);
    }
}
