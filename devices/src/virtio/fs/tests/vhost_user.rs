//! A share served on the other side of a socket: here by a thread that answers each request with
//! as many bytes as the request has, all 9.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::virtio::testing::{LIVE, RAM_LEN};
use crate::virtio::{GuestRam, Memory};

type Backend = Arc<Mutex<Nine>>;

struct Nine {
    features: u64,
    memory: Option<Memory>,
    served: usize,
}

impl VhostUserBackendMut for Nine {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    /// Ends its thread.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.clone().expect("memory comes before kicks");
        let ram = memory.memory();
        let vring = &vrings[usize::from(queue)];
        loop {
            let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(&*ram);
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let (room, asked): (Vec<Descriptor>, Vec<Descriptor>) =
                chain.partition(|part| part.is_write_only());
            let len: u32 = asked.iter().map(|part| part.len()).sum();
            ram.write_slice(&vec![9; len as usize], room[0].addr())
                .map_err(io::Error::other)?;
            vring.add_used(head, len).map_err(io::Error::other)?;
            vring.signal_used_queue()?;
            self.served += 1;
        }
        Ok(())
    }
}

/// Where it listens, until its client leaves.
struct Other {
    folder: TempDir,
    backend: Backend,
    thread: thread::JoinHandle<()>,
    /// Has what makes it leave, once it has a client.
    leave: Receiver<ShutdownHandle>,
}

impl Other {
    fn new(features: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let backend = Arc::new(Mutex::new(Nine {
            features,
            memory: None,
            served: 0,
        }));
        let empty = Memory::new(GuestRam::new());
        let mut daemon = VhostUserDaemon::new("nine".into(), backend.clone(), empty).unwrap();
        let mut listener = Listener::new(folder.as_path().join("socket"), true).unwrap();
        let (tell, leave) = channel();
        let thread = thread::spawn(move || {
            daemon.start(&mut listener).unwrap();
            // The test may not want this handle.
            let _ = tell.send(daemon.shutdown_handle().unwrap());
            // Its client leaves without a word.
            let _ = daemon.wait();
        });
        Self {
            folder,
            backend,
            thread,
            leave,
        }
    }

    fn all() -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn config(&self) -> VhostUserFsConfig {
        VhostUserFsConfig {
            tag: "share".into(),
            socket: self.socket(),
            queues: 1,
            queue_size: 128,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.as_path().join("socket")
    }
}

/// RAM that another process could map.
fn shared_ram() -> Memory {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(RAM_LEN).unwrap();
    let len = usize::try_from(RAM_LEN).unwrap();
    let range = (GuestAddress(0), len, Some(FileOffset::new(file, 0)));
    Memory::new(GuestRam::from_ranges_with_files([range]).unwrap())
}

/// Lets the other side work until it has answered.
fn request(guest: &mut Guest, queue: usize, bytes: usize) -> Vec<u8> {
    let buffers = [Buffer::Out(vec![1; bytes]), Buffer::In(100)];
    guest.add(queue, &buffers).unwrap();
    guest.kick(queue);
    answer(guest, queue)
}

fn answer(guest: &mut Guest, queue: usize) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        guest.settle();
        if let Some(answer) = guest.take(queue) {
            return answer;
        }
        assert!(Instant::now() < deadline, "it never answers");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_are_served_by_the_other_side_through_pause_and_reset() {
    let other = Other::new(Other::all());
    let share = VhostUserFs::connect(other.config()).unwrap();
    let mut guest = Guest::on(shared_ram(), share);
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE);
    assert_eq!(&guest.config::<8>(0), b"share\0\0\0");
    assert_eq!(request(&mut guest, 0, 3), [9; 3]);
    assert_eq!(request(&mut guest, 1, 50), [9; 50]);
    assert!(guest.interrupts() >= 2);

    guest.transport.pause().unwrap();
    let served = other.backend.lock().unwrap().served;
    guest
        .add(1, &[Buffer::Out(vec![1; 7]), Buffer::In(100)])
        .unwrap();
    guest.kick(1);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(
        other.backend.lock().unwrap().served,
        served,
        "it works in its sleep"
    );
    guest.transport.resume().unwrap();
    assert_eq!(answer(&mut guest, 1), [9; 7]);

    for size in [8, 16] {
        guest.start(u64::MAX, size);
        assert_eq!(guest.status(), LIVE);
        assert_eq!(request(&mut guest, 1, 20), [9; 20]);
    }
    drop(guest);
    other.thread.join().unwrap();
}

#[test]
fn one_that_leaves_asks_the_driver_for_a_reset() {
    let other = Other::new(Other::all());
    let share = VhostUserFs::connect(other.config()).unwrap();
    let mut guest = Guest::on(shared_ram(), share);
    guest.start(u64::MAX, 16);
    assert_eq!(request(&mut guest, 1, 20), [9; 20]);
    let Other { thread, leave, .. } = other;
    leave.recv().unwrap().shutdown();
    thread.join().unwrap();
    guest.settle();
    let needs_reset = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
    assert_eq!(guest.status(), LIVE | needs_reset);
    // Nor can it be served again.
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE | needs_reset);
}

#[test]
fn who_cannot_serve_is_named() {
    let refusal = |config| VhostUserFs::connect(config).unwrap_err().to_string();
    let other = Other::new(1 << VIRTIO_F_VERSION_1);
    let lacks = refusal(other.config());
    assert!(lacks.ends_with("does not have virtio 1.0 with indirect descriptors and event index"));
    other.thread.join().unwrap();
    let other = Other::new(Other::all());
    let config = VhostUserFsConfig {
        queues: 2,
        ..other.config()
    };
    assert!(refusal(config).ends_with("does not have so many queues"));
    other.thread.join().unwrap();
    let folder = TempDir::new().unwrap();
    let config = VhostUserFsConfig {
        tag: "share".into(),
        socket: folder.as_path().join("absent"),
        queues: 1,
        queue_size: 128,
    };
    assert!(refusal(config).starts_with("connect to the process that serves the share on"));
}

#[test]
fn ram_that_cannot_be_shared_is_not_handed_over() {
    let other = Other::new(Other::all());
    let mut guest = Guest::new(VhostUserFs::connect(other.config()).unwrap());
    guest.start(u64::MAX, 16);
    let needs_reset = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
    assert_eq!(guest.status(), LIVE | needs_reset);
    drop(guest);
    other.thread.join().unwrap();
}
