//! Serves one queue of a share, on a thread of its own that waits where the host's file system
//! does.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::host;
use super::server::{Scratch, Server};
use crate::virtio::limiter::Limiter;
use crate::virtio::queue::LAST_TURNS;
use crate::virtio::{Chain, Counters, Handler, Memory, Ring, RingState, Thread};

#[derive(Debug)]
pub(super) struct FsHandler {
    pub(super) thread: Thread,
    pub(super) server: Arc<Server>,
    pub(super) memory: Memory,
    pub(super) ring: Ring,
    pub(super) limiter: Option<Limiter>,
    pub(super) counters: Arc<Counters>,
    pub(super) scratch: Scratch,
}

/// Event data of the limiter's timer; the ring's is its index.
const LIMITER: u32 = 1 << 16;

impl FsHandler {
    fn serve(&mut self) -> bool {
        let ram = self.memory.memory();
        let Self {
            server,
            scratch,
            counters,
            ring,
            limiter,
            ..
        } = self;
        let waits = |chain: &Chain| Server::waits(&ram, chain);
        ring.serve_within(&ram, limiter, waits, |chain| {
            server.answer(&ram, chain, scratch, counters)
        })
    }
}

impl MutEventSubscriber for FsHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = host::keep_permissions() {
            log::warn!("files get fewer permissions than the guest asks for: {error}");
        }
        self.ring.watch(ops);
        if let Some(limiter) = &self.limiter {
            limiter.watch(ops, LIMITER);
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let (LIMITER, Some(limiter)) = (events.data(), &mut self.limiter) {
            limiter.woken();
        }
        self.serve();
    }
}

impl Handler for FsHandler {
    fn thread(&self) -> Thread {
        self.thread.clone()
    }

    /// Serves what is queued at once, without a rate limit: it is not to be lost.
    fn drain(&mut self) {
        self.limiter = None;
        (0..LAST_TURNS).any(|_| self.serve());
    }

    fn rings(&self) -> Vec<RingState> {
        vec![self.ring.state()]
    }
}
