//! What the driver of a socket device configures: the guest's address, and nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::timerfd::TimerFd;

use super::handler::{EVENT, Parts, RECEIVE, TRANSMIT, VsockHandler};
use super::muxer::HostEnd;
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
    /// Where the host's programs connect.
    pub socket: PathBuf,
}

/// Why there is no socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("{} is in use by a process that answers there", .0.display())]
    InUse(PathBuf),
    #[error("{} was left behind by a process that is gone: remove it", .0.display())]
    Stale(PathBuf),
    #[error("listen on {}", .path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// A socket device. Dropping it removes its unix socket.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    host: Lender<HostEnd>,
    /// The next activation is one of a restored device.
    restored: bool,
    counters: Arc<Counters>,
}

impl Vsock {
    /// Listens on the unix socket, which only this user may open.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig { cid, socket: path } = config;
        let listener = listen(&path)?;
        let host = HostEnd {
            listener,
            path: path.clone(),
        };
        Ok(Self {
            cid: cid.into(),
            path,
            host: Lender::new(host),
            restored: false,
            counters: Arc::default(),
        })
    }
}

fn listen(path: &Path) -> Result<UnixListener, VsockError> {
    let failed = |source| VsockError::Listen {
        path: path.into(),
        source,
    };
    let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse if UnixStream::connect(path).is_ok() => {
            VsockError::InUse(path.into())
        }
        io::ErrorKind::AddrInUse => VsockError::Stale(path.into()),
        _ => failed(source),
    })?;
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(path, private).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // It may have been removed by somebody else.
        let _ = fs::remove_file(&self.path);
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
    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Connections do not survive a snapshot: their other ends do not.
    fn state(&self) -> DeviceState {
        DeviceState::Vsock
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Vsock => {
                self.restored = true;
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
        let handler = VsockHandler::new(Parts {
            receive: activation.take_ring(RECEIVE),
            transmit: activation.take_ring(TRANSMIT),
            event: activation.take_ring(EVENT),
            memory: activation.memory,
            host,
            guest_cid: self.cid,
            timer,
            reset_due: std::mem::take(&mut self.restored),
            counters: self.counters.clone(),
        });
        Ok(vec![Box::new(handler)])
    }
}
