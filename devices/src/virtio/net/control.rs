//! The control ring (virtio 1.3 §5.1.6.5): how many pairs of rings the driver uses. The tap gives
//! frames to no others.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestAddressSpace;

use super::tap::Tap;
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{Counters, DeviceState, Handler, Memory, Ring, RingState, Thread};

/// What a snapshot keeps of a network device: of what taps hold, a guest relies on no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// How many pairs of rings the driver uses.
    pub(super) pairs: u16,
}

impl Default for NetState {
    fn default() -> Self {
        Self { pairs: 1 }
    }
}

#[derive(Debug)]
pub(super) struct ControlHandler {
    memory: Memory,
    ring: Ring,
    taps: Vec<Tap>,
    /// How many taps are in use.
    pairs: u16,
    counters: Arc<Counters>,
}

impl ControlHandler {
    /// `pairs` are in use at first. None if the driver set up no control ring.
    pub(super) fn start(
        memory: Memory,
        ring: Option<Ring>,
        taps: Vec<Tap>,
        pairs: u16,
        counters: Arc<Counters>,
    ) -> Option<Box<dyn Handler>> {
        use_pairs(&taps, pairs);
        let handler = Self {
            memory,
            ring: ring?,
            taps,
            pairs,
            counters,
        };
        Some(Box::new(handler))
    }

    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        let taps = &self.taps;
        let in_use = &mut self.pairs;
        let counters = &self.counters;
        self.ring.serve(&ram, |chain| {
            let mut command = [0; 4];
            let pairs = match chain.readable.read(&ram, &mut command) {
                Ok(()) => pairs_of(command, taps.len()),
                Err(_) => None,
            };
            let ack = match pairs {
                Some(pairs) => {
                    counters.requests.increment();
                    use_pairs(taps, pairs);
                    *in_use = pairs;
                    VIRTIO_NET_OK
                }
                None => {
                    counters.errors.increment();
                    VIRTIO_NET_ERR
                }
            };
            let ack = u8::try_from(ack).expect("acknowledgements are bytes");
            u32::from(chain.writable.write(&ram, &[ack]).is_ok())
        })
    }
}

/// How many pairs are wanted, if that is what `command` is about and it can be.
fn pairs_of(command: [u8; 4], max: usize) -> Option<u16> {
    let [class, name, low, high] = command;
    let wanted = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    let pairs = u16::from_le_bytes([low, high]);
    let is = (u32::from(class), u32::from(name)) == wanted;
    (is && (1..=max).contains(&pairs.into())).then_some(pairs)
}

fn use_pairs(taps: &[Tap], pairs: u16) {
    for (index, tap) in (0..).zip(taps) {
        if let Err(error) = tap.set_attached(index < pairs) {
            log::debug!("attach or detach a queue of a tap: {error}");
        }
    }
}

impl MutEventSubscriber for ControlHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.ring.watch(ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.serve();
    }
}

impl Handler for ControlHandler {
    fn thread(&self) -> Thread {
        Thread::Io
    }

    fn drain(&mut self) {
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        vec![self.ring.state()]
    }

    fn add_state(&self, device: &mut DeviceState) {
        *device = DeviceState::Net(NetState { pairs: self.pairs });
    }
}
