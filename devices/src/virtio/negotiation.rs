//! How far driver and device have come with each other.
//!
//! ```text
//!        ACKNOWLEDGE     DRIVER        FEATURES_OK      DRIVER_OK
//!  reset ──────────▶ ● ─────────▶ ● ──────────────▶ ● ────────────▶ live
//!    ▲                             writes features    sets up queues
//!    └────────────────────── 0 from anywhere ◀─────────────────────┘
//! ```
//!
//! (virtio 1.3 §2.1 Device Status Field, §3.1.1 Device Initialization.) FAILED stops the way at
//! any point; DEVICE_NEEDS_RESET belongs to the device and is kept by [`super::Interrupt`].

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};

use super::StateError;

/// What a write to the status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The write asks for nothing beyond what the status now says.
    Stay,
    /// The driver is ready; the queues come alive.
    Activate,
    Reset,
}

/// The driver's status bits and the features it accepts.
#[derive(Clone, Debug)]
pub(super) struct Negotiation {
    status: u32,
    offered: u64,
    accepted: u64,
}

/// Where driver and device are, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NegotiationState {
    status: u32,
    accepted: u64,
}

/// Each bit and those that must be set before it, in the order they are to be set.
const ORDER: [(u32, u32); 4] = [
    (VIRTIO_CONFIG_S_ACKNOWLEDGE, 0),
    (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_ACKNOWLEDGE),
    (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER),
    (VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK),
];

impl Negotiation {
    pub(super) fn new(offered: u64) -> Self {
        Self {
            status: 0,
            offered,
            accepted: 0,
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status
    }

    /// The features both sides agreed on.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// 32 of the offered feature bits; pages beyond the second are empty.
    pub(super) fn offered_page(&self, page: u32) -> u32 {
        page_of(self.offered, page)
    }

    /// 32 of the bits that the driver has accepted so far.
    pub(super) fn accepted_page(&self, page: u32) -> u32 {
        page_of(self.accepted, page)
    }

    /// The driver accepts features, which it may between DRIVER and FEATURES_OK. False if not.
    pub(super) fn accept_page(&mut self, page: u32, bits: u32) -> bool {
        let open = self.has(VIRTIO_CONFIG_S_DRIVER)
            && !self.has(VIRTIO_CONFIG_S_FEATURES_OK)
            && !self.has(VIRTIO_CONFIG_S_FAILED);
        if !open || page > 1 {
            // Linux writes the second page even of a driver that accepts nothing there, and never
            // one after it.
            return open && bits == 0;
        }
        let shift = page * 32;
        self.accepted &= !(u64::from(u32::MAX) << shift);
        self.accepted |= u64::from(bits) << shift;
        true
    }

    /// Whether the driver may set up queues now.
    pub(super) fn sets_up_queues(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK)
            && !self.is_live()
            && !self.has(VIRTIO_CONFIG_S_FAILED)
    }

    /// Whether the driver has found the device, as it must before it writes configuration.
    pub(super) fn has_driver(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER)
    }

    /// Whether the driver has said that it is ready.
    pub(super) fn is_live(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK)
    }

    /// The driver writes Status. Bits that are set before their turn are ignored; the driver
    /// learns that by reading the status back.
    pub(super) fn write_status(&mut self, value: u32) -> Step {
        if value == 0 {
            return Step::Reset;
        }
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        // "The driver MUST NOT clear a device status bit" (virtio 1.3 §2.1.1).
        if self.has(VIRTIO_CONFIG_S_FAILED) || self.status & !value != 0 {
            return Step::Stay;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            return Step::Stay;
        }
        let was_live = self.is_live();
        for (bit, needed) in ORDER {
            if value & bit != 0 && self.has(needed) && self.allows(bit) {
                self.status |= bit;
            }
        }
        if self.is_live() && !was_live {
            Step::Activate
        } else {
            Step::Stay
        }
    }

    pub(super) fn state(&self) -> NegotiationState {
        NegotiationState {
            status: self.status,
            accepted: self.accepted,
        }
    }

    /// Takes over a state that some driver could have brought about.
    pub(super) fn restore(&mut self, state: NegotiationState) -> Result<(), StateError> {
        let NegotiationState { status, accepted } = state;
        let known = ORDER
            .iter()
            .fold(VIRTIO_CONFIG_S_FAILED, |all, (bit, _)| all | bit);
        let in_order = ORDER
            .iter()
            .all(|(bit, needed)| status & bit == 0 || status & needed == *needed);
        if status & !known != 0 || !in_order {
            return Err(StateError::Status(status));
        }
        let restored = Self {
            status,
            accepted,
            ..*self
        };
        // Until FEATURES_OK a driver may have written anything.
        if restored.has(VIRTIO_CONFIG_S_FEATURES_OK)
            && !restored.allows(VIRTIO_CONFIG_S_FEATURES_OK)
        {
            return Err(StateError::Features(accepted & !self.offered));
        }
        *self = restored;
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        self.status = 0;
        self.accepted = 0;
    }

    /// A device that cannot do with what the driver accepts "MUST fail to set the FEATURES_OK
    /// device status bit when the driver writes it" (virtio 1.3 §2.2.2). Here every accepted bit
    /// must have been offered, and VERSION_1 be among them, for there is no legacy interface.
    fn allows(&self, bit: u32) -> bool {
        bit != VIRTIO_CONFIG_S_FEATURES_OK
            || (self.accepted & !self.offered == 0
                && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0)
    }

    fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }
}

