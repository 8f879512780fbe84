//! What is mounted in the guest for containers to share.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path};
use std::sync::{Mutex, MutexGuard};

use protocol::agent::messages::Storage;
use protocol::contract::{SANDBOX, SHARED};
use protocol::ttrpc::{Code, Status};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::devices::{self, Disk, Disks};

/// How the host may ask for storage.
pub(crate) const DRIVERS: [&str; 6] = [
    "virtio-fs",
    "ephemeral",
    "local",
    "overlayfs",
    devices::BLK,
    "mmioblk",
];

/// The mode of folders that belong to a group: what is made there does too.
const GROUP_MODE: u32 = 0o2775;

/// Mounted storage by place.
#[derive(Debug, Default)]
pub(crate) struct Storages {
    places: Mutex<HashMap<String, Held>>,
    disks: Disks,
    /// Whether the host is held to a policy for mounts: to sources without links, and to places that no share
    /// and no container can have put a link at.
    is_strict: bool,
}

/// Who needs what is mounted at a place.
#[derive(Debug)]
struct Held {
    /// How many containers need it.
    users: usize,
    /// Whether it lives as long as the pod: memory that one container leaves to the next.
    stays: bool,
    /// The disk that it is on.
    _disk: Option<Disk>,
}

/// The type of what is to be mounted.
pub(crate) fn kind(storage: &Storage) -> &str {
    match (storage.fstype.as_str(), storage.driver.as_str()) {
        ("bind", _) => "bind",
        // A folder is made, whatever type it says.
        (_, "local") => "local",
        (fstype, _) => fstype,
    }
}

impl Storages {
    pub(crate) fn new(is_strict: bool, disks: Disks) -> Self {
        Self {
            places: Mutex::default(),
            disks,
            is_strict,
        }
    }

    fn places(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.places.lock().expect("a panic ends the process")
    }

    /// Mounts the storage, unless it is mounted.
    pub(crate) fn add(&self, storage: &Storage) -> Result<(), Status> {
        if !DRIVERS.contains(&storage.driver.as_str()) {
            let why = format!("there is no storage driver {}", storage.driver);
            return Err(Status::new(Code::InvalidArgument, why));
        }
        if storage.driver == "mmioblk" {
            devices::wait_for(&storage.source)?;
        }
        let mut storage = Cow::Borrowed(storage);
        if self.is_strict && !is_plain(Path::new(&storage.mount_point)) {
            let why = format!(
                "{} is no place for storage by the node's policy",
                storage.mount_point
            );
            return Err(Status::new(Code::PermissionDenied, why));
        }
        let mut places = self.places();
        if let Some(held) = places.get_mut(&storage.mount_point) {
            held.users += 1;
            return Ok(());
        }
        let mut disk = None;
        if storage.driver == devices::BLK && !storage.source.starts_with("/dev/") {
            let found = self.disks.find(&storage.source)?;
            storage.to_mut().source.clone_from(&found.path);
            disk = Some(found);
        }
        let prepared = match (storage.fstype.as_str(), storage.driver.as_str()) {
            ("bind", "ephemeral") => bind_part(&storage, &places),
            ("bind", _) => bind_whole(&storage, self.is_strict),
            _ => prepare(&storage),
        };
        prepared.map_err(|error| failed("mount", &storage, &error))?;
        let held = Held {
            users: 1,
            stays: ["ephemeral", "local"].contains(&storage.driver.as_str()),
            _disk: disk,
        };
        places.insert(storage.mount_point.clone(), held);
        Ok(())
    }

    /// Unmounts what is at `place` once no container needs it, unless it is the pod's.
    pub(crate) fn remove(&self, place: &str) {
        let mut places = self.places();
        let Some(held) = places.get_mut(place) else {
            return;
        };
        held.users = held.users.saturating_sub(1);
        if held.users == 0 && !held.stays {
            // A disk is let go of when what was mounted of it is not any more.
            let _held = places.remove(place);
            // A folder made for a driver that mounts nothing is left as it is.
            if rustix::mount::unmount(place, UnmountFlags::DETACH).is_ok() {
                let _ = fs::remove_dir(place);
            }
        }
    }

