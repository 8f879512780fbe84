//! What the driver of an entropy device configures: one queue, and nothing else.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::handler::RngHandler;
use crate::virtio::{ActivateError, Activation, Counters, Handler, VirtioDevice};

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

    fn features(&self) -> u64 {
        0
    }

    /// There is no configuration space (virtio 1.3 §5.4.4).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
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
