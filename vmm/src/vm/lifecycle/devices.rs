//! Devices that come and go: of a definition while there is no guest, and with one on its PCI bus.

use std::time::Duration;

use api::{Addition, Answer, ApiError, DiskSize, Plugged, VmConfig};
use serde_json::json;

use super::blame::{contradiction, not_resized, refusal};
use super::{Lifecycle, Phase};
use crate::build;

/// How often to look whether a driver has let go of a device that is to go.
const LOOK: Duration = Duration::from_millis(50);

impl Lifecycle {
    /// Adds a device to what the VM is defined as, and to the machine if there is one.
    pub(super) fn add(&mut self, device: Addition) -> Result<Answer, ApiError> {
        self.takes_devices("add a device")?;
        let (mut more, machine) = match &mut self.phase {
            Phase::Created(config) | Phase::Shutdown(config) => (config.clone(), None),
            Phase::Running(config, machine) | Phase::Paused(config, machine) => {
                if let (Addition::Vsock(_), Some(_)) = (&device, &config.vsock) {
                    let why = "the VM has a vsock device, and a guest takes no second one";
                    return Err(ApiError::Impossible(vec![why.into()]));
                }
                (config.clone(), Some(machine))
            }
            Phase::None | Phase::Saving(_) => unreachable!("it takes no devices"),
        };
        let id = more.add(device);
        more.check().map_err(contradiction)?;
        let place = match machine {
            None => None,
            Some(machine) => Some(build::plug(&more, &id, machine).map_err(refusal)?),
        };
        self.redefine(more);
        let Some(place) = place else {
            return Ok(Answer::Done);
        };
        let bdf = format!("0000:00:{place:02x}.0");
        let properties = json!({ "id": id, "bdf": bdf });
        self.around.events.vm("device-added", properties);
        Ok(Answer::Plugged(Plugged { id, bdf }))
    }

    /// Takes a device from what the VM is defined as, and from the machine if there is one, as soon as the guest
    /// has no driver for it.
    pub(super) fn remove(&mut self, id: &str) -> Result<(), ApiError> {
        self.takes_devices("vm.remove-device")?;
        let mut less = self.phase.config().cloned().map(Box::new);
        let Some(less) = less.take_if(|config| config.remove(id)) else {
            return Err(ApiError::NoSuchDevice(id.into()));
        };
        let (Phase::Running(_, machine) | Phase::Paused(_, machine)) = &mut self.phase else {
            self.redefine(less);
            return Ok(());
        };
        if machine.unplug(id) {
            self.left(id, true);
        } else {
            self.around.events.vm("device-leaving", json!({ "id": id }));
        }
        Ok(())
    }

    /// Whether devices can come and go now.
    fn takes_devices(&self, request: &'static str) -> Result<(), ApiError> {
        match &self.phase {
            Phase::Created(_) | Phase::Shutdown(_) => Ok(()),
            Phase::Running(_, machine) | Phase::Paused(_, machine) if machine.takes_devices() => {
                Ok(())
            }
            // The guest reads on its kernel's command line where they are.
            Phase::Running(..) | Phase::Paused(..) => {
                Err(self.wrong(request, "Created or Shutdown, unless its transport is pci"))
            }
            Phase::None | Phase::Saving(_) => Err(self.wrong(request, "created")),
        }
    }

    /// Has the VM be defined otherwise.
    fn redefine(&mut self, new: Box<VmConfig>) {
        match &mut self.phase {
            Phase::Created(config)
            | Phase::Running(config, _)
            | Phase::Paused(config, _)
            | Phase::Shutdown(config) => *config = new,
            Phase::None | Phase::Saving(_) => {}
        }
    }

    /// Makes a disk of the machine's longer or shorter.
    pub(super) fn resize_disk(&mut self, size: &DiskSize) -> Result<(), ApiError> {
        let (Phase::Running(_, machine) | Phase::Paused(_, machine)) = &self.phase else {
            return Err(self.wrong("vm.resize-disk", "Running or Paused"));
        };
        let resized = machine.resize_device(&size.id, size.desired_size.0);
        resized
            .ok_or_else(|| ApiError::NoSuchDevice(size.id.clone()))?
            .map_err(not_resized)?;
        self.around.events.vm("disk-resized", json!(size));
        Ok(())
    }

    /// Sees to devices that the guest should give up. Returns when to do so again, if there are more.
    pub(super) fn settle_devices(&mut self) -> Option<Duration> {
        let Phase::Running(_, machine) = &mut self.phase else {
            return None;
        };
        let settled = machine.settle_devices();
        let more = !machine.leaving().is_empty();
        for (id, is_gone) in settled {
            self.left(&id, is_gone);
        }
        more.then_some(LOOK)
    }

    /// A device that was to go is gone, or stays.
    pub(super) fn left(&mut self, id: &str, is_gone: bool) {
        if !is_gone {
            log::warn!("the guest keeps {id}, which was to be removed: it stays");
        } else if let Some(mut less) = self.phase.config().cloned().map(Box::new) {
            less.remove(id);
            self.redefine(less);
        }
        let event = if is_gone {
            "device-removed"
        } else {
            "device-kept"
        };
        self.around.events.vm(event, json!({ "id": id }));
    }
}