    /// Changes the options of what is mounted already, such as its size. Only file systems in
    /// memory have such options.
    pub(crate) fn update(&self, storage: &Storage) -> Result<(), Status> {
        if storage.driver != "ephemeral" || storage.fstype != "tmpfs" {
            return Ok(());
        }
        if !self.places().contains_key(&storage.mount_point) {
            let why = format!("there is no storage on {}", storage.mount_point);
            return Err(Status::new(Code::NotFound, why));
        }
        remount(storage).map_err(|error| failed("mount again", storage, &error))
    }
}

/// Whether a place is the share's or one of the pod's own folders, of a plain name each: no other process can
/// have put a link on the way there.
fn is_plain(place: &Path) -> bool {
    let Ok(below) = place.strip_prefix(SANDBOX) else {
        return place == Path::new(SHARED);
    };
    below
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
}

fn failed(act: &str, storage: &Storage, error: &io::Error) -> Status {
    let Storage {
        source,
        mount_point,
        ..
    } = storage;
    let what = format!("{act} {source} on {mount_point}: {error}");
    Status::new(Code::Internal, what)
}

/// The options of a mount, told apart.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    flags: MountFlags,
    /// Options for the file system itself.
    data: String,
    group: Option<u32>,
    mode: Option<u32>,
}

pub(crate) fn options(words: &[String]) -> Options {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    let (mut group, mut mode) = (None, None);
    for word in words.iter().flat_map(|words| words.split(',')) {
        match word {
            "" | "rw" | "defaults" => continue,
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            _ => match word.split_once('=') {
                Some(("fsgid", id)) => group = id.parse().ok(),
                Some(("mode", text)) => {
                    mode = u32::from_str_radix(text, 8).ok();
                    data.push(word);
                }
                _ => data.push(word),
            },
        }
    }
    Options {
        flags,
        data: data.join(","),
        group,
        mode,
    }
}

fn prepare(storage: &Storage) -> io::Result<()> {
    let place = Path::new(&storage.mount_point);
    fs::create_dir_all(place)?;
    let options = options(&storage.options);
    if storage.driver != "local" {
        if storage.fstype == "hugetlbfs" {
            allocate_huge_pages(&options.data)?;
        }
        let data = CString::new(options.data)?;
        let (source, fstype) = (&storage.source, &storage.fstype);
        rustix::mount::mount(source, place, fstype, options.flags, Some(&*data))?;
    }
    let group = storage.fs_group.as_ref().map(|group| group.group_id);
    if let Some(gid) = group.or(options.group) {
        chown(place, None, Some(gid))?;
        fs::set_permissions(place, fs::Permissions::from_mode(GROUP_MODE))?;
    }
    if let ("local", Some(mode)) = (storage.driver.as_str(), options.mode) {
        fs::set_permissions(place, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Mounts a folder of the host's for all containers at once. The kernel mounts it by itself where
/// the shared files are looked at, but once for each mount namespace, and each is another file
/// system to it: a socket or a lock in one is none in the other.
fn bind_whole(storage: &Storage, is_strict: bool) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = match is_strict {
        true => ResolveFlags::NO_SYMLINKS,
        false => ResolveFlags::empty(),
    };
    let folder = rustix::fs::openat2(CWD, &*storage.source, flags, Mode::empty(), resolve)?;
    let place = Path::new(&storage.mount_point);
    fs::create_dir_all(place)?;
    rustix::mount::mount_bind(by_number(&folder), place)?;
    // That of the kernel's own; a folder that the host has not mounted there has none.
    let _ = rustix::mount::unmount(&*storage.source, UnmountFlags::DETACH);
    Ok(())
}

/// Mounts a folder of other storage, which is made if it is not there. Containers can write to that
/// storage: no symbolic link of theirs leads out of it.
fn bind_part(storage: &Storage, places: &HashMap<String, Held>) -> io::Result<()> {
    let source = Path::new(&storage.source);
    let mut around = source.ancestors().skip(1);
    let around = around.find(|path| path.to_str().is_some_and(|path| places.contains_key(path)));
    let around = around.ok_or_else(|| io::Error::other("it is in no storage"))?;
    let below = source.strip_prefix(around).map_err(io::Error::other)?;
    let mode = options(&storage.options).mode.unwrap_or(0o755);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let around = rustix::fs::open(around, flags, Mode::empty())?;
    let open = |path: &Path| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&around, path, flags, Mode::empty(), resolve)
    };
    let mut folder = open(Path::new("."))?;
    let mut so_far = std::path::PathBuf::new();
    for part in below.components() {
        let Component::Normal(name) = part else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        so_far.push(name);
        folder = match open(&so_far) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(mode))?;
                let made = open(&so_far)?;
                // What the mask took away.
                let permissions = fs::Permissions::from_mode(mode);
                fs::set_permissions(by_number(&made), permissions)?;
                made
            }
            found => found?,
        };
    }
    let place = Path::new(&storage.mount_point);
    fs::create_dir_all(place)?;
    rustix::mount::mount_bind(by_number(&folder), place)?;
    Ok(())
}

