//! Folders with all that a file system keeps of a file, to be compared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use guest_load::transfer::Checksum;

/// What there is below a folder, by path: kind and permissions, owner, links, device, and content.
/// Times are not in it.
pub fn manifest(root: &Path) -> io::Result<BTreeMap<PathBuf, String>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            let content = if metadata.is_symlink() {
                format!("{:?}", fs::read_link(&path)?)
            } else if metadata.is_file() {
                let Checksum { hash, len } = Checksum::of_all(&mut File::open(&path)?)?;
                format!("{len} bytes, {hash:x}")
            } else {
                String::new()
            };
            let text = format!(
                "{:o} {}:{} {} links, device {:x}, {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.nlink(),
                metadata.rdev()
            );
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let below = path.strip_prefix(root).expect("it was found there");
            all.insert(below.to_path_buf(), text);
        }
    }
    Ok(all)
}
