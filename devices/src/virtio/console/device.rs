//! What the driver of a console configures: how many ports there may be.

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::Port;
use super::handler::ConsoleHandler;
use super::port::{ConsoleState, HostEnd, LivePort};
use super::window::{ConsoleHandle, Window};
use crate::virtio::{
    ActivateError, Activation, Counters, DeviceState, Handler, Lender, StateError, VirtioDevice,
    read_config_bytes,
};

/// VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.3 §5.3.3).
pub(super) const F_MULTIPORT: u32 = 1;

const MAX_PORTS: usize = 16;
const MAX_NAME: usize = 64;
/// Linux fills each receive queue with as many pages when it starts, which takes time and memory.
const RECEIVE_SIZE: u16 = 8;
const TRANSMIT_SIZE: u16 = 16;

/// Why a console cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("a console has 1 to {MAX_PORTS} ports, not {0}")]
    PortCount(usize),
    #[error("a console port's name is 1 to {MAX_NAME} bytes long, unlike {0:?}")]
    Name(String),
    #[error("create the event fd of a console")]
    EventFd(#[source] io::Error),
}

/// A console device.
#[derive(Debug)]
pub struct Console {
    ports: Vec<Lender<HostEnd>>,
    queue_sizes: Vec<u16>,
    window: Arc<Window>,
    /// The state from which the next activation goes on.
    restored: ConsoleState,
    counters: Arc<Counters>,
}

impl Console {
    /// Offers `ports`, numbered in order. A guest that knows nothing of ports uses the first as
    /// its console.
    pub fn new(ports: Vec<Port>) -> Result<Self, ConsoleError> {
        if !(1..=MAX_PORTS).contains(&ports.len()) {
            return Err(ConsoleError::PortCount(ports.len()));
        }
        if let Some(port) = ports
            .iter()
            .find(|port| !(1..=MAX_NAME).contains(&port.name.len()))
        {
            return Err(ConsoleError::Name(port.name.clone()));
        }
        let changed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let changed = changed.map_err(ConsoleError::EventFd)?;
        // Two for each port, and two for control.
        let queue_sizes = [RECEIVE_SIZE, TRANSMIT_SIZE].repeat(ports.len() + 1);
        let ports = ports.into_iter().map(|port| {
            let Port {
                name,
                console,
                input,
                output,
            } = port;
            let ended = input.is_none();
            Lender::new(HostEnd {
                name,
                console,
                input,
                output,
                ended,
            })
        });
        Ok(Self {
            ports: ports.collect(),
            queue_sizes,
            window: Arc::new(Window {
                size: AtomicU32::new(0),
                changed,
            }),
            restored: ConsoleState::default(),
            counters: Arc::default(),
        })
    }

    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle(self.window.clone())
    }

    /// `struct virtio_console_config` (virtio 1.3 §5.3.4). Its size fields need a feature that is
    /// not offered: the size of a console is told by control messages.
    fn config(&self) -> [u8; 8] {
        let ports = u32::try_from(self.ports.len()).expect("at most MAX_PORTS");
        let [p0, p1, p2, p3] = ports.to_le_bytes();
        [0, 0, 0, 0, p0, p1, p2, p3]
    }
}

/// The receive queue of port `number`; transmit is the next one. Control comes after port 0
/// (virtio 1.3 §5.3.2).
fn receive_queue(number: usize) -> u16 {
    let number = u16::try_from(number).expect("at most MAX_PORTS");
    if number == 0 { 0 } else { 2 + 2 * number }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn max_request_len(&self, _queue: u16) -> usize {
        // Output of any length goes in turns, and input fills what it has bytes for.
        usize::MAX
    }

    fn features(&self) -> u64 {
        1 << F_MULTIPORT
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Console(ConsoleState::default())
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Console(state) if state.ports.len() <= self.ports.len() => {
                self.restored = state;
                Ok(())
            }
            DeviceState::Console(state) => Err(StateError::Device(format!(
                "it has {} ports, the device has {}",
                state.ports.len(),
                self.ports.len()
            ))),
            _ => Err(StateError::Kind),
        }
    }

    fn activate(
        &mut self,
        mut activation: Activation,
    ) -> Result<Vec<Box<dyn Handler>>, ActivateError> {
        let multiport = activation.has(F_MULTIPORT);
        let count = if multiport { self.ports.len() } else { 1 };
        let ports = self.ports[..count]
            .iter()
            .enumerate()
            .map(|(number, port)| {
                let host = port.lend().ok_or(ActivateError::Held {
                    what: "console port",
                })?;
                let receive = activation.take_ring(receive_queue(number));
                let transmit = activation.take_ring(receive_queue(number) + 1);
                // Without control messages a port is always open.
                Ok(LivePort::new(host, receive, transmit, !multiport))
            });
        let mut ports = ports.collect::<Result<Vec<_>, _>>()?;
        let restored = mem::take(&mut self.restored).ports;
        for (port, state) in ports.iter_mut().zip(restored) {
            port.restore(state);
        }
        let handler = ConsoleHandler::new(
            activation.memory.clone(),
            ports,
            activation.take_ring(2),
            activation.take_ring(3),
            self.window.clone(),
            self.counters.clone(),
        );
        Ok(vec![Box::new(handler)])
    }
}
