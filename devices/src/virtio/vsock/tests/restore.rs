//! What a guest hears that goes on with another device: of its connections, which are gone.

use super::*;

const EVENT: usize = 2;

impl Bench {
    /// The same guest with another device.
    fn restored(self) -> Self {
        let Self { folder, guest } = self;
        let guest = guest.move_to(|| device(&folder));
        Self { folder, guest }
    }

    /// Offers the device room for an event.
    fn expects_an_event(&mut self) {
        self.guest.add(EVENT, &[Buffer::In(8)]).unwrap();
    }

    /// Whether the guest hears, once it goes on, that its connections are gone.
    fn is_told(&mut self) -> bool {
        self.guest.transport.resume().unwrap();
        self.guest.settle();
        self.has_event()
    }

    fn has_event(&mut self) -> bool {
        let event = self.guest.take(EVENT);
        event.inspect(|event| assert_eq!(event, &[0; 4])).is_some()
    }
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut bench = Bench::new();
    let (mut stream, _) = bench.connected();
    bench.expects_an_event();
    let mut bench = bench.restored();
    assert!(is_at_its_end(&mut stream));
    assert!(bench.is_told());
}

#[test]
fn a_restored_guest_without_connections_hears_of_new_ones_at_once() {
    let mut bench = Bench::new();
    let (_stream, header) = bench.connected();
    bench.say(with(header, Op::Reset), &[]);
    bench.expects_an_event();
    let mut bench = bench.restored();
    let _stream = bench.caller("CONNECT 1024\n");
    assert!(!bench.is_told());
    let (request, _) = bench.hear().unwrap();
    assert_eq!(request.op, Op::Request as u16);
    assert_ne!(request.src_port, header.dst_port);
    assert!(!bench.has_event());
}

#[test]
fn a_reset_the_guest_has_not_taken_outlives_the_device() {
    let mut bench = Bench::new();
    bench.say(from_guest(Op::Data, 9, 52), b"x");
    bench.expects_an_event();
    assert!(bench.restored().is_told());
}

#[test]
fn a_guest_that_was_not_told_of_a_restore_is_told_after_the_next() {
    let mut bench = Bench::new();
    let _connected = bench.connected();
    let mut bench = bench.restored();
    bench.expects_an_event();
    assert!(bench.restored().is_told());
}

#[test]
fn a_guest_whose_address_is_another_is_told() {
    let mut bench = Bench::new();
    bench.expects_an_event();
    let Bench { folder, guest } = bench;
    let guest = guest.carry_to(|| {
        let socket = folder.as_path().join("vsock");
        let cid = CID + 1;
        Vsock::new(VsockConfig { cid, socket }).unwrap()
    });
    assert!(Bench { folder, guest }.is_told());
}

#[test]
fn new_connections_wait_until_the_guest_has_ended_the_old_ones() {
    let mut bench = Bench::new();
    let (_, old) = bench.connected();
    bench.expects_an_event();
    bench.expects_an_event();
    let mut bench = bench.restored();
    let _stream = bench.caller("CONNECT 1024\n");
    bench.guest.transport.resume().unwrap();
    assert_eq!(bench.hear(), None);
    assert!(bench.has_event());
    assert_eq!(bench.hear(), None);
    // A driver kicks only when asked to: by avail_event, at the end of the used ring.
    let used = bench.guest.areas(EVENT)[2];
    let avail_event = GuestAddress(used + 4 + 8 * 16);
    let asked: u16 = bench.guest.ram().read_obj(avail_event).unwrap();
    assert_eq!(asked, 2, "a kick for the third buffer");
    // Its buffer comes back when the driver has done as it was told.
    bench.expects_an_event();
    bench.guest.kick(EVENT);
    bench.guest.settle();
    let (request, _) = bench.hear().unwrap();
    assert_eq!(request.op, Op::Request as u16);
    assert_ne!(request.src_port, old.dst_port);
}
