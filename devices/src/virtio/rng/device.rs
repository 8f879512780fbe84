//! What the driver of an entropy device configures: one queue, and nothing else.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::handler::RngHandler;
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, StateError, VirtioDevice,
};

/// requestq (virtio 1.3 §5.4.2). Linux asks with one buffer at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    counters: Arc<Counters>,
}

impl Rng {
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // It fills as much as it likes.
        usize::MAX
    }

    fn features(&self) -> u64 {
        0
    }

    /// There is no configuration space (virtio 1.3 §5.4.4).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(StateError::Kind),
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let Activation { memory, rings, .. } = activation;
        Ok(rings
            .into_iter()
            .map(|ring| RngHandler::new(memory.clone(), ring, self.counters.clone()))
            .map(|handler| Box::new(handler) as Box<dyn Handler>)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Guest, Table, lifecycle};

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let mut guest = Guest::live(Rng::new());
        let first = guest.request(0, &[Buffer::In(64)]).unwrap();
        let second = guest.request(0, &[Buffer::In(64)]).unwrap();
        assert_eq!((first.len(), second.len()), (64, 64));
        assert_ne!(first, second);
        assert_eq!(guest.counters().bytes_in.get(), 128);
        assert_eq!(guest.interrupts(), 2);
    }

    #[test]
    fn a_request_in_many_pieces_and_by_an_indirect_table_is_filled() {
        let mut guest = Guest::live(Rng::new());
        let buffers = vec![Buffer::In(33); 40];
        guest.add_by(Table::Indirect, 0, &buffers).unwrap();
        guest.kick(0);
        guest.settle();
        assert_eq!(guest.take(0).unwrap().len(), 33 * 40);
    }

    #[test]
    fn a_large_request_is_filled_in_part() {
        let mut guest = Guest::live(Rng::new());
        let bytes = guest.request(0, &[Buffer::In(1 << 20)]).unwrap();
        assert_eq!(bytes.len(), 64 << 10);
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut guest = Guest::live(Rng::new());
        assert_eq!(
            guest.request(0, &[Buffer::Out(vec![1, 2, 3])]),
            Some(vec![])
        );
        assert_eq!(guest.request(0, &[Buffer::In(0)]), Some(vec![]));
    }

    #[test]
    fn the_device_lives_through_pause_and_reset() {
        lifecycle(Rng::new, |guest| {
            assert_eq!(guest.request(0, &[Buffer::In(8)]).unwrap().len(), 8);
        });
    }

    #[test]
    fn there_is_no_configuration() {
        let mut guest = Guest::new(Rng::new());
        assert_eq!(guest.config::<16>(0), [0; 16]);
    }
}
