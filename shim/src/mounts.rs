//! What a pod sees of the host's files: the folder that is shared with its guest, in which each root
//! file system and volume is mounted. Read-only is made so here, where the guest cannot undo it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent::protocol::agent::Storage;
use agent::protocol::oci::{Mount, Spec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::protocol::task;
use crate::spec::{GUEST_SANDBOX, GUEST_SHARED};

/// What was to be mounted where.
#[derive(Debug, thiserror::Error)]
#[error("mount {what} on {}", .place.display())]
pub(crate) struct Error {
    what: String,
    place: PathBuf,
    source: io::Error,
}

/// The folder that a pod's guest sees. Of its own it has nothing but places to mount on, and the
/// guest can make no more: it is read-only, but for what is mounted there.
#[derive(Debug)]
pub(crate) struct Shared {
    path: PathBuf,
    /// The same folder below its mount, where it can be written.
    below: OwnedFd,
}

impl Shared {
    /// Makes it at `path`: a mount of its own, so that what is mounted in it is seen nowhere else.
    pub(crate) fn make(path: PathBuf) -> Result<Self, Error> {
        let make = || {
            fs::create_dir_all(&path)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let below = rustix::fs::open(&path, flags, Mode::empty())?;
            rustix::mount::mount_bind(&path, &path)?;
            rustix::mount::mount_change(&path, MountPropagationFlags::PRIVATE)?;
            make_readonly(&path, Depth::All)?;
            Ok(below)
        };
        match make() {
            Ok(below) => Ok(Self { path, below }),
            Err(source) => Err(Error {
                what: path.display().to_string(),
                place: path,
                source,
            }),
        }
    }

    /// The folder it is in has another path now.
    pub(crate) fn moved(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Where the things of the container `id` are seen, and where places for them are made.
    fn of(&self, id: &str) -> (PathBuf, PathBuf) {
        let below = format!("/proc/self/fd/{}", self.below.as_raw_fd());
        (self.path.join(id), Path::new(&below).join(id))
    }

    /// Unmounts what the container `id` has.
    pub(crate) fn clear(&self, id: &str) -> io::Result<()> {
        let (seen, below) = self.of(id);
        unmount_below(&seen)?;
        remove_places(&below)
    }

    /// Mounts the root file system of the container `id`: what containerd says, or the folder
    /// `root` of its bundle.
    pub(crate) fn root(&self, id: &str, mounts: &[task::Mount], root: &Path) -> Result<(), Error> {
        let (seen, below) = self.of(id);
        let place = seen.join("rootfs");
        let failed = |what: &str, source| Error {
            what: what.into(),
            place: place.clone(),
            source,
        };
        let made = fs::create_dir_all(below.join("rootfs"));
        made.map_err(|source| failed("a root file system", source))?;
        for mount in mounts {
            let mounted = mount_as_told(mount, &place);
            mounted.map_err(|source| failed(&mount.source, source))?;
        }
        if mounts.is_empty() {
            let bound = rustix::mount::mount_bind_recursive(root, &place);
            bound.map_err(|errno| failed(&root.display().to_string(), errno.into()))?;
        }
        let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        let changed = rustix::mount::mount_change(&place, propagation);
        changed.map_err(|errno| failed("its propagation", errno.into()))
    }

    /// Mounts the volumes of the container `id` and rewrites its mounts to what the guest has.
    /// Returns the storage that the guest is to make itself.
    pub(crate) fn volumes(&self, id: &str, spec: &mut Spec) -> Result<Vec<Storage>, Error> {
        let mut storages = Vec::new();
        for (index, mount) in spec.mounts.iter_mut().enumerate() {
            match volume(mount) {
                Volume::Guests => {}
                Volume::Shm => {
                    mount.source = format!("{GUEST_SANDBOX}/shm");
                    readonly_in_guest(mount, true);
                }
                Volume::Memory(name) => {
                    let storage = memory(name, Path::new(&mount.source));
                    mount.source.clone_from(&storage.mount_point);
                    storages.push(storage);
                    readonly_in_guest(mount, true);
                }
                Volume::Hosts => {
                    let name = format!("{index}-{}", basename(&mount.destination));
                    let is_plain = self.bind(mount, id, &name)?;
                    mount.source = format!("{GUEST_SHARED}/{id}/{name}");
                    readonly_in_guest(mount, is_plain);
                }
            }
        }
        Ok(storages)
    }

    /// Whether nothing is mounted below it that might be written to though the volume is read-only.
    fn bind(&self, mount: &Mount, id: &str, name: &str) -> Result<bool, Error> {
        let (seen, below) = self.of(id);
        let place = &seen.join(name);
        let bind = || {
            let source = Path::new(&mount.source);
            if fs::metadata(source)?.is_dir() {
                fs::create_dir_all(below.join(name))?;
            } else {
                fs::File::create(below.join(name))?;
            }
            let has = |wanted: &str| mount.options.iter().any(|option| option == wanted);
            if has("bind") {
                rustix::mount::mount_bind(source, place)?;
            } else {
                rustix::mount::mount_bind_recursive(source, place)?;
            }
            // What the host mounts there later is seen if that is wanted; never the other way.
            let is_slave = has("rslave") || has("slave");
            let propagation = if is_slave {
                MountPropagationFlags::DOWNSTREAM
            } else {
                MountPropagationFlags::PRIVATE
            };
            rustix::mount::mount_change(place, propagation | MountPropagationFlags::REC)?;
            if has("rro") {
                make_readonly(place, Depth::All)?;
                return Ok(true);
            }
            if has("ro") {
                make_readonly(place, Depth::Top)?;
            }
            let mountinfo = fs::read("/proc/self/mountinfo")?;
            Ok(!is_slave && mounted_below(&mountinfo, place).len() == 1)
        };
        bind().map_err(|source| Error {
            what: mount.source.clone(),
            place: place.into(),
            source,
        })
    }
}

/// Makes a mount's options those of the guest's agent. All that a guest sees of a volume is one file
/// system to it, so read-only there is so for all of it. Where the host lets what is mounted below be
/// written to, it is the host alone that refuses the rest.
fn readonly_in_guest(mount: &mut Mount, is_plain: bool) {
    let options = &mut mount.options;
    if options.iter().any(|option| option == "rro") {
        options.retain(|option| option != "rro" && option != "ro");
        options.push("ro".into());
    } else if !is_plain {
        options.retain(|option| option != "ro");
    }
}

/// Whose a mount is.
#[derive(Debug, PartialEq)]
enum Volume<'a> {
    /// The guest's own, such as /proc.
    Guests,
    /// The memory that the pod's containers share.
    Shm,
    /// A volume of memory, by its name.
    Memory(&'a str),
    /// A file or folder of the host's.
    Hosts,
}

fn volume(mount: &Mount) -> Volume<'_> {
    let is_bind = mount.r#type == "bind"
        || mount
            .options
            .iter()
            .any(|option| option == "bind" || option == "rbind");
    let source = Path::new(&mount.source);
    let of_kernel = ["/dev", "/proc", "/sys"]
        .iter()
        .any(|root| source.starts_with(root));
    if !is_bind {
        Volume::Guests
    } else if mount.destination == "/dev/shm" {
        Volume::Shm
    } else if of_kernel {
        Volume::Guests
    } else if is_empty_dir(source) && is_tmpfs(source) {
        Volume::Memory(
            source
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or("memory"),
        )
    } else {
        Volume::Hosts
    }
}

/// Whether the kubelet made it for an emptyDir.
fn is_empty_dir(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name);
    parent.is_some_and(|name| name == "kubernetes.io~empty-dir")
}

