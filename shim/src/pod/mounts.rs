//! What a pod sees of the host's files: the folder that is shared with its guest, in which each root
//! file system and volume is mounted. Read-only is made so here, where the guest cannot undo it.

mod attributes;
mod mirror;
mod mountinfo;
mod overlay;
#[cfg(test)]
mod tests;
mod volumes;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use protocol::agent::messages::Storage;
use protocol::agent::oci::{Mount, Spec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::pod::spec;
use attributes::{Depth, change_readonly, keep_harmless, make_readonly};
use mirror::Mirror;
use mountinfo::mounted_below;
use protocol::containerd::task;
use protocol::contract::{SANDBOX, SHARED};
use volumes::{Key, Memory, Volumes};

/// Where the volumes of all containers are mounted. No container has such a name.
const VOLUMES: &str = ".volumes";

/// Where a container's root file system is, in its folder.
const ROOTFS: &str = "rootfs";

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
///
/// It owns all that the pod mounts on the host. Its guest takes it down when the pod ends; where a VM is
/// given up before there is a guest, dropping it does. What a shim that was killed left mounted is
/// unmounted by [`clear`], from another process.
#[derive(Debug)]
pub(crate) struct Shared {
    path: PathBuf,
    /// The same folder below its mount, where it can be written.
    below: OwnedFd,
    volumes: Mutex<Volumes>,
    /// The same folder as a podvmm in a jail sees it.
    mirror: Mutex<Option<Mirror>>,
    /// Whether it is still to be taken down. Later there may be another pod's at its path.
    is_up: AtomicBool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.take_down();
    }
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
            keep_harmless(&path)?;
            Ok(below)
        };
        match make() {
            Ok(below) => Ok(Self {
                path,
                below,
                volumes: Mutex::default(),
                mirror: Mutex::default(),
                is_up: AtomicBool::new(true),
            }),
            Err(source) => {
                // As far as it was made. Why it was not is the error to tell.
                let _ = clear(&path);
                Err(Error {
                    what: path.display().to_string(),
                    place: path,
                    source,
                })
            }
        }
    }

    /// Unmounts all that is mounted in it, and removes it, once. A failure is logged.
    pub(crate) fn take_down(&self) {
        if !self.is_up.swap(false, Ordering::Relaxed) {
            return;
        }
        // With it goes what podvmm's namespace has mounted.
        *self.mirror() = None;
        if let Err(error) = clear(&self.path) {
            log::warn!("clean up {}: {error}", self.path.display());
        }
    }

    /// Has podvmm, which is the process `pid` and in its jail by now, see what is mounted from here on.
    pub(crate) fn show_to(&self, pid: u32) -> Result<(), Error> {
        let mirror = Mirror::of(pid, &self.path).map_err(|source| Error {
            what: "what podvmm is to see".into(),
            place: self.path.clone(),
            source,
        })?;
        *self.mirror() = mirror;
        Ok(())
    }

    fn mirror(&self) -> MutexGuard<'_, Option<Mirror>> {
        self.mirror.lock().expect("a panic ends the process")
    }

    /// Does something in podvmm's jail, if it is in one, with what is mounted at `place` in the folder.
    fn mirrored(
        &self,
        place: &Path,
        act: impl FnOnce(&Mirror, &Path) -> io::Result<()>,
    ) -> io::Result<()> {
        let name = place.strip_prefix(&self.path).map_err(io::Error::other)?;
        let mirror = self.mirror();
        mirror.as_ref().map_or(Ok(()), |mirror| act(mirror, name))
    }

    /// Notes that the folder it is in has another path now.
    pub(crate) fn moved(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Where the things of the container `id` are seen, and where places for them are made.
    fn of(&self, id: &str) -> (PathBuf, PathBuf) {
        let below = format!("/proc/self/fd/{}", self.below.as_raw_fd());
        (self.path.join(id), Path::new(&below).join(id))
    }

    fn shared_volumes(&self) -> MutexGuard<'_, Volumes> {
        self.volumes.lock().expect("a panic ends the process")
    }

    /// Unmounts what the container `id` has, and the volumes that no other container uses.
    pub(crate) fn clear(&self, id: &str) -> io::Result<()> {
        let (seen, below) = self.of(id);
        let hidden = self.mirrored(&seen.join(ROOTFS), Mirror::hide);
        let cleared = unmount_below(&seen).and_then(|()| remove_places(&below));
        let mut cleared = hidden.and(cleared);
        let (seen, below) = self.of(VOLUMES);
        for name in self.shared_volumes().release(id) {
            // Whatever became of the others.
            let hidden = self.mirrored(&seen.join(&name), Mirror::hide);
            let detached = detach(&seen.join(&name), &below.join(&name));
            cleared = cleared.and(hidden).and(detached);
        }
        cleared
    }

    /// Mounts the root file system of the container `id`: what containerd says, or the folder
    /// `root` of its bundle.
    pub(crate) fn root(&self, id: &str, mounts: &[task::Mount], root: &Path) -> Result<(), Error> {
        let (seen, below) = self.of(id);
        let place = seen.join(ROOTFS);
        let failed = |what: &str, source| Error {
            what: what.into(),
            place: place.clone(),
            source,
        };
        let made = fs::create_dir_all(below.join(ROOTFS));
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
        changed.map_err(|errno| failed("its propagation", errno.into()))?;
        keep_harmless(&place).map_err(|source| failed("it without devices", source))?;
        let shown = self.mirrored(&place, |mirror, name| mirror.show(&place, name));
        shown.map_err(|source| failed("it in podvmm's jail", source))
    }

    /// Mounts the volumes of the container `id` and rewrites its mounts to what the guest has.
    /// Returns the storage that the guest is to make itself.
    pub(crate) fn volumes(&self, id: &str, spec: &mut Spec) -> Result<Vec<Storage>, Error> {
        let mut storages = Vec::new();
        let pod = spec::pod_of(id, &spec.annotations).to_owned();
        for mount in &mut spec.mounts {
            match volume(mount, &pod) {
                Volume::Guests => {}
                Volume::Shm => {
                    mount.source = format!("{SANDBOX}/shm");
                    readonly_in_guest(mount, true);
                }
                Volume::Memory(memory) => {
                    let needed = self.memory(&memory, Path::new(&mount.source));
                    if let Some(last) = needed.last() {
                        mount.source.clone_from(&last.mount_point);
                    }
                    storages.extend(needed);
                    readonly_in_guest(mount, true);
                }
                Volume::HugePages => {
                    return Err(Error {
                        what: mount.source.clone(),
                        place: PathBuf::from(&mount.destination),
                        source: io::Error::other("a volume of huge pages is not possible in a VM"),
                    });
                }
                Volume::Hosts => {
                    let bound = self.bind(mount, id).map_err(|source| Error {
                        what: mount.source.clone(),
                        place: self.path.join(VOLUMES),
                        source,
                    })?;
                    mount.source = bound.source;
                    storages.extend(bound.storage);
                    readonly_in_guest(mount, bound.is_plain);
                }
            }
        }
        Ok(storages)
    }

    /// What the guest is to make of a volume of memory, of which the container has what is in
    /// `source` on the host. The last of it is the container's.
    fn memory(&self, memory: &Memory, source: &Path) -> Vec<Storage> {
        let name = memory.name();
        let whole = memory_storage(&name, &memory.place);
        if memory.below.as_os_str().is_empty() {
            return vec![whole];
        }
        let number = self.shared_volumes().part(memory);
        let part = Storage {
            driver: "ephemeral".into(),
            source: format!("{}/{}", whole.mount_point, memory.below.display()),
            fstype: "bind".into(),
            options: vec![format!("mode={:o}", mode(source))],
            mount_point: format!("{SANDBOX}/ephemeral-parts/{number}"),
            ..Storage::default()
        };
        vec![whole, part]
    }

    /// Mounts a volume of the host's, unless it is mounted already.
    fn bind(&self, mount: &Mount, id: &str) -> io::Result<Bound> {
        let source = fs::canonicalize(&mount.source)?;
        let is_folder = fs::metadata(&source)?.is_dir();
        let key = Key::of(&source, &mount.options)?;
        let depth = readonly(&mount.options);
        let (seen, below) = self.of(VOLUMES);
        let mut volumes = self.shared_volumes();
        let (name, is_new) = volumes.acquire(&key, id, &basename(&mount.destination));
        let (place, below_place) = (seen.join(&name), below.join(&name));
        let attach = || {
            fs::create_dir_all(&below)?;
            match is_folder {
                true => fs::create_dir(&below_place)?,
                false => drop(fs::File::create_new(&below_place)?),
            }
            attach(&source, &place, &mount.options)?;
            depth.map_or(Ok(()), |depth| change_readonly(&place, depth, true))?;
            self.mirrored(&place, |mirror, name| mirror.show(&place, name))
        };
        if is_new {
            attach().inspect_err(|_| {
                volumes.forget(&name);
                // As far as it was mounted.
                let _ = self.mirrored(&place, Mirror::hide);
                let _ = detach(&place, &below_place);
            })?;
        } else if depth.is_none() && key.may_be_written() {
            // One that was read-only for all containers so far.
            change_readonly(&place, Depth::Top, false)?;
            self.mirrored(&place, |mirror, name| {
                mirror.change_readonly(name, Depth::Top, false)
            })?;
        }
        let shared = format!("{SHARED}/{VOLUMES}/{name}");
        let storage = is_folder.then(|| Storage {
            driver: "virtio-fs".into(),
            source: shared.clone(),
            fstype: "bind".into(),
            options: vec!["bind".into()],
            mount_point: format!("{SANDBOX}/volumes/{name}"),
            ..Storage::default()
        });
        let in_guest = storage.as_ref().map(|storage| storage.mount_point.clone());
        Ok(Bound {
            source: in_guest.unwrap_or(shared),
            storage,
            is_plain: key.is_plain(),
        })
    }
}

