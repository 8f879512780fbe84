//! Devices of the VM for a container.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use protocol::agent::messages::Device;
use protocol::agent::oci::{Linux, LinuxDevice};
use protocol::ttrpc::{Code, Status};

use crate::poll;

/// How the host may name devices.
pub(crate) const KINDS: [&str; 2] = [BLK, "mmioblk"];
/// A disk by its place on the PCI bus.
pub(crate) const BLK: &str = "blk";
/// Where the kernel tells of its PCI bus.
const PCI: &str = "/sys/bus/pci";

/// How long a plugged device is waited for: as long as the Kata agent does.
const DEADLINE: Duration = Duration::from_secs(3);

/// Waits for a device's node.
pub(crate) fn wait_for(path: &str) -> Result<fs::Metadata, Status> {
    let found = poll::until(DEADLINE, || fs::metadata(path).ok());
    found.ok_or_else(|| Status::new(Code::NotFound, format!("there is no device {path}")))
}

/// Disks on the PCI bus that containers use, by their places. A clone is the same.
#[derive(Clone, Debug)]
pub(crate) struct Disks {
    bus: PathBuf,
    users: Arc<Mutex<HashMap<u8, usize>>>,
}

/// A disk that is used. The kernel lets go of it when the last one is dropped, so that the host can take it away.
#[derive(Debug)]
pub(crate) struct Disk {
    disks: Disks,
    device: u8,
    /// Its node.
    pub(crate) path: String,
}

impl Default for Disks {
    fn default() -> Self {
        Self::of(PCI.as_ref())
    }
}

impl Disks {
    fn of(bus: &Path) -> Self {
        Self {
            bus: bus.into(),
            users: Arc::default(),
        }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<u8, usize>> {
        self.users.lock().expect("a panic ends the process")
    }

    /// Waits for the disk at a place that Kata's runtime writes: the number of the device on bus 0, as `05` or
    /// `05.0`. Places behind bridges have more of them.
    pub(crate) fn find(&self, place: &str) -> Result<Disk, Status> {
        let number = place.strip_suffix(".0").unwrap_or(place);
        let device = match number.len() {
            2 => u8::from_str_radix(number, 16).ok(),
            _ => None,
        };
        let device = device.filter(|device| *device < 32).ok_or_else(|| {
            let why = format!("{place:?} is no device of PCI bus 0, such as 05");
            Status::new(Code::InvalidArgument, why)
        })?;
        let mut users = self.users();
        // A kernel without ACPI looks for what came only when it is told to.
        let _ = fs::write(self.bus.join("rescan"), "1");
        let path = poll::until(DEADLINE, || node_of(&self.folder(device)));
        let path = path.ok_or_else(|| {
            let why = format!("there is no disk on PCI bus 0 at {place}");
            Status::new(Code::NotFound, why)
        })?;
        *users.entry(device).or_default() += 1;
        Ok(Disk {
            disks: self.clone(),
            device,
            path,
        })
    }

    fn folder(&self, device: u8) -> PathBuf {
        self.bus.join(format!("devices/0000:00:{device:02x}.0"))
    }
}

/// The node of the disk that is the PCI device of this folder, once the kernel has made it.
fn node_of(device: &Path) -> Option<String> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let blocks = entries(device).map(|entry| entry.path().join("block"));
    let name = blocks
        .flat_map(|folder| entries(&folder))
        .next()?
        .file_name();
    let node = Path::new("/dev").join(name);
    node.exists().then(|| node.to_str().map(String::from))?
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut users = self.disks.users();
        if let Some(count) = users.get_mut(&self.device) {
            *count -= 1;
            if *count == 0 {
                users.remove(&self.device);
                // The host waits for it, and gives up in the end.
                let _ = fs::write(self.disks.folder(self.device).join("remove"), "1");
            }
        }
    }
}

/// Gives the container these devices, by the numbers they have here: the specification has those of
/// the host, if it knows of the device at all. Returns the disks among them, for as long as it uses them.
pub(crate) fn add(
    linux: &mut Linux,
    devices: &[Device],
    disks: &Disks,
) -> Result<Vec<Disk>, Status> {
    let mut used = Vec::new();
    for device in devices {
        if !KINDS.contains(&device.r#type.as_str()) {
            let why = format!(
                "device {}: there are no devices of type {:?}",
                device.container_path, device.r#type
            );
            return Err(Status::new(Code::Unimplemented, why));
        }
        let node = if device.r#type == BLK {
            let disk = disks.find(&device.id)?;
            let node = wait_for(&disk.path)?;
            used.push(disk);
            node
        } else {
            wait_for(&device.vm_path)?
        };
        let kind = match node.file_type() {
            kind if kind.is_block_device() => "b",
            kind if kind.is_char_device() => "c",
            _ => {
                let why = format!("{} is no device", device.vm_path);
                return Err(Status::new(Code::InvalidArgument, why));
            }
        };
        place(linux, &device.container_path, kind, node.rdev());
    }
    Ok(used)
}

