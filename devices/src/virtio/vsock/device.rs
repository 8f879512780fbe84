//! What the driver of a socket device configures: the guest's address, and nothing else.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::timerfd::TimerFd;

use super::handler::{EVENT, Parts, RECEIVE, TRANSMIT, VsockHandler};
use crate::host::{ListenError, Listener};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Lender, StateError, VirtioDevice,
    read_config_bytes,
};

/// rx, tx and event queue (virtio 1.3 §5.10.2).
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Where a socket device is on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's address, from 3 on.
    pub cid: u32,
    /// Path of the unix socket where the host's programs connect.
    pub socket: PathBuf,
}

/// What a snapshot keeps of the device. Connections do not survive one: their other ends do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    cid: u64,
    /// The guest's driver may know connections, and is to hear that they are gone.
    pub(super) connected: bool,
}

/// A socket device. Dropping it removes its unix socket.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    host: Lender<Listener>,
    /// The state that the next activation continues with.
    restored: Option<VsockState>,
    counters: Arc<Counters>,
}

impl Vsock {
    /// Listens on the unix socket, which only this user may open.
    pub fn new(config: VsockConfig) -> Result<Self, ListenError> {
        Ok(Self {
            cid: config.cid.into(),
            host: Lender::new(Listener::bind(&config.socket)?),
            restored: None,
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Streams are there without a feature bit (virtio 1.3 §5.10.3).
    fn max_request_len(&self, _queue: u16) -> usize {
        // A packet has up to 64 KiB, but buffers for them may be larger.
        1 << 20
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The state of the device itself. Its handler says whether there are connections.
    fn state(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            cid: self.cid,
            connected: false,
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Vsock(state) => {
                self.restored = Some(state);
                Ok(())
            }
            _ => Err(StateError::Kind),
        }
    }

    fn activate(
        &mut self,
        mut activation: Activation,
    ) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let host = self.host.lend().ok_or(ActivateError::Held {
            what: "unix socket",
        })?;
        let timer = TimerFd::new().map_err(|error| ActivateError::EventFd(error.into()))?;
        let restored = self.restored.take();
        let handler = VsockHandler::new(Parts {
            receive: activation.take_ring(RECEIVE),
            transmit: activation.take_ring(TRANSMIT),
            event: activation.take_ring(EVENT),
            memory: activation.memory,
            host,
            guest_cid: self.cid,
            timer,
            // It also has the driver read its address again.
            reset_due: restored.is_some_and(|state| state.connected || state.cid != self.cid),
            restored: restored.is_some(),
            counters: self.counters.clone(),
        });
        Ok(vec![Box::new(handler)])
    }
}