/// How the guest has a volume of the host's.
struct Bound {
    /// The volume's path in the guest.
    source: String,
    /// What the guest is to mount for the volume, if it is a folder.
    storage: Option<Storage>,
    /// Whether all of it is as read-only as its options say, and not what is mounted below it otherwise.
    is_plain: bool,
}

/// Mounts a volume for all containers that share it.
fn attach(source: &Path, place: &Path, options: &[String]) -> io::Result<()> {
    let has = |wanted: &str| options.iter().any(|option| option == wanted);
    if has("bind") {
        rustix::mount::mount_bind(source, place)?;
    } else {
        rustix::mount::mount_bind_recursive(source, place)?;
    }
    // What the host mounts there later is seen if that is wanted; never the other way.
    let propagation = if volumes::is_slave(options) {
        MountPropagationFlags::DOWNSTREAM
    } else {
        MountPropagationFlags::PRIVATE
    };
    rustix::mount::mount_change(place, propagation | MountPropagationFlags::REC)?;
    keep_harmless(place)
}

/// Unmounts a volume and removes its place, which is `below` the mount.
fn detach(seen: &Path, below: &Path) -> io::Result<()> {
    unmount_below(seen)?;
    match fs::symlink_metadata(below)?.is_dir() {
        true => fs::remove_dir(below),
        false => fs::remove_file(below),
    }
}