fn place(linux: &mut Linux, path: &str, kind: &str, number: u64) {
    let found = linux.devices.iter().position(|device| device.path == path);
    let index = found.unwrap_or_else(|| {
        linux.devices.push(LinuxDevice {
            path: path.into(),
            file_mode: 0o660,
            ..LinuxDevice::default()
        });
        linux.devices.len() - 1
    });
    let device = &mut linux.devices[index];
    device.r#type = kind.into();
    device.major = rustix::fs::major(number).into();
    device.minor = rustix::fs::minor(number).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: &str, vm_path: &str, container_path: &str) -> Device {
        Device {
            r#type: kind.into(),
            vm_path: vm_path.into(),
            container_path: container_path.into(),
            ..Device::default()
        }
    }

    #[test]
    fn a_device_has_the_numbers_it_has_here() {
        let mut linux = Linux {
            devices: vec![LinuxDevice {
                path: "/dev/data".into(),
                r#type: "b".into(),
                major: 253,
                minor: 77,
                file_mode: 0o600,
                ..LinuxDevice::default()
            }],
            ..Linux::default()
        };
        let devices = [
            device("mmioblk", "/dev/null", "/dev/data"),
            device("mmioblk", "/dev/zero", "/dev/more"),
        ];
        add(&mut linux, &devices, &Disks::default()).unwrap();
        let seen: Vec<_> = linux
            .devices
            .iter()
            .map(|it| (it.path.as_str(), it.major, it.minor, it.file_mode))
            .collect();
        assert_eq!(
            seen,
            [("/dev/data", 1, 3, 0o600), ("/dev/more", 1, 5, 0o660)]
        );
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let mut linux = Linux::default();
        let disks = Disks::default();
        let mut refused =
            |kind, path| add(&mut linux, &[device(kind, path, "/dev/x")], &disks).unwrap_err();
        assert_eq!(refused("scsi", "/dev/null").code, Code::Unimplemented);
        assert_eq!(refused("blk", "/dev/null").code, Code::InvalidArgument);
        assert_eq!(
            refused("mmioblk", "/proc/self/status").code,
            Code::InvalidArgument
        );
        let missing = refused("mmioblk", "/dev/no-such-device");
        assert_eq!(missing.message, "there is no device /dev/no-such-device");
    }

    /// A bus with the device 5, which is the disk `null`, or none yet.
    fn bus() -> (tempfile::TempDir, Disks) {
        let bus = tempfile::tempdir().unwrap();
        fs::create_dir_all(bus.path().join("devices/0000:00:05.0/virtio3/block/null")).unwrap();
        fs::create_dir_all(bus.path().join("devices/0000:00:06.0/virtio4/net/eth0")).unwrap();
        let disks = Disks::of(bus.path());
        (bus, disks)
    }

    #[test]
    fn a_disk_is_found_by_its_place_and_let_go_of_with_its_last_user() {
        let (bus, disks) = bus();
        let removed = || bus.path().join("devices/0000:00:05.0/remove").exists();
        let first = disks.find("05").unwrap();
        assert_eq!(first.path, "/dev/null");
        assert_eq!(fs::read(bus.path().join("rescan")).unwrap(), b"1");
        let mut linux = Linux::default();
        let of_a_container = Device {
            id: "05.0".into(),
            ..device("blk", "", "/dev/data")
        };
        let second = add(&mut linux, &[of_a_container], &disks).unwrap();
        assert_eq!((linux.devices[0].major, linux.devices[0].minor), (1, 3));
        drop(first);
        assert!(!removed());
        drop(second);
        assert!(removed());
    }

    #[test]
    fn a_place_without_a_disk_is_said() {
        let (_bus, disks) = bus();
        for place in [
            "", "5", "005", "zz", "20", "05.1", "02/01", "../05", "/dev/vda",
        ] {
            assert_eq!(disks.find(place).unwrap_err().code, Code::InvalidArgument);
        }
        let none = disks.find("06").unwrap_err();
        assert_eq!(none.message, "there is no disk on PCI bus 0 at 06");
    }
}
