//! What a driver reaches by the registers of any transport: a [`Session`], and the three registers that
//! select what others mean.

use crate::virtio::session::Session;
use crate::virtio::setup::{Area, Half, QueueSetup};
use crate::virtio::{StateError, TransportState};

#[derive(Debug)]
pub(super) struct Controls {
    pub(super) session: Session,
    pub(super) device_features_page: u32,
    pub(super) driver_features_page: u32,
    pub(super) selected_queue: u32,
}

impl Controls {
    pub(super) fn new(session: Session) -> Self {
        Self {
            session,
            device_features_page: 0,
            driver_features_page: 0,
            selected_queue: 0,
        }
    }

    /// Pauses the device and says all that another one needs to go on in its place.
    pub(super) fn state(&mut self) -> TransportState {
        let (device, rings) = self.session.state();
        TransportState {
            device_features_page: self.device_features_page,
            driver_features_page: self.driver_features_page,
            selected_queue: self.selected_queue,
            negotiation: self.session.negotiation.state(),
            interrupt: self.session.interrupt.state(),
            queues: self.session.queues.clone(),
            rings,
            device,
            pci: None,
        }
    }

    /// Takes over all of it but what a transport has added.
    pub(super) fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        let TransportState {
            device_features_page,
            driver_features_page,
            selected_queue,
            negotiation,
            interrupt,
            queues,
            rings,
            device,
            pci,
        } = state;
        if pci.is_some() {
            return Err(StateError::Transport);
        }
        self.device_features_page = device_features_page;
        self.driver_features_page = driver_features_page;
        self.selected_queue = selected_queue;
        self.session.negotiation.restore(negotiation)?;
        self.session.interrupt.restore(interrupt);
        self.session.restore(queues, rings, device)
    }

    /// The selected 32 of the features that the device offers.
    pub(super) fn offered_features(&self) -> u32 {
        let page = self.device_features_page;
        self.session.negotiation.offered_page(page)
    }

    /// The driver accepts the selected 32 features. False if it may not now.
    pub(super) fn accept_features(&mut self, bits: u32) -> bool {
        let page = self.driver_features_page;
        self.session.negotiation.accept_page(page, bits)
    }

    /// The selected queue, if there is one.
    pub(super) fn queue(&mut self) -> Option<&mut QueueSetup> {
        let index = usize::try_from(self.selected_queue).ok()?;
        self.session.queues.get_mut(index)
    }

    /// Sets the selected queue up, if the driver may do so now: false if not. While a queue is ready its
    /// registers stand still.
    pub(super) fn set_up(&mut self, set: impl FnOnce(&mut QueueSetup)) -> bool {
        if !self.session.negotiation.sets_up_queues() {
            return false;
        }
        self.queue().filter(|queue| !queue.ready).map(set).is_some()
    }

    pub(super) fn set_address(&mut self, area: Area, half: Half, value: u32) -> bool {
        self.set_up(|queue| queue.set_address(area, half, value))
    }

    /// A queue can be unready again until DRIVER_OK. After that only a device reset stops it, for
    /// want of VIRTIO_F_RING_RESET.
    pub(super) fn write_ready(&mut self, value: u32) -> bool {
        let open = self.session.negotiation.sets_up_queues();
        match (self.queue(), value) {
            (Some(queue), 0 | 1) if open => {
                queue.ready = value == 1;
                true
            }
            _ => false,
        }
    }

    /// Counts an access that no driver makes.
    pub(super) fn bad_access(&self) {
        self.session.counters.bad_accesses.increment();
    }

    /// The driver writes the device's configuration, which it may once it has found the device.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.session.negotiation.has_driver() {
            self.session.device.write_config(offset, data);
        }
    }
}