/// The path of an open file for calls that take none.
fn by_number(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn remount(storage: &Storage) -> io::Result<()> {
    let options = options(&storage.options);
    let data = CString::new(options.data)?;
    rustix::mount::mount_remount(&storage.mount_point, options.flags, &*data)?;
    Ok(())
}

/// Has the kernel set aside as many more huge pages as the file system is to hold.
fn allocate_huge_pages(data: &str) -> io::Result<()> {
    let Some((page, size)) = huge_pages(data) else {
        return Ok(());
    };
    let path = format!(
        "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        page >> 10
    );
    let number = || -> io::Result<u64> {
        let text = fs::read_to_string(&path)?;
        text.trim().parse().map_err(io::Error::other)
    };
    let wanted = number()?.saturating_add(size.div_ceil(page));
    fs::write(&path, wanted.to_string())?;
    match number()? {
        had if had >= wanted => Ok(()),
        had => Err(io::Error::other(format!(
            "there is memory for {had} of {wanted} pages of {page} bytes"
        ))),
    }
}

/// The sizes of a page and of all, in bytes. None if one is not said.
fn huge_pages(data: &str) -> Option<(u64, u64)> {
    let words = data.split(',').filter_map(|word| word.split_once('='));
    let bytes = |wanted| {
        let mut words = words.clone().filter(|(key, _)| *key == wanted);
        bytes(words.next()?.1)
    };
    let (page, size) = (bytes("pagesize")?, bytes("size")?);
    (page >= 4096).then_some((page, size))
}

/// A number of bytes, as `2M` or `2097152`.
fn bytes(text: &str) -> Option<u64> {
    let text = text.strip_suffix('B').unwrap_or(text);
    let text = text.strip_suffix('i').unwrap_or(text);
    let (number, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_size_and_a_mode_are_the_file_systems() {
        let asked = [
            "noexec,nosuid",
            "nodev",
            "mode=1777",
            "size=65536",
            "fsgid=7",
            "rw",
        ];
        let expected = Options {
            flags: MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV,
            data: "mode=1777,size=65536".into(),
            group: Some(7),
            mode: Some(0o1777),
        };
        assert_eq!(options(&words(&asked)), expected);
    }

    #[test]
    fn huge_pages_are_counted_in_bytes() {
        let two = 2 << 20;
        assert_eq!(
            huge_pages("pagesize=2097152,size=8388608"),
            Some((two, 4 * two))
        );
        assert_eq!(huge_pages("size=1Gi,pagesize=2M"), Some((two, 1 << 30)));
        for bad in [
            "",
            "size=1",
            "pagesize=0,size=1",
            "pagesize=2M",
            "pagesize=x,size=1",
        ] {
            assert_eq!(huge_pages(bad), None, "{bad}");
        }
    }

    fn storage(driver: &str, source: &Path, fstype: &str, place: &Path) -> Storage {
        Storage {
            driver: driver.into(),
            source: source.display().to_string(),
            fstype: fstype.into(),
            options: vec!["mode=777".into()],
            mount_point: place.display().to_string(),
            ..Storage::default()
        }
    }

    #[test]
    fn memory_is_there_for_the_next_container_and_its_folders_are_in_it() {
        let folder = std::env::temp_dir().join(format!("podvmm-memory-{}", std::process::id()));
        let [whole, part] = ["whole", "parts/0"].map(|name| folder.join(name));
        let storages = Storages::default();
        let memory = storage("ephemeral", Path::new("tmpfs"), "tmpfs", &whole);
        let early = storages.add(&storage("ephemeral", &whole.join("a"), "bind", &part));
        assert!(early.unwrap_err().message.ends_with("it is in no storage"));
        storages.add(&memory).expect("this test needs root");
        let inner = storage("ephemeral", &whole.join("a/b"), "bind", &part);
        storages.add(&inner).unwrap();
        fs::write(part.join("note"), "left behind").unwrap();
        let mode = fs::metadata(whole.join("a/b"))
            .unwrap()
            .permissions()
            .mode();
        std::os::unix::fs::symlink("/etc", whole.join("out")).unwrap();
        let out = storage(
            "ephemeral",
            &whole.join("out"),
            "bind",
            &folder.join("parts/1"),
        );
        let out = storages.add(&out);
        for place in [&memory.mount_point, &inner.mount_point, &inner.mount_point] {
            storages.remove(place);
        }
        storages.add(&memory).unwrap();
        let note = fs::read_to_string(whole.join("a/b/note"));
        for place in [&part, &whole] {
            rustix::mount::unmount(place, UnmountFlags::DETACH).unwrap();
        }
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(mode & 0o7777, 0o777);
        assert_eq!(note.unwrap(), "left behind");
        assert!(out.is_err(), "no link leads out of it");
    }

    #[test]
    fn a_folder_of_the_hosts_is_mounted_until_the_last_container_ends() {
        let folder = std::env::temp_dir().join(format!("podvmm-folder-{}", std::process::id()));
        let [source, place] = ["source", "place"].map(|name| folder.join(name));
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("file"), "of the host").unwrap();
        let storages = Storages::default();
        let shared = storage("virtio-fs", &source, "bind", &place);
        storages.add(&shared).expect("this test needs root");
        storages.add(&shared).unwrap();
        let seen = || place.join("file").exists();
        storages.remove(&shared.mount_point);
        let after_one = seen();
        storages.remove(&shared.mount_point);
        let after_both = place.exists();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!((after_one, after_both), (true, false));
    }

    #[test]
    fn a_policy_keeps_storage_to_plain_places() {
        let folder = std::env::temp_dir().join(format!("podvmm-strict-{}", std::process::id()));
        fs::create_dir_all(folder.join("real")).unwrap();
        std::os::unix::fs::symlink("real", folder.join("link")).unwrap();
        let strict = Storages::new(true, Disks::default());
        for place in [
            "/etc",
            "/run/kata-containers/sandbox/../x",
            "/run/kata-containers/shared/containers/x",
        ] {
            let refused = strict.add(&storage("virtio-fs", &folder, "bind", Path::new(place)));
            assert_eq!(refused.unwrap_err().code, Code::PermissionDenied, "{place}");
        }
        let place = folder.join("place");
        let linked = storage("virtio-fs", &folder.join("link"), "bind", &place);
        let followed = bind_whole(&linked, false);
        let unmounted = rustix::mount::unmount(&place, UnmountFlags::DETACH);
        let refused = bind_whole(&linked, true);
        fs::remove_dir_all(&folder).unwrap();
        followed.expect("this test needs root");
        unmounted.unwrap();
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(is_plain(Path::new(
            "/run/kata-containers/shared/containers/"
        )));
        assert!(is_plain(Path::new(
            "/run/kata-containers/sandbox/volumes/0-data"
        )));
    }

    #[test]
    fn what_there_is_no_driver_for_is_refused() {
        let storage = Storage {
            driver: "scsi".into(),
            ..Storage::default()
        };
        let refused = Storages::default().add(&storage).unwrap_err();
        assert_eq!(refused.message, "there is no storage driver scsi");
    }

    proptest! {
        #[test]
        fn any_words_are_options(all in prop::collection::vec("(size|mode|fsgid|pagesize|ro)?=?\\PC{0,9}", 0..5)) {
            let options = options(&all);
            let _ = huge_pages(&options.data);
        }
    }
}