fn is_tmpfs(path: &Path) -> bool {
    // linux/magic.h: TMPFS_MAGIC.
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == 0x0102_1994)
}

/// Memory of the guest's for a volume that is memory of the host's.
fn memory(name: &str, source: &Path) -> Storage {
    let size = rustix::fs::statvfs(source).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
    let mode = fs::metadata(source).map_or(0o777, |file| {
        std::os::unix::fs::MetadataExt::mode(&file) & 0o7777
    });
    let group = fs::metadata(source).map_or(0, |file| std::os::unix::fs::MetadataExt::gid(&file));
    let mut options = vec![format!("mode={mode:o}")];
    // Without a limit it is as large as the host's memory, which the guest has not.
    if size > 0 && size < rustix::system::sysinfo().totalram / 2 {
        options.push(format!("size={size}"));
    }
    if group != 0 {
        options.push(format!("fsgid={group}"));
    }
    Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options,
        mount_point: format!("{GUEST_SANDBOX}/ephemeral/{name}"),
        ..Storage::default()
    }
}

fn basename(path: &str) -> String {
    let name = Path::new(path)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    // It is to fit a file's name together with what is put before it.
    name.chars().take(40).collect()
}

fn mount_as_told(mount: &task::Mount, place: &Path) -> io::Result<()> {
    let (mut flags, mut data, mut bind) = (MountFlags::empty(), Vec::new(), None);
    for option in &mount.options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "rw" | "defaults" => {}
            "bind" => bind = Some(false),
            "rbind" => bind = Some(true),
            other => data.push(other),
        }
    }
    match bind.or_else(|| (mount.r#type == "bind").then_some(true)) {
        Some(true) => rustix::mount::mount_bind_recursive(&mount.source, place)?,
        Some(false) => rustix::mount::mount_bind(&mount.source, place)?,
        None => {
            let data = CString::new(data.join(","))?;
            rustix::mount::mount(&mount.source, place, &mount.r#type, flags, Some(&*data))?;
            return Ok(());
        }
    }
    if flags.contains(MountFlags::RDONLY) {
        make_readonly(place, Depth::All)?;
    }
    Ok(())
}

/// How much of a mount is changed.
#[derive(Clone, Copy, PartialEq)]
enum Depth {
    /// The mount alone.
    Top,
    /// With all that is mounted below it.
    All,
}

/// Makes a mount read-only.
fn make_readonly(place: &Path, depth: Depth) -> io::Result<()> {
    let path = CString::new(place.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = match depth {
        Depth::Top => 0,
        Depth::All => libc::AT_RECURSIVE,
    };
    // SAFETY: path and attributes outlive the call, and the size is that of what is pointed to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Unmounts all at and below `folder`, and takes away the empty places of what was mounted.
pub(crate) fn clear(folder: &Path) -> io::Result<()> {
    unmount_below(folder)?;
    remove_places(folder)
}

/// Unmounts all at and below `folder`. An error if something is still mounted: what is to be seen
/// there is a user's then, not an empty place.
pub(crate) fn unmount_below(folder: &Path) -> io::Result<()> {
    let mounted = || fs::read("/proc/self/mountinfo").map(|text| mounted_below(&text, folder));
    for place in mounted()?.iter().rev() {
        // Whoever has a file of it open keeps that alone.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(errno) = rustix::mount::unmount(place, flags) {
            log::warn!("unmount {}: {errno}", place.display());
        }
    }
    match mounted()?.first() {
        Some(place) => Err(io::Error::other(format!(
            "{} is still mounted",
            place.display()
        ))),
        None => Ok(()),
    }
}

/// Removes folders that are empty and files that are, which is all that is left of places.
fn remove_places(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            remove_places(&entry.path())?;
        } else if metadata.len() == 0 && metadata.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

/// The mount points at and below `folder` in the text of /proc/PID/mountinfo (proc_pid_mountinfo(5)),
/// in the order they were mounted.
fn mounted_below(text: &[u8], folder: &Path) -> Vec<PathBuf> {
    let lines = text.split(|byte| *byte == b'\n');
    let places = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let places = places.map(|field| PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(field))));
    places.filter(|place| place.starts_with(folder)).collect()
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

    fn mount(kind: &str, source: &str, destination: &str) -> Mount {
        Mount {
            destination: destination.into(),
            source: source.into(),
            r#type: kind.into(),
            options: vec!["rbind".into()],
        }
    }

    #[test]
    fn each_mount_is_somebodys() {
        let of = |source, destination| {
            let mount = mount("bind", source, destination);
            format!("{:?}", volume(&mount))
        };
        assert_eq!(of("/run/x/shm", "/dev/shm"), "Shm");
        assert_eq!(of("/dev/null", "/x"), "Guests");
        assert_eq!(of("/etc/hosts", "/etc/hosts"), "Hosts");
        assert_eq!(of("/tmp/kubernetes.io~empty-dir/a", "/a"), "Hosts");
        let mut proc = mount("proc", "proc", "/proc");
        proc.options.clear();
        assert_eq!(volume(&proc), Volume::Guests);
    }

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

    #[test]
    fn a_guest_writes_only_to_what_is_mounted_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        let shared = Shared::make(folder.path().join("shared")).expect("this test needs root");
        shared.root("c", &[], &root).unwrap();
        let seen = folder.path().join("shared");
        for place in ["stray", "c/stray"] {
            let error = fs::write(seen.join(place), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
        }
        fs::write(seen.join("c/rootfs/file"), "x").unwrap();
        shared.clear("c").unwrap();
        assert!(root.join("file").exists() && !seen.join("c").exists());
        clear(&seen).unwrap();
        assert!(!seen.exists());
    }

    /// A volume with these options, in which another file system is mounted: whether it can be written
    /// to, whether what is mounted in it can be, and its options in the guest.
    fn written(option: &str) -> (bool, bool, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("kubelet");
        let inner = source.join("inner");
        fs::create_dir_all(&inner).unwrap();
        let tmpfs = rustix::mount::mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None);
        tmpfs.expect("this test needs root");
        let mut volume = mount("bind", source.to_str().unwrap(), "/data/x");
        volume.options.push(option.into());
        let mut spec = Spec {
            mounts: vec![volume],
            ..Spec::default()
        };
        let shared = Shared::make(folder.path().join("shared")).unwrap();
        fs::create_dir(Path::new(&shared.of("c").1)).unwrap();
        assert!(shared.volumes("c", &mut spec).unwrap().is_empty());
        assert_eq!(spec.mounts[0].source, format!("{GUEST_SHARED}/c/0-x"));
        let [top, below] = ["c/0-x/file", "c/0-x/inner/file"].map(|place| {
            match fs::write(folder.path().join("shared").join(place), "x") {
                Ok(()) => true,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
                    false
                }
            }
        });
        clear(&folder.path().join("shared")).unwrap();
        fs::write(source.join("inner/file"), "x").unwrap();
        rustix::mount::unmount(inner, UnmountFlags::DETACH).unwrap();
        (top, below, spec.mounts.remove(0).options)
    }

    #[test]
    fn a_read_only_volume_is_so_on_the_host_and_below_it_if_that_is_asked_for() {
        let words = |words: &[&str]| words.iter().map(|&word| word.into()).collect();
        assert_eq!(written("ro"), (false, true, words(&["rbind"])));
        assert_eq!(written("rro"), (false, false, words(&["rbind", "ro"])));
        assert_eq!(written("rw"), (true, true, words(&["rbind", "rw"])));
    }

    #[test]
    fn the_guest_has_a_plain_volume_read_only_too() {
        let mut volume = mount("bind", "/x", "/x");
        volume.options = vec!["rbind".into(), "ro".into()];
        let before = volume.options.clone();
        readonly_in_guest(&mut volume, true);
        assert_eq!(volume.options, before);
    }

    #[test]
    fn only_empty_places_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let shared = folder.path().join("shared");
        fs::create_dir_all(shared.join("c/rootfs")).unwrap();
        fs::File::create(shared.join("c/0-hosts")).unwrap();
        clear(&shared).unwrap();
        assert!(!shared.exists());
        fs::create_dir_all(shared.join("c/rootfs")).unwrap();
        fs::write(shared.join("c/rootfs/precious"), "data").unwrap();
        clear(&shared).unwrap_err();
        assert!(shared.join("c/rootfs/precious").exists());
    }
}
