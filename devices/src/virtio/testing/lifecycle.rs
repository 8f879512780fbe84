//! The life that every device must be able to lead.

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{Guest, LIVE, Wiring};
use crate::virtio::VirtioDevice;

/// Takes a device through its life, over each transport: activate, work, pause, resume, state, restore into another
/// one that `make` makes, reset, activate again. `work` must leave no buffers behind, and works
/// each time.
pub fn lifecycle<D: VirtioDevice + 'static>(
    make: impl Fn() -> D,
    mut work: impl FnMut(&mut Guest),
) {
    for wiring in Wiring::ALL {
        life(wiring, &make, &mut work);
    }
}

fn life<D: VirtioDevice + 'static>(
    wiring: Wiring,
    make: &impl Fn() -> D,
    work: &mut impl FnMut(&mut Guest),
) {
    let guest = Guest::new_on(wiring, make());
    let mut guest = guest.move_to(make);
    assert_eq!(guest.status(), 0, "a device without a driver has a state");
    guest.settle();
    assert_eq!(
        guest.runner.running(),
        0,
        "a handler runs before the driver is there"
    );
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE);
    assert!(
        guest.runner.running() > 0,
        "no handler runs once the driver is ready"
    );
    work(&mut guest);

    guest.transport.pause().expect("nothing is under way");
    assert_eq!(
        guest.runner.running(),
        0,
        "a handler runs while the device is paused"
    );
    guest.transport.pause().expect("nothing is under way");
    guest.transport.resume().expect("resume");
    guest.settle();
    work(&mut guest);
    guest.transport.drain();
    guest.transport.resume().expect("resume after draining");
    guest.settle();
    work(&mut guest);

    let mut guest = guest.move_to(make);
    assert_eq!(guest.status(), LIVE, "a restored device forgot its driver");
    assert_eq!(
        guest.runner.running(),
        0,
        "a handler runs before a restored device is resumed"
    );
    guest.transport.resume().expect("resume a restored device");
    guest.settle();
    work(&mut guest);
    let mut guest = guest.move_to(make);
    guest.transport.resume().expect("resume it once more");
    guest.settle();
    work(&mut guest);

    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.runner.running(), 0, "a handler runs after the reset");
    guest
        .transport
        .resume()
        .expect("resume a device that has no handlers");
    // Without the event index, and with the smallest queues.
    guest.start(!(1 << VIRTIO_RING_F_EVENT_IDX), 8);
    assert_eq!(guest.status(), LIVE);
    work(&mut guest);
    guest.start(u64::MAX, 16);
    work(&mut guest);
    guest.transport.pause().expect("nothing is under way");
    guest.write(VIRTIO_MMIO_STATUS, 0);
    guest.start(u64::MAX, 16);
    assert_eq!(guest.status(), LIVE);
    work(&mut guest);
}
