//! Memory that comes and goes while the guest runs.

use api::{ByteSize, MemoryConfig, Resize};
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::mem::MemHandle;

/// The host's hold on a guest's memory.
#[derive(Debug, Default)]
pub(crate) struct MemoryHandles {
    pub(crate) mem: Option<MemHandle>,
    pub(crate) balloon: Option<BalloonHandle>,
}

impl MemoryHandles {
    /// Why `sizes` cannot be had, if so.
    pub(crate) fn refusal(&self, memory: &MemoryConfig, sizes: Resize) -> Option<String> {
        let size = memory.size.bytes();
        let most = size + memory.hotplug_size.0;
        let balloon = sizes.desired_balloon.map_or(0, |ByteSize(bytes)| bytes);
        match (sizes.desired_ram, &self.mem) {
            (Some(ByteSize(ram)), None) if ram != size => Some(format!(
                "desired_ram: {ram} bytes: this VM has {size} and cannot grow"
            )),
            (Some(ByteSize(ram)), Some(_)) if !(size..=most).contains(&ram) => Some(format!(
                "desired_ram: {ram} bytes: this VM can have {size} to {most}"
            )),
            _ if self.balloon.is_none() && balloon > 0 => {
                Some("desired_balloon: this VM has no balloon".into())
            }
            _ => (balloon > most)
                .then(|| format!("desired_balloon: {balloon} bytes: this VM has {most} at most")),
        }
    }

    /// Tells the guest. It follows when it can.
    pub(crate) fn request(&self, memory: &MemoryConfig, sizes: Resize) -> Result<(), String> {
        if let (Some(mem), Some(ByteSize(ram))) = (&self.mem, sizes.desired_ram) {
            mem.request(ram.saturating_sub(memory.size.bytes()))
                .map_err(|error| format!("desired_ram: {error}"))?;
        }
        if let (Some(balloon), Some(ByteSize(bytes))) = (&self.balloon, sizes.desired_balloon) {
            balloon
                .set_target(bytes)
                .map_err(|error| format!("desired_balloon: {error}"))?;
        }
        Ok(())
    }

    /// What the guest has of `size` bytes at boot, what was plugged and what the balloon holds.
    pub(crate) fn actual(&self, size: u64) -> u64 {
        let plugged = self.mem.as_ref().map_or(0, |mem| mem.sizes().plugged);
        let held = self.balloon.as_ref().map_or(0, BalloonHandle::actual);
        (size + plugged).saturating_sub(held)
    }
}
