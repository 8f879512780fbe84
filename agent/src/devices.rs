//! Devices of the VM for a container.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use protocol::agent::messages::Device;
use protocol::agent::oci::{Linux, LinuxDevice};
use protocol::ttrpc::{Code, Status};

use crate::poll;

/// How the host may name devices.
pub(crate) const KINDS: [&str; 1] = ["mmioblk"];

/// How long a plugged device is waited for: as long as the Kata agent does.
const DEADLINE: Duration = Duration::from_secs(3);

/// Waits for a device's node.
pub(crate) fn wait_for(path: &str) -> Result<fs::Metadata, Status> {
    let found = poll::until(DEADLINE, || fs::metadata(path).ok());
    found.ok_or_else(|| Status::new(Code::NotFound, format!("there is no device {path}")))
}

/// Gives the container these devices, by the numbers they have here: the specification has those of
/// the host, if it knows of the device at all.
pub(crate) fn add(linux: &mut Linux, devices: &[Device]) -> Result<(), Status> {
    for device in devices {
        if !KINDS.contains(&device.r#type.as_str()) {
            let why = format!(
                "device {}: there are no devices of type {:?}",
                device.container_path, device.r#type
            );
            return Err(Status::new(Code::Unimplemented, why));
        }
        let node = wait_for(&device.vm_path)?;
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
    Ok(())
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
        add(&mut linux, &devices).unwrap();
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
        let mut refused =
            |kind, path| add(&mut linux, &[device(kind, path, "/dev/x")]).unwrap_err();
        assert_eq!(refused("blk", "/dev/null").code, Code::Unimplemented);
        assert_eq!(
            refused("mmioblk", "/proc/self/status").code,
            Code::InvalidArgument
        );
        let missing = refused("mmioblk", "/dev/no-such-device");
        assert_eq!(missing.message, "there is no device /dev/no-such-device");
    }
}