/// How much of a mount with these options is to be read-only.
fn readonly(options: &[String]) -> Option<Depth> {
    let has = |wanted: &str| options.iter().any(|option| option == wanted);
    match (has("rro"), has("ro")) {
        (true, _) => Some(Depth::All),
        (false, true) => Some(Depth::Top),
        (false, false) => None,
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
enum Volume {
    /// The guest's own, such as /proc.
    Guests,
    /// The memory that the pod's containers share.
    Shm,
    /// A volume of memory, or a folder in it.
    Memory(Memory),
    /// Huge pages, which a VM cannot have.
    HugePages,
    /// A file or folder of the host's.
    Hosts,
}

/// Whose `mount` is, of a container of `pod`.
fn volume(mount: &Mount, pod: &str) -> Volume {
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
    } else if mount.destination == "/dev/shm" && source.ends_with(Path::new(pod).join("shm")) {
        // What containerd makes for each pod; any other is a volume of the pod's own.
        Volume::Shm
    } else if is_of(source, HUGETLBFS) {
        Volume::HugePages
    } else if of_kernel {
        Volume::Guests
    } else if let Some(memory) = is_of(source, TMPFS).then(|| Memory::find(source)).flatten() {
        Volume::Memory(memory)
    } else {
        Volume::Hosts
    }
}

// linux/magic.h
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;

fn is_of(path: &Path, magic: i64) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == magic)
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or(0o777, |file| file.mode() & 0o7777)
}

/// Memory of the guest's for a volume that is memory of the host's.
fn memory_storage(name: &str, source: &Path) -> Storage {
    let size = rustix::fs::statvfs(source).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
    let group = fs::metadata(source).map_or(0, |file| std::os::unix::fs::MetadataExt::gid(&file));
    let mut options = vec![format!("mode={:o}", mode(source))];
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
        mount_point: format!("{SANDBOX}/ephemeral/{name}"),
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
        None => return overlay::mount(&mount.source, place, &mount.r#type, flags, &data),
    }
    if flags.contains(MountFlags::RDONLY) {
        make_readonly(place, Depth::All)?;
    }
    Ok(())
}

/// Does something in a folder, on a thread whose folder that is alone.
fn from_folder(folder: &Path, act: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    thread::scope(|scope| {
        let act = || {
            // SAFETY: it changes nothing but that this thread's folder is its own from now on.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            rustix::process::chdir(folder)?;
            act()
        };
        let thread = thread::Builder::new().name("mount".into());
        let thread = thread.spawn_scoped(scope, act)?;
        thread.join().expect("a panic ends the process")
    })
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
        // A process that has a file of the mount open keeps only that file.
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
