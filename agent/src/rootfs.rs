//! The root file system: waits for its device, tells what is on it, mounts it.

use std::ffi::{CStr, CString, NulError};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use crate::cmdline::Root;
use crate::mounts;
use crate::poll;
use crate::sys::{self, MS_RDONLY};

/// How long a device may take to appear. Those that are there at boot are found at once.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);

const NEW_ROOT: &CStr = c"/newroot";
const LOWER: &CStr = c"/lower";
const UPPER: &CStr = c"/upper";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("mount root file system {device}: no such device")]
    NoDevice { device: String },
    #[error("mount root file system {device}: no supported file system found")]
    NotRecognised { device: String },
    #[error("mount root file system {device}: the kernel knows no file system {fstype}")]
    UnknownType { device: String, fstype: String },
    #[error("mount root file system {device}")]
    Mount { device: String, source: io::Error },
    #[error("read the superblock of {device}")]
    Superblock { device: String, source: io::Error },
    #[error("lay a writable file system over {device}")]
    Overlay { device: String, source: io::Error },
    #[error("use {text:?} of the kernel command line")]
    Argument { text: String, source: NulError },
    #[error(transparent)]
    Enter(#[from] mounts::Error),
}

/// Whether what it is on is there already, as far as that can be seen.
pub(crate) fn is_there(root: &Root) -> bool {
    !root.source.starts_with("/dev/") || Path::new(&root.source).exists()
}

/// Mounts the root file system and makes it the root.
pub(crate) fn enter(root: &Root) -> Result<(), Error> {
    let target = if root.overlay { LOWER } else { NEW_ROOT };
    mount(root, target)?;
    if root.overlay {
        mount_overlay().map_err(|source| Error::Overlay {
            device: root.source.clone(),
            source,
        })?;
    }
    Ok(mounts::enter_root(NEW_ROOT)?)
}

/// Makes an empty file system in memory the root.
pub(crate) fn enter_empty() -> Result<(), Error> {
    sys::mount(c"tmpfs", NEW_ROOT, c"tmpfs", 0, c"mode=0755").map_err(|source| Error::Mount {
        device: "tmpfs".to_owned(),
        source,
    })?;
    Ok(mounts::enter_root(NEW_ROOT)?)
}

fn mount(root: &Root, target: &CStr) -> Result<(), Error> {
    let device = || root.source.clone();
    let fstype = match &root.fstype {
        Some(fstype) => string(fstype)?,
        None => probe(&root.source)?.to_owned(),
    };
    if root.source.starts_with("/dev/") && root.fstype.is_some() {
        wait_for_device(&root.source)?;
    }
    let flags = if root.writable && !root.overlay {
        0
    } else {
        MS_RDONLY
    };
    let options = string(root.options.as_deref().unwrap_or_default())?;
    sys::mount(&string(&root.source)?, target, &fstype, flags, &options).map_err(|source| {
        match source.raw_os_error() {
            Some(libc::ENODEV) => Error::UnknownType {
                device: device(),
                fstype: fstype.to_string_lossy().into_owned(),
            },
            _ => Error::Mount {
                device: device(),
                source,
            },
        }
    })
}

fn string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|source| Error::Argument {
        text: text.to_owned(),
        source,
    })
}

fn wait_for_device(device: &str) -> Result<(), Error> {
    poll::until(DEVICE_DEADLINE, || Path::new(device).exists().then_some(())).ok_or_else(|| {
        Error::NoDevice {
            device: device.to_owned(),
        }
    })
}

/// What is on the device, told by its superblock rather than by trying one mount after the other.
fn probe(device: &str) -> Result<&'static CStr, Error> {
    let failed = |source| Error::Superblock {
        device: device.to_owned(),
        source,
    };
    if !device.starts_with("/dev/") {
        return Err(Error::NoDevice {
            device: device.to_owned(),
        });
    }
    let file = poll::until(DEVICE_DEADLINE, || match File::open(device) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        result => Some(result),
    });
    let file = file.ok_or_else(|| Error::NoDevice {
        device: device.to_owned(),
    })?;
    let mut start = Vec::with_capacity(SUPERBLOCK_END);
    file.and_then(|file| file.take(SUPERBLOCK_END as u64).read_to_end(&mut start))
        .map_err(failed)?;
    recognise(&start).ok_or_else(|| Error::NotRecognised {
        device: device.to_owned(),
    })
}

/// All magic numbers looked for lie before this offset.
const SUPERBLOCK_END: usize = 2048;

/// Tells a file system by the magic number in its superblock, which is within the first
/// [`SUPERBLOCK_END`] bytes of the device.
fn recognise(start: &[u8]) -> Option<&'static CStr> {
    const MAGICS: [(usize, &[u8], &CStr); 4] = [
        (0, b"hsqs", c"squashfs"),
        (0, b"XFSB", c"xfs"),
        (1024, &0xe0f5_e1e2_u32.to_le_bytes(), c"erofs"),
        (1024 + 56, &0xef53_u16.to_le_bytes(), c"ext4"),
    ];
    MAGICS.iter().find_map(|&(offset, magic, fstype)| {
        start.get(offset..)?.starts_with(magic).then_some(fstype)
    })
}

/// Lays a tmpfs over what is mounted on [`LOWER`].
fn mount_overlay() -> io::Result<()> {
    sys::mount(c"tmpfs", UPPER, c"tmpfs", 0, c"mode=0755")?;
    std::fs::create_dir("/upper/data")?;
    std::fs::create_dir("/upper/work")?;
    let options = c"lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work";
    sys::mount(c"overlay", NEW_ROOT, c"overlay", 0, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that starts with zeros but for `magic` at `offset`.
    fn device(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut start = vec![0; SUPERBLOCK_END];
        start[offset..offset + magic.len()].copy_from_slice(magic);
        start
    }

    #[test]
    fn each_file_system_is_told_by_its_magic() {
        assert_eq!(recognise(&device(0, b"hsqs")), Some(c"squashfs"));
        assert_eq!(recognise(&device(0, b"XFSB")), Some(c"xfs"));
        assert_eq!(
            recognise(&device(1024, b"\xe2\xe1\xf5\xe0")),
            Some(c"erofs")
        );
        assert_eq!(recognise(&device(1080, b"\x53\xef")), Some(c"ext4"));
    }

    #[test]
    fn anything_else_is_not_a_file_system() {
        assert_eq!(recognise(&[]), None);
        assert_eq!(recognise(&device(0, b"\x7fELF")), None);
        assert_eq!(recognise(&device(1, b"hsqs")), None);
        assert_eq!(recognise(&device(1024, b"\xe2\xe1\xf5\xe0")[..1027]), None);
    }

    #[test]
    fn a_root_that_is_no_device_needs_its_type() {
        let root = Root {
            source: "share".to_owned(),
            ..Root::default()
        };
        let error = mount(&root, c"/nowhere").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mount root file system share: no such device"
        );
    }
}
