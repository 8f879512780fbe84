//! All connections: who they are, whose turn it is, and what the guest must be told of those that
//! are gone. Knows packets and sockets, but no rings.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::hash::BuildHasher;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{Connection, Fate, Key};
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM};
use crate::host::Listener;
use crate::virtio::{Counters, GuestRam, Segments};

/// Connections there may be, greetings included.
pub(super) const MAX_CONNECTIONS: usize = 2048;
/// The most connections the guest may have opened, so that the host can always reach it.
const MAX_OF_GUEST: usize = 1024;
/// Resets that may wait for the guest to take them. Until it does, it is not heard.
const MAX_RESETS: usize = 256;
/// Ports given to callers of the host's. The guest sees them as the host's end.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Something to be watched, or not any more.
#[derive(Debug)]
pub(super) enum Change {
    Born(usize),
    Died(Connection),
}

#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    keys: HashMap<Key, usize>,
    /// Connections that have something for the guest, in turn.
    turns: VecDeque<usize>,
    resets: VecDeque<Header>,
    of_guest: usize,
    next_port: u32,
    /// There may be callers that were not let in.
    callers: bool,
    /// Connections that came and went, for the loop to follow.
    pub(super) changes: Vec<Change>,
}

impl Muxer {
    /// `restored`: the guest may still know connections of another muxer's.
    pub(super) fn new(guest_cid: u64, restored: bool) -> Self {
        let first = if restored {
            // Keyed anew by the system each time. Not where the other one is likely to be.
            RandomState::new().hash_one(()).to_le_bytes()
        } else {
            [0; 8]
        };
        let [a, b, c, ..] = first;
        Self {
            guest_cid,
            slots: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            of_guest: 0,
            next_port: FIRST_HOST_PORT + u32::from_le_bytes([0, a, b, c & 0x1f]),
            callers: true,
            changes: Vec::new(),
        }
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = (usize, &Connection)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, connection)| Some((slot, connection.as_ref()?)))
    }

    pub(super) fn connection(&self, slot: usize) -> Option<&Connection> {
        self.slots.get(slot)?.as_ref()
    }

    /// Lets in callers, as long as there is room.
    pub(super) fn accept(&mut self, host: &Listener, more: bool) {
        self.callers |= more;
        while self.callers && self.keys_and_greetings() < MAX_CONNECTIONS {
            match host.accept() {
                Ok(stream) if stream.set_nonblocking(true).is_ok() => {
                    let slot = self.insert(Connection::greeting(stream));
                    self.greet(slot);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Without descriptors left, callers wait for the next one to come or go.
                    self.callers = error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            }
        }
    }

    fn keys_and_greetings(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The socket of connection `slot` is ready for something.
    pub(super) fn ready(&mut self, slot: usize, readable: bool, gone: bool) {
        let Some(Some(connection)) = self.slots.get_mut(slot) else {
            return;
        };
        let fate = connection.ready(readable, gone);
        self.follow(slot, fate);
        self.greet(slot);
    }

    /// Asks the guest again for those who wait for a listener. Says when to come back.
    pub(super) fn call_again(&mut self, now: Instant) -> Option<Instant> {
        let slots = 0..self.slots.len();
        for slot in slots {
            if let Some(connection) = &mut self.slots[slot] {
                connection.call_again(now);
                self.follow(slot, Fate::Lives);
            }
        }
        self.next_call()
    }

    /// When the first of those who wait wants the guest asked.
    pub(super) fn next_call(&self) -> Option<Instant> {
        self.connections()
            .filter_map(|(_, connection)| connection.again())
            .min()
    }

    /// Whether the guest must take resets before it is heard again.
    pub(super) fn is_choked(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Follows one packet of the guest's.
    pub(super) fn hear(
        &mut self,
        host: &Listener,
        ram: &GuestRam,
        packet: &mut Segments,
        counters: &Counters,
        now: Instant,
    ) {
        let mut bytes = [0; HEADER_LEN];
        let header = match packet.read(ram, &mut bytes) {
            Ok(()) => Header::parse(&bytes),
            Err(_) => return counters.errors.increment(),
        };
        // "The driver MUST NOT transmit" with other addresses, and there is no peer to answer.
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            return counters.errors.increment();
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let op = Op::of(header.op).filter(|_| header.kind == TYPE_STREAM);
        let len = header.len as usize;
        let (Some(op), true) = (op, len <= packet.len()) else {
            counters.errors.increment();
            return self.refuse(key, header.kind);
        };
        packet.truncate(len);
        counters.requests.increment();
        counters.bytes_out.add(len as u64);
        match (self.keys.get(&key).copied(), op) {
            (None, Op::Request) => self.call_host(host, key, &header),
            (None, Op::Reset) => {}
            (None, _) => self.refuse(key, TYPE_STREAM),
            (Some(slot), op) => {
                let connection = self.slots[slot].as_mut().expect("keys name connections");
                connection.learn_credit(header.buf_alloc, header.fwd_cnt);
                let fate = connection.hear(op, header.flags, (ram, packet), now);
                self.follow(slot, fate);
            }
        }
    }

    /// Answers with a reset, and ends what there was by that name.
    fn refuse(&mut self, key: Key, kind: u16) {
        match self.keys.get(&key) {
            Some(&slot) => self.follow(slot, Fate::Reset),
            None => self.resets.push_back(self.header(key, Op::Reset, kind)),
        }
    }

    fn header(&self, key: Key, op: Op, kind: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind,
            op: op as u16,
            ..Header::default()
        }
    }

    /// The guest's program calls a host's.
    fn call_host(&mut self, host: &Listener, key: Key, header: &Header) {
        let full = self.of_guest >= MAX_OF_GUEST || self.keys_and_greetings() >= MAX_CONNECTIONS;
        let stream = match full {
            true => None,
            false => connect_to(host.path(), key.host_port).ok(),
        };
        let Some(stream) = stream else {
            return self.refuse(key, TYPE_STREAM);
        };
        let mut connection = Connection::accepted(stream, key);
        connection.learn_credit(header.buf_alloc, header.fwd_cnt);
        let slot = self.insert(connection);
        self.keys.insert(key, slot);
        self.of_guest += 1;
        self.follow(slot, Fate::Lives);
    }

    fn greet(&mut self, slot: usize) {
        let Some(Some(connection)) = self.slots.get_mut(slot) else {
            return;
        };
        match connection.greet() {
            Ok(None) => {}
            Ok(Some(guest_port)) => {
                let key = self.free_key(guest_port);
                if let Some(connection) = &mut self.slots[slot] {
                    connection.call(key, Instant::now());
                }
                self.keys.insert(key, slot);
                self.follow(slot, Fate::Lives);
            }
            Err(_) => self.follow(slot, Fate::Over),
        }
    }

    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    fn insert(&mut self, connection: Connection) -> usize {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(connection);
        self.changes.push(Change::Born(slot));
        slot
    }

    /// Gives a connection its turn if it has something to say, or lets it go.
    fn follow(&mut self, slot: usize, fate: Fate) {
        let Some(connection) = &mut self.slots[slot] else {
            return;
        };
        if fate == Fate::Lives {
            if connection.has_message() && !connection.queued {
                connection.queued = true;
                self.turns.push_back(slot);
            }
            return;
        }
        let Some(connection) = self.slots[slot].take() else {
            return;
        };
        self.free.push(slot);
        if connection.queued {
            // A guest that takes nothing could pile up turns of those that are gone.
            self.turns.retain(|turn| *turn != slot);
        }
        if let Some(key) = connection.key {
            self.keys.remove(&key);
            if connection.by_guest {
                self.of_guest -= 1;
            }
            if fate == Fate::Reset {
                self.resets
                    .push_back(self.header(key, Op::Reset, TYPE_STREAM));
            }
        }
        self.changes.push(Change::Died(connection));
    }

    /// Whether the guest may know a connection, or has yet to learn that one is over.
    pub(super) fn is_known_to_guest(&self) -> bool {
        !self.keys.is_empty() || !self.resets.is_empty()
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_message(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Writes the next packet for the guest: its header into `front`, its payload into `room`.
    /// Returns the payload's length.
    pub(super) fn message(
        &mut self,
        ram: &GuestRam,
        front: &mut Segments,
        room: &mut Segments,
        counters: &Counters,
    ) -> Option<u32> {
        let header = match self.resets.pop_front() {
            Some(reset) => reset,
            None => self.next_of_turns(ram, room)?,
        };
        counters.requests.increment();
        counters.bytes_in.add(header.len.into());
        if front.write(ram, &header.to_bytes()).is_err() {
            counters.errors.increment();
        }
        Some(header.len)
    }

    fn next_of_turns(&mut self, ram: &GuestRam, room: &mut Segments) -> Option<Header> {
        loop {
            let slot = self.turns.pop_front()?;
            let Some(connection) = &mut self.slots[slot] else {
                continue;
            };
            connection.queued = false;
            let message = connection.message(ram, room);
            let key = connection.key;
            let (Some(message), Some(key)) = (message, key) else {
                continue;
            };
            let (buf_alloc, fwd_cnt) = connection.tell_credit();
            self.follow(slot, Fate::Lives);
            return Some(Header {
                len: message.len,
                flags: message.flags,
                buf_alloc,
                fwd_cnt,
                ..self.header(key, message.op, TYPE_STREAM)
            });
        }
    }
}

/// Connects to who listens for the guest's calls to `port`, without waiting.
fn connect_to(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(Path::new(&name))?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn connections_that_come_and_go_unheard_leave_nothing() {
        come_and_go(52);
    }

    #[test]
    fn nor_do_those_to_ports_as_callers_of_the_hosts_have() {
        come_and_go(FIRST_HOST_PORT + 7);
    }

    fn come_and_go(port: u32) {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("vsock");
        let name = format!("vsock_{port}");
        let listener = UnixListener::bind(folder.as_path().join(name)).unwrap();
        let host = Listener::bind(&path).unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let counters = Counters::default();
        let mut muxer = Muxer::new(3, false);
        let say = |muxer: &mut Muxer, op: Op| {
            let header = Header {
                src_cid: 3,
                dst_cid: HOST_CID,
                src_port: 9,
                dst_port: port,
                kind: TYPE_STREAM,
                op: op as u16,
                ..Header::default()
            };
            ram.write_slice(&header.to_bytes(), GuestAddress(0))
                .unwrap();
            let mut packet = Segments::default();
            packet.push(&ram, GuestAddress(0), 44).unwrap();
            muxer.hear(&host, &ram, &mut packet, &counters, Instant::now());
        };
        for _ in 0..100 {
            say(&mut muxer, Op::Request);
            listener.accept().unwrap();
            assert_eq!(muxer.turns.len(), 1);
            say(&mut muxer, Op::Reset);
            muxer.changes.clear();
        }
        assert_eq!((muxer.turns.len(), muxer.resets.len()), (0, 0));
        assert_eq!(
            (muxer.slots.len(), muxer.keys.len(), muxer.of_guest),
            (1, 0, 0)
        );
    }
}
