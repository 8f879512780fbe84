//! What is mounted in the guest for containers to share.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use agent::protocol::agent::Storage;
use agent::ttrpc::{Code, Status};
use rustix::mount::{MountFlags, UnmountFlags};

/// How the host may ask for storage.
pub(crate) const DRIVERS: [&str; 5] = ["virtio-fs", "ephemeral", "local", "overlayfs", "mmioblk"];

/// Mounted storage by place, and how many need it.
#[derive(Debug, Default)]
pub(crate) struct Storages(Mutex<HashMap<String, usize>>);

impl Storages {
    fn places(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().expect("a panic ends the process")
    }

    /// Mounts it, unless it is.
    pub(crate) fn add(&self, storage: &Storage) -> Result<(), Status> {
        let mut places = self.places();
        if let Some(count) = places.get_mut(&storage.mount_point) {
            *count += 1;
            return Ok(());
        }
        if !DRIVERS.contains(&storage.driver.as_str()) {
            let why = format!("there is no storage driver {}", storage.driver);
            return Err(Status::new(Code::InvalidArgument, why));
        }
        mount(storage).map_err(|error| {
            let what = format!(
                "mount {} on {}: {error}",
                storage.source, storage.mount_point
            );
            Status::new(Code::Internal, what)
        })?;
        places.insert(storage.mount_point.clone(), 1);
        Ok(())
    }

    /// Unmounts it once nobody needs it.
    pub(crate) fn remove(&self, place: &str) {
        let mut places = self.places();
        let Some(count) = places.get_mut(place) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            places.remove(place);
            // A folder made for a driver that mounts nothing is left as it is.
            let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
        }
    }
}

fn mount(storage: &Storage) -> io::Result<()> {
    let place = Path::new(&storage.mount_point);
    fs::create_dir_all(place)?;
    let group = storage.fs_group.as_ref().map(|group| group.group_id);
    if storage.driver != "local" {
        let mut flags = MountFlags::empty();
        let mut data = Vec::new();
        for option in &storage.options {
            match option.as_str() {
                "ro" => flags |= MountFlags::RDONLY,
                "rw" | "defaults" => {}
                "nosuid" => flags |= MountFlags::NOSUID,
                "nodev" => flags |= MountFlags::NODEV,
                "noexec" => flags |= MountFlags::NOEXEC,
                option if option.starts_with("fsgid=") => {}
                other => data.push(other),
            }
        }
        let data = CString::new(data.join(","))?;
        rustix::mount::mount(&storage.source, place, &storage.fstype, flags, Some(&*data))?;
    }
    let asked = storage
        .options
        .iter()
        .find_map(|option| option.strip_prefix("fsgid="));
    let asked = asked.and_then(|gid| gid.parse().ok());
    if let Some(gid) = group.or(asked) {
        use std::os::unix::fs::{PermissionsExt, chown};
        chown(place, None, Some(gid))?;
        fs::set_permissions(place, fs::Permissions::from_mode(0o2775))?;
    }
    let mode = storage
        .options
        .iter()
        .find_map(|option| option.strip_prefix("mode="));
    if storage.driver == "local"
        && let Some(mode) = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok())
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(place, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}
