//! What the driver of a network device configures: which work on frames each side leaves to the
//! other, the MAC address and the MTU.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use super::control::{ControlHandler, NetState};
use super::handler::NetHandler;
use super::tap::{Tap, TapError, offload};
use crate::virtio::limiter::Tokens;
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Lender, Limits, StateError,
    VirtioDevice, read_config_bytes,
};

const CONTROL_SIZE: u16 = 16;
/// The largest frame with its header when segments are left to the guest: 64 KiB of IP and what
/// comes before.
const LARGEST: usize = 65_562;

// Bits virtio-bindings does not name yet (virtio 1.3 §5.1.3).
const GUEST_USO4: u32 = 54;
const GUEST_USO6: u32 = 55;
const HOST_USO: u32 = 56;

/// Which work may be left to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Whether checksums may be left to the other side.
    pub csum: bool,
    /// Whether segments of TCP may be left to the other side. Only with checksums.
    pub tso: bool,
    /// Whether segments of UDP may be left to the other side, if the host can (Linux 6.2). Only
    /// with checksums.
    pub uso: bool,
}

impl Default for Offloads {
    fn default() -> Self {
        Self {
            csum: true,
            tso: true,
            uso: true,
        }
    }
}

/// A network device's host side and what it shows to the guest.
#[derive(Debug)]
pub struct NetConfig {
    /// One queue for each pair of rings.
    pub taps: Vec<Tap>,
    pub mac: [u8; 6],
    /// Bytes of IP in a frame, 68 to 65535.
    pub mtu: Option<u16>,
    /// Descriptors in each ring, a power of two from 16 to 1024.
    pub queue_size: u16,
    pub offloads: Offloads,
    /// What frames in each direction are held to, all queues together.
    pub rates: Limits,
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("{0} queue pairs: 1 to 16 are possible")]
    Pairs(usize),
    #[error("queue_size={0} is not a power of two from 16 to 1024")]
    QueueSize(u16),
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    taps: Vec<Lender<Tap>>,
    mac: [u8; 6],
    mtu: Option<u16>,
    offloads: Offloads,
    /// Of what comes and of what goes.
    tokens: [Tokens; 2],
    queue_sizes: Vec<u16>,
    /// The state from which the next activation goes on.
    state: NetState,
    counters: Arc<Counters>,
}

impl Net {
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let NetConfig {
            taps,
            mac,
            mtu,
            queue_size,
            mut offloads,
            rates,
        } = config;
        if !(1..=16).contains(&taps.len()) {
            return Err(NetError::Pairs(taps.len()));
        }
        if !(16..=1024).contains(&queue_size) || !queue_size.is_power_of_two() {
            return Err(NetError::QueueSize(queue_size));
        }
        offloads.tso &= offloads.csum;
        offloads.uso &= offloads.csum;
        if offloads.uso {
            // An older host knows no USO and says so.
            let uso = offload::CSUM | offload::USO4 | offload::USO6;
            offloads.uso = taps[0].set_offloads(uso).is_ok();
            // Frames that come before there is a driver are not left to one that accepts less.
            let _ = taps[0].set_offloads(0);
        }
        let mut queue_sizes = vec![queue_size; 2 * taps.len()];
        if taps.len() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        Ok(Self {
            taps: taps.into_iter().map(Lender::new).collect(),
            mac,
            mtu,
            offloads,
            tokens: [Tokens::new(rates), Tokens::new(rates)],
            queue_sizes,
            state: NetState::default(),
            counters: Arc::default(),
        })
    }

    /// `struct virtio_net_config` (virtio 1.3 §5.1.4), up to the MTU.
    fn config(&self) -> [u8; 12] {
        let link_up = u16::try_from(VIRTIO_NET_S_LINK_UP).expect("it is 1");
        let pairs = u16::try_from(self.taps.len()).expect("at most 16");
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&link_up.to_le_bytes());
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

