//! Which volumes of a pod's containers are one. Each source is mounted once in the folder that is shared
//! with the guest, for all containers that use it: so a file has one inode in the guest, and locks,
//! sockets, notifications and shared mappings work between containers.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;

use super::mountinfo;

/// What tells a volume from others: those that agree in it are one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    device: u64,
    inode: u64,
    /// Flags of the mount that the source is in. They are the volume's as well.
    flags: StatVfsMountFlags,
    apart: Option<Apart>,
}

/// What more there is of a volume that has, or may come to have, other file systems mounted in it. It
/// is read-only on the host alone, and so apart from those of other options.
#[derive(Clone, Debug, PartialEq)]
struct Apart {
    source: PathBuf,
    options: Vec<String>,
}

impl Key {
    /// The key of the volume `source`, a path without symbolic links, mounted with these options.
    pub(super) fn of(source: &Path, options: &[String]) -> io::Result<Self> {
        let file = fs::metadata(source)?;
        let is_deep = !options.iter().any(|option| option == "bind");
        let has_mounts = || -> io::Result<bool> {
            let text = fs::read("/proc/self/mountinfo")?;
            let places = mountinfo::mounted_below(&text, source);
            Ok(places.iter().any(|place| place != source))
        };
        let apart = is_slave(options) || is_deep && has_mounts()?;
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
            flags: rustix::fs::statvfs(source)?.f_flag,
            apart: apart.then(|| Apart {
                source: source.into(),
                options: options.to_vec(),
            }),
        })
    }

    /// Whether all of it is one file system, so that the guest can hold each container to read-only.
    pub(super) fn is_plain(&self) -> bool {
        self.apart.is_none()
    }

    /// Whether the host has not mounted it read-only itself.
    pub(super) fn may_be_written(&self) -> bool {
        !self.flags.contains(StatVfsMountFlags::RDONLY)
    }
}

pub(super) fn is_slave(options: &[String]) -> bool {
    let mut options = options.iter();
    options.any(|option| option == "rslave" || option == "slave")
}

/// A volume that is mounted, and the containers that use it.
#[derive(Debug)]
struct Volume {
    key: Key,
    name: String,
    users: Vec<String>,
}

/// The volumes of a pod.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    all: Vec<Volume>,
    /// How many volumes there ever were: the guest is to take none for an earlier one.
    made: usize,
    /// Folders in volumes of memory.
    parts: Vec<Memory>,
}

impl Volumes {
    /// The name of the volume, which the container `id` uses from now on, and whether it is new: then it
    /// is to be mounted. A new one's name ends with `hint`.
    pub(super) fn acquire(&mut self, key: &Key, id: &str, hint: &str) -> (String, bool) {
        if let Some(volume) = self.all.iter_mut().find(|volume| volume.key == *key) {
            volume.users.push(id.into());
            return (volume.name.clone(), false);
        }
        let name = format!("{}-{hint}", self.made);
        self.made += 1;
        self.all.push(Volume {
            key: key.clone(),
            name: name.clone(),
            users: vec![id.into()],
        });
        (name, true)
    }

    /// Has the container `id` use none any more. Returns the names of those that no container uses then.
    pub(super) fn release(&mut self, id: &str) -> Vec<String> {
        for volume in &mut self.all {
            volume.users.retain(|user| user != id);
        }
        let unused = self.all.extract_if(.., |volume| volume.users.is_empty());
        unused.map(|volume| volume.name).collect()
    }

    /// Has no container use the volume `name`, which could not be mounted.
    pub(super) fn forget(&mut self, name: &str) {
        self.all.retain(|volume| volume.name != name);
    }

    /// A number for a folder in a volume of memory, the same each time.
    pub(super) fn part(&mut self, memory: &Memory) -> usize {
        let known = self.parts.iter().position(|part| part == memory);
        known.unwrap_or_else(|| {
            self.parts.push(memory.clone());
            self.parts.len() - 1
        })
    }
}

/// A kubelet's `emptyDir` in memory, or a folder in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// Where the kubelet mounted it.
    pub(super) place: PathBuf,
    /// The folder in it; empty for all of it.
    pub(super) below: PathBuf,
}

