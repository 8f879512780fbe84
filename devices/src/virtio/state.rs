//! What a snapshot keeps of a virtio device, so that another one made from the same configuration
//! can go on where it was.
//!
//! All of it may come from a file, so none of it is believed: a restored device checks a state as
//! it checks a driver.

use serde::{Deserialize, Serialize};

use super::ActivateError;
use super::balloon::BalloonState;
use super::console::ConsoleState;
use super::fs::FsState;
use super::interrupt::InterruptState;
use super::mem::MemState;
use super::negotiation::NegotiationState;
use super::net::NetState;
use super::queue::RingState;
use super::setup::QueueSetup;
use super::vsock::VsockState;
use crate::pci::EntryState;

/// A device behind its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(super) device_features_page: u32,
    pub(super) driver_features_page: u32,
    pub(super) selected_queue: u32,
    pub(super) negotiation: NegotiationState,
    pub(super) interrupt: InterruptState,
    pub(super) queues: Vec<QueueSetup>,
    /// How far the queues are. None unless handlers serve them.
    pub(super) rings: Option<Vec<RingState>>,
    pub(super) device: DeviceState,
    /// What virtio-pci has besides. None of virtio-mmio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pci: Option<PciState>,
}

/// What a device on a PCI bus has besides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PciState {
    /// Its number on the bus.
    pub(super) device: u8,
    /// Configuration space.
    pub(super) registers: Vec<u32>,
    /// The vectors for the configuration and for each queue.
    pub(super) vectors: (u16, Vec<u16>),
    pub(super) table: Vec<EntryState>,
}

impl TransportState {
    /// What the device adds to it.
    pub fn device(&self) -> &DeviceState {
        &self.device
    }

    /// Which device of a PCI bus it was, if it was on one.
    pub fn place(&self) -> Option<u8> {
        Some(self.pci.as_ref()?.device)
    }
}

/// What a device adds to that of its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    Balloon(BalloonState),
    Blk,
    Console(ConsoleState),
    Fs(FsState),
    Mem(MemState),
    Net(NetState),
    Rng,
    Vsock(VsockState),
}

/// Why a state does not fit the device that is to take it over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("it is of another kind of device")]
    Kind,
    #[error("it is of a device on another transport")]
    Transport,
    #[error("no driver gets a PCI function of this kind to its configuration space or vectors")]
    Pci,
    #[error("it has {found} queues, the device has {expected}")]
    Queues { expected: usize, found: usize },
    #[error("the largest size of queue {index} is {found}, the device's is {expected}")]
    QueueSize {
        index: usize,
        expected: u16,
        found: u16,
    },
    #[error("its driver uses features that the device does not offer: {0:#x}")]
    Features(u64),
    #[error("no driver gets a device to status {0:#x}")]
    Status(u32),
    #[error("its queues are served although its driver is not ready")]
    NotReady,
    #[error("its queues in use are not those its driver set up")]
    RingSet,
    #[error("{0}")]
    Device(String),
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{Buffer, Guest, LIVE};

    fn state() -> TransportState {
        Guest::live(Rng::new()).transport.state()
    }

    fn refusal(spoil: impl FnOnce(&mut TransportState)) -> String {
        let mut state = state();
        spoil(&mut state);
        let mut guest = Guest::new(Rng::new());
        guest.transport.restore(state).unwrap_err().to_string()
    }

    #[test]
    fn a_state_survives_being_written_down() {
        let state = state();
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(
            serde_json::from_str::<TransportState>(&text).unwrap(),
            state
        );
    }

    #[test]
    fn what_was_queued_while_paused_is_served_after_the_restore() {
        let mut guest = Guest::live(Rng::new());
        guest.transport.pause().unwrap();
        guest.add(0, &[Buffer::In(8)]).unwrap();
        let mut guest = guest.move_to(Rng::new);
        assert_eq!(guest.take(0), None);
        guest.transport.resume().unwrap();
        guest.settle();
        assert_eq!(guest.take(0).unwrap().len(), 8);
    }

    #[test]
    fn an_interrupt_the_driver_has_not_seen_comes_again_after_the_restore() {
        let mut guest = Guest::live(Rng::new());
        guest.request(0, &[Buffer::In(8)]).unwrap();
        let guest = guest.move_to(Rng::new);
        let mut guest = guest;
        guest.transport.resume().unwrap();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.status(), LIVE);
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused() {
        let queue = QueueSetup::new(8);
        assert_eq!(
            refusal(|state| state.device = DeviceState::Blk),
            "it is of another kind of device"
        );
        assert_eq!(
            refusal(|state| state.queues.clear()),
            "it has 0 queues, the device has 1"
        );
        assert_eq!(
            refusal(|state| state.queues[0] = queue),
            "the largest size of queue 0 is 8, the device's is 16"
        );
        assert_eq!(
            refusal(|state| state.rings = Some(Vec::new())),
            "its queues in use are not those its driver set up"
        );
        let idle = Guest::new(Rng::new()).transport.state();
        assert_eq!(
            refusal(|state| state.negotiation = idle.negotiation),
            "its queues are served although its driver is not ready"
        );
    }

    #[test]
    fn a_status_or_features_no_driver_could_reach_are_refused() {
        let json = serde_json::to_value(state()).unwrap();
        let restore = |field: &str, value: u64| {
            let mut json = json.clone();
            json["negotiation"][field] = value.into();
            let state = serde_json::from_value(json).unwrap();
            let mut guest = Guest::new(Rng::new());
            guest.transport.restore(state).unwrap_err().to_string()
        };
        assert_eq!(
            restore("status", 4),
            "no driver gets a device to status 0x4"
        );
        assert_eq!(
            restore("accepted", 1 << 32 | 1 << 50),
            "its driver uses features that the device does not offer: 0x4000000000000"
        );
    }

    #[test]
    fn a_queue_outside_ram_is_refused() {
        let mut json = serde_json::to_value(state()).unwrap();
        json["queues"][0]["device"] = u64::MAX.into();
        let state = serde_json::from_value(json).unwrap();
        let mut guest = Guest::new(Rng::new());
        assert_eq!(
            guest.transport.restore(state).unwrap_err().to_string(),
            "queue 0 is not set up as the driver must"
        );
    }
}
