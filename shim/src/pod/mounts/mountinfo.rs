//! What is mounted where: the text of /proc/PID/mountinfo (proc_pid_mountinfo(5)).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// The file system's device, as `0:45`.
    pub(super) device: Vec<u8>,
    /// The folder or file of the file system that the mount shows.
    pub(super) root: PathBuf,
    pub(super) place: PathBuf,
}

/// All mounts, in the order they were mounted. Lines that are cut short are passed over.
pub(super) fn all(text: &[u8]) -> impl DoubleEndedIterator<Item = Mounted> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (device, root, place) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Mounted {
            device: device.to_vec(),
            root: path(root),
            place: path(place),
        })
    })
}

/// The mount points at and below `folder`, in the order they were mounted.
pub(super) fn mounted_below(text: &[u8], folder: &Path) -> Vec<PathBuf> {
    let places = all(text).map(|mounted| mounted.place);
    places.filter(|place| place.starts_with(folder)).collect()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&unescape(field)))
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.first_chunk::<3>().filter(|_| byte == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        rest = if code.is_some() { &tail[3..] } else { tail };
        bytes.push(code.unwrap_or(byte));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_by_whole_names_below_the_folder() {
        let text = b"1 2 0:1 / /run/a rw - tmpfs x rw\n\
            2 1 0:1 / /run/ab rw - tmpfs x rw\n\
            3 1 0:1 / /run/a/b\\040c rw - tmpfs x rw\nbroken\n";
        assert_eq!(
            mounted_below(text, Path::new("/run/a")),
            [Path::new("/run/a"), Path::new("/run/a/b c")]
        );
    }
}