impl Memory {
    /// The volume of memory that the folder `source` on the host is in. The kubelet mounts a
    /// `subPath` elsewhere, so it is looked for by the file system.
    pub(super) fn find(source: &Path) -> Option<Self> {
        let text = fs::read("/proc/self/mountinfo").ok()?;
        Self::in_mounts(&text, &fs::canonicalize(source).ok()?)
    }

    fn in_mounts(text: &[u8], source: &Path) -> Option<Self> {
        // Of several at one place the last is seen.
        let around = mountinfo::all(text)
            .filter(|mounted| source.starts_with(&mounted.place))
            .max_by_key(|mounted| mounted.place.components().count())?;
        let place = source.strip_prefix(&around.place).ok()?;
        let is_volume = |mounted: &mountinfo::Mounted| {
            mounted.device == around.device
                && mounted.root == Path::new("/")
                && is_empty_dir(&mounted.place)
        };
        let volume = mountinfo::all(text).find(is_volume)?;
        let below = around.root.join(place);
        Some(Self {
            place: volume.place,
            below: below.strip_prefix("/").ok()?.components().collect(),
        })
    }

    /// The volume's name in its pod.
    pub(super) fn name(&self) -> String {
        let name = self.place.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// Whether the kubelet made it for an `emptyDir`.
fn is_empty_dir(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name);
    parent.is_some_and(|name| name == "kubernetes.io~empty-dir")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.into()).collect()
    }

    #[test]
    fn one_source_is_one_volume_until_its_last_container_ends() {
        let folder = tempfile::tempdir().unwrap();
        let key = |words: &[&str]| Key::of(folder.path(), &options(words)).unwrap();
        let mut volumes = Volumes::default();
        let mut of = |id: &str, key: &Key| volumes.acquire(key, id, "data");
        assert_eq!(of("a", &key(&["rbind", "rw"])), ("0-data".into(), true));
        assert_eq!(of("a", &key(&["rbind", "ro"])), ("0-data".into(), false));
        assert_eq!(of("b", &key(&["rbind", "rro"])), ("0-data".into(), false));
        let slave = key(&["rbind", "rslave"]);
        assert_eq!(of("b", &slave), ("1-data".into(), true));
        assert!(key(&["rbind"]).is_plain() && !slave.is_plain());
        let other = tempfile::tempdir().unwrap();
        let other = Key::of(other.path(), &[]).unwrap();
        assert_eq!(of("a", &other), ("2-data".into(), true));
        assert_eq!(volumes.release("a"), ["2-data"]);
        assert_eq!(volumes.release("b"), ["0-data", "1-data"]);
        let again = volumes.acquire(&key(&["rbind"]), "c", "data");
        assert_eq!(again, ("3-data".into(), true), "no name comes twice");
    }

    #[test]
    fn a_folder_of_a_memory_volume_is_found_wherever_it_is_mounted() {
        let text = b"1 0 8:1 / / rw - ext4 x rw\n\
            2 1 0:40 / /k/pods/u/volumes/kubernetes.io~empty-dir/cache rw - tmpfs x rw\n\
            3 1 0:40 /a/b /k/pods/u/volume-subpaths/cache/main/0 rw - tmpfs x rw\n\
            4 1 0:41 / /run rw - tmpfs x rw\n";
        let find = |source: &str| Memory::in_mounts(text, Path::new(source));
        let place = PathBuf::from("/k/pods/u/volumes/kubernetes.io~empty-dir/cache");
        let memory = |below: &str| {
            Some(Memory {
                place: place.clone(),
                below: below.into(),
            })
        };
        assert_eq!(find(place.to_str().unwrap()), memory(""));
        assert_eq!(
            find("/k/pods/u/volume-subpaths/cache/main/0"),
            memory("a/b")
        );
        let inner = place.join("x/y");
        assert_eq!(find(inner.to_str().unwrap()), memory("x/y"));
        assert_eq!((find("/run/x"), find("/data")), (None, None));
    }
}
