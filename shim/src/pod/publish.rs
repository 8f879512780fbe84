//! Tells containerd what happens, in the order in which it happened. While containerd is away,
//! events wait for it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use protocol::ttrpc::{CallError, Client};

use protocol::containerd::events::{Envelope, Event, ForwardRequest, SERVICE};
use protocol::containerd::task::Empty;
use protocol::containerd::timestamp;

/// How long containerd may take to take an event.
const PATIENCE: Duration = Duration::from_secs(5);
/// The time between tries to reach containerd.
const PAUSE: Duration = Duration::from_millis(200);
/// How long events that containerd has not taken are kept when the shim ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// The most events that wait for containerd when one is offered.
const MAX_WAITING: usize = 64;

/// Where events go in.
#[derive(Debug)]
pub(crate) struct Publisher {
    events: Sender<Message>,
    /// How many events containerd has not been told yet.
    waiting: Arc<AtomicUsize>,
    /// The namespace of containerd's that the pod's containers are in.
    pub(crate) namespace: String,
}

#[derive(Debug)]
enum Message {
    Event(SystemTime, Event),
    /// A request to say when all events before it are told.
    Flush(Sender<()>),
}

impl Publisher {
    /// Starts the thread that tells containerd at `socket`, of events in `namespace`.
    pub(crate) fn start(socket: PathBuf, namespace: String) -> std::io::Result<Self> {
        let (events, messages) = channel();
        let waiting = Arc::<AtomicUsize>::default();
        thread::Builder::new()
            .name("events".into())
            .stack_size(64 << 10)
            .spawn({
                let (namespace, waiting) = (namespace.clone(), Arc::clone(&waiting));
                move || tell(&messages, &waiting, &socket, &namespace)
            })?;
        Ok(Self {
            events,
            waiting,
            namespace,
        })
    }

    /// One that tells a test instead of containerd.
    #[cfg(test)]
    pub(crate) fn to_a_test() -> (Self, impl Iterator<Item = Event>) {
        let (events, messages) = channel();
        let told = messages.into_iter().filter_map(|message| match message {
            Message::Event(_, event) => Some(event),
            Message::Flush(_) => None,
        });
        let publisher = Self {
            events,
            waiting: Arc::default(),
            namespace: String::new(),
        };
        (publisher, told)
    }

    /// Publishes an event that a guest can bring about as often as it likes. It is dropped while containerd is behind.
    pub(crate) fn offer(&self, event: Event) {
        if self.waiting.load(Ordering::Relaxed) < MAX_WAITING {
            self.publish(event);
        }
    }

    pub(crate) fn publish(&self, event: Event) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // The thread ends with the process.
        let _ = self.events.send(Message::Event(SystemTime::now(), event));
    }

    /// Waits for what was published to be told, but not for ever.
    pub(crate) fn flush(&self) {
        let (told, all_told) = channel();
        let _ = self.events.send(Message::Flush(told));
        let _ = all_told.recv_timeout(FAREWELL);
    }
}

fn tell(messages: &Receiver<Message>, waiting: &AtomicUsize, socket: &PathBuf, namespace: &str) {
    let mut client: Option<Client> = None;
    for message in messages {
        let (time, event) = match message {
            Message::Event(time, event) => (time, event),
            Message::Flush(told) => {
                let _ = told.send(());
                continue;
            }
        };
        let (topic, event) = event.envelope();
        let request = ForwardRequest {
            envelope: Some(Envelope {
                timestamp: Some(timestamp(time)),
                namespace: namespace.into(),
                topic: topic.into(),
                event: Some(event),
            }),
        };
        let mut missed = false;
        loop {
            let answer = match &client {
                Some(client) => client.call(SERVICE, "Forward", &request, Some(PATIENCE)),
                None => Err(CallError::Gone("Forward".into())),
            };
            match answer {
                Ok(Empty {}) => break,
                Err(CallError::Refused(status)) => {
                    log::warn!("containerd does not take {topic}: {status}");
                    break;
                }
                Err(error) => {
                    if !missed && client.is_some() {
                        log::info!("{topic} waits for containerd: {error}");
                    }
                    if missed {
                        thread::sleep(PAUSE);
                    }
                    missed = true;
                    client = UnixStream::connect(socket).and_then(Client::new).ok();
                }
            }
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use protocol::containerd::events::TaskOnly;

    use super::*;

    #[test]
    fn events_of_a_guests_making_do_not_pile_up() {
        let nowhere = PathBuf::from("/nowhere/containerd.sock");
        let publisher = Publisher::start(nowhere, "a namespace".into()).unwrap();
        let event = || {
            Event::Oom(TaskOnly {
                container_id: "c".into(),
            })
        };
        for _ in 0..10_000 {
            publisher.offer(event());
        }
        assert_eq!(publisher.waiting.load(Ordering::Relaxed), MAX_WAITING);
        // What containerd must be told is kept.
        publisher.publish(event());
        assert_eq!(publisher.waiting.load(Ordering::Relaxed), MAX_WAITING + 1);
    }
}