/// What the tap may leave to a guest that `has` these features, in combinations that Linux's tun driver
/// takes: ECN only beside TSO, and USO for both versions of IP or for none.
fn offloads_of(has: impl Fn(u32) -> bool) -> u32 {
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut bits = offload::CSUM;
    if has(VIRTIO_NET_F_GUEST_TSO4) {
        bits |= offload::TSO4;
    }
    if has(VIRTIO_NET_F_GUEST_TSO6) {
        bits |= offload::TSO6;
    }
    if bits != offload::CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        bits |= offload::TSO_ECN;
    }
    if has(GUEST_USO4) && has(GUEST_USO6) {
        bits |= offload::USO4 | offload::USO6;
    }
    bits
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // Frames have up to 64 KiB, but buffers for them may be larger.
        1 << 20
    }

    fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        if self.offloads.csum {
            features.extend([VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
        }
        if self.offloads.tso {
            features.extend([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]);
            features.extend([VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]);
            features.extend([VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN]);
        }
        if self.offloads.uso {
            features.extend([HOST_USO, GUEST_USO4, GUEST_USO6]);
        }
        if self.mtu.is_some() {
            features.push(VIRTIO_NET_F_MTU);
        }
        if self.taps.len() > 1 {
            features.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        }
        features.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(NetState::default())
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Net(state) if (1..=self.taps.len()).contains(&state.pairs.into()) => {
                self.state = state;
                Ok(())
            }
            DeviceState::Net(_) => Err(StateError::Device(
                "its guest uses more queue pairs than there are".into(),
            )),
            _ => Err(StateError::Kind),
        }
    }

    fn activate(
        &mut self,
        mut activation: Activation,
    ) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let bits = offloads_of(|feature| activation.has(feature));
        let segments = bits & !offload::CSUM != 0;
        let multi = activation.has(VIRTIO_NET_F_MQ);
        let pairs = if multi { self.taps.len() } else { 1 };
        let mut taps = Vec::with_capacity(self.taps.len());
        for tap in &self.taps {
            taps.push(tap.lend().ok_or(ActivateError::Held { what: "tap" })?);
        }
        if let Err(error) = taps[0].set_offloads(bits) {
            // A tap that another program made may not take them. Then nothing is left to the guest.
            log::debug!("set the offloads of a tap: {error}");
            let _ = taps[0].set_offloads(0);
        }
        let mut handlers: Vec<Box<dyn Handler>> = Vec::new();
        if self.taps.len() > 1 {
            let queues = taps.iter().map(|tap| tap.try_clone());
            let queues = queues.collect::<Result<_, _>>();
            let queues = queues.map_err(ActivateError::EventFd)?;
            let index = if multi { 2 * self.taps.len() } else { 2 };
            let index = u16::try_from(index).expect("at most 32");
            let ring = activation.take_ring(index);
            let memory = activation.memory.clone();
            handlers.extend(ControlHandler::start(
                memory,
                ring,
                queues,
                std::mem::take(&mut self.state).pairs,
                self.counters.clone(),
            ));
        }
        let largest = match (segments, self.mtu) {
            (true, _) => LARGEST,
            // A VLAN's tag may come before the IP.
            (false, mtu) => usize::from(mtu.unwrap_or(1500)) + 18 + super::tap::HEADER_LEN,
        };
        let [receive, transmit] = &self.tokens;
        let limiter = |tokens: &Tokens| tokens.limiter().map_err(ActivateError::EventFd);
        for (index, tap) in (0..).step_by(2).zip(taps.into_iter().take(pairs)) {
            handlers.push(Box::new(NetHandler::new(
                activation.memory.clone(),
                activation.take_ring(index),
                activation.take_ring(index + 1),
                tap,
                activation.has(VIRTIO_NET_F_MRG_RXBUF).then_some(largest),
                [limiter(receive)?, limiter(transmit)?],
                self.counters.clone(),
            )));
        }
        Ok(handlers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_asked_only_for_combinations_that_it_takes() {
        const CSUM: u32 = VIRTIO_NET_F_GUEST_CSUM;
        const TSO4: u32 = VIRTIO_NET_F_GUEST_TSO4;
        const ECN: u32 = VIRTIO_NET_F_GUEST_ECN;
        let tso = offload::CSUM | offload::TSO4;
        let uso = offload::CSUM | offload::USO4 | offload::USO6;
        let cases: [(&[u32], u32); 6] = [
            (&[TSO4, GUEST_USO4, GUEST_USO6], 0),
            (&[CSUM, ECN], offload::CSUM),
            (&[CSUM, GUEST_USO4], offload::CSUM),
            (&[CSUM, TSO4], tso),
            (&[CSUM, TSO4, ECN], tso | offload::TSO_ECN),
            (&[CSUM, GUEST_USO4, GUEST_USO6], uso),
        ];
        for (accepted, expected) in cases {
            let bits = offloads_of(|feature| accepted.contains(&feature));
            assert_eq!(bits, expected, "{accepted:?}");
        }
    }
}