fn page_of(features: u64, page: u32) -> u32 {
    let bytes = features.to_le_bytes();
    match page {
        0 => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        1 => u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 0b110;

    fn at(status: u32) -> Negotiation {
        Negotiation {
            status,
            offered: OFFERED,
            accepted: 1 << VIRTIO_F_VERSION_1,
        }
    }

    #[test]
    fn the_usual_way_ends_live() {
        let mut way = Negotiation::new(OFFERED);
        assert_eq!(way.write_status(1), Step::Stay);
        assert_eq!(way.write_status(3), Step::Stay);
        assert!(way.accept_page(0, 0b100));
        assert!(way.accept_page(1, 1));
        assert_eq!(way.write_status(0xb), Step::Stay);
        assert!(way.sets_up_queues());
        assert_eq!(way.write_status(0xf), Step::Activate);
        assert_eq!((way.status(), way.accepted()), (0xf, 1 << 32 | 0b100));
        assert_eq!(way.write_status(0xf), Step::Stay);
        assert_eq!(way.write_status(0), Step::Reset);
    }

    #[test]
    fn a_bit_before_its_turn_is_ignored() {
        let mut way = at(0);
        assert_eq!(way.write_status(0b1110), Step::Stay);
        assert_eq!(way.status(), 0);
        let mut way = at(3);
        assert_eq!(way.write_status(7), Step::Stay);
        assert_eq!(way.status(), 3);
    }

    #[test]
    fn a_feature_that_was_not_offered_refuses_features_ok() {
        let mut way = at(3);
        assert!(way.accept_page(0, 1));
        way.write_status(0xb);
        assert_eq!(way.status(), 3);
        assert!(way.accept_page(0, 0));
        way.write_status(0xb);
        assert_eq!(way.status(), 0xb);
    }

    #[test]
    fn a_legacy_driver_is_refused() {
        let mut way = at(3);
        assert!(way.accept_page(1, 0));
        way.write_status(0xb);
        assert_eq!(way.status(), 3);
    }

    #[test]
    fn features_change_only_between_driver_and_features_ok() {
        assert!(!at(1).accept_page(0, 0b10));
        assert!(!at(0xb).accept_page(0, 0b10));
        assert!(!at(0x83).accept_page(0, 0b10));
        assert!(!at(3).accept_page(2, 1));
        assert!(at(3).accept_page(2, 0));
    }

    #[test]
    fn status_bits_are_never_cleared_but_by_reset() {
        let mut way = at(0xb);
        assert_eq!(way.write_status(0x6), Step::Stay);
        assert_eq!(way.status(), 0xb);
    }

    #[test]
    fn after_failed_only_reset_helps() {
        let mut way = at(0xb);
        way.write_status(0x8b);
        assert_eq!(way.write_status(0x8f), Step::Stay);
        assert_eq!(way.status(), 0x8b);
        assert_eq!(way.write_status(0), Step::Reset);
    }

    #[test]
    fn a_driver_may_write_back_needs_reset() {
        assert_eq!(at(0xb).write_status(0x4f), Step::Activate);
    }

    #[test]
    fn features_beyond_64_are_empty() {
        assert_eq!(at(0).offered_page(0), 0b110);
        assert_eq!(at(0).offered_page(1), 1);
        assert_eq!(at(0).offered_page(2), 0);
        assert_eq!(at(0).offered_page(u32::MAX), 0);
    }
}
