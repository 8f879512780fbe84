//! The common configuration (virtio 1.3 §4.1.4.3): the registers by which a driver negotiates and sets queues
//! up.

use super::super::controls::Controls;
use crate::virtio::interrupt::{NO_VECTOR, Vectors};
use crate::virtio::setup::{Area, Half};

/// A register, by its offset and width.
type Place = (u32, usize);

const DEVICE_FEATURE_SELECT: Place = (0x00, 4);
const DEVICE_FEATURE: Place = (0x04, 4);
const DRIVER_FEATURE_SELECT: Place = (0x08, 4);
const DRIVER_FEATURE: Place = (0x0c, 4);
const CONFIG_VECTOR: Place = (0x10, 2);
const NUM_QUEUES: Place = (0x12, 2);
const STATUS: Place = (0x14, 1);
const GENERATION: Place = (0x15, 1);
const QUEUE_SELECT: Place = (0x16, 2);
const QUEUE_SIZE: Place = (0x18, 2);
const QUEUE_VECTOR: Place = (0x1a, 2);
const QUEUE_ENABLE: Place = (0x1c, 2);
const QUEUE_NOTIFY_OFF: Place = (0x1e, 2);

/// Reads one register, by its own width, or both halves of one of 64 bits. False if that is none.
pub(super) fn read(
    controls: &mut Controls,
    vectors: &Vectors,
    offset: u64,
    data: &mut [u8],
) -> bool {
    if data.len() == 8 && address_at(offset).is_some() {
        let (low, high) = data.split_at_mut(4);
        return read(controls, vectors, offset, low) && read(controls, vectors, offset + 4, high);
    }
    match register(controls, vectors, offset, data.len()) {
        Some(value) => {
            data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
            true
        }
        None => false,
    }
}

fn register(controls: &mut Controls, vectors: &Vectors, offset: u64, width: usize) -> Option<u32> {
    let session = &controls.session;
    let value = match (u32::try_from(offset).ok()?, width) {
        DEVICE_FEATURE_SELECT => controls.device_features_page,
        DEVICE_FEATURE => controls.offered_features(),
        DRIVER_FEATURE_SELECT => controls.driver_features_page,
        DRIVER_FEATURE => session
            .negotiation
            .accepted_page(controls.driver_features_page),
        CONFIG_VECTOR => vectors.get(None).into(),
        NUM_QUEUES => u32::try_from(session.queues.len()).expect("there are few"),
        STATUS => session.read_status(),
        GENERATION => session.interrupt.generation() & 0xff,
        QUEUE_SELECT => controls.selected_queue,
        // "0 means the queue is unavailable" (§4.1.4.3).
        QUEUE_SIZE => controls.queue().map_or(0, |queue| queue.size()),
        QUEUE_VECTOR => vectors.get(selected(controls)).into(),
        QUEUE_ENABLE => controls.queue().is_some_and(|queue| queue.ready).into(),
        QUEUE_NOTIFY_OFF => controls.selected_queue,
        (_, 4) => {
            let (area, half) = address_at(offset)?;
            controls
                .queue()
                .map_or(0, |queue| queue.address(area, half))
        }
        _ => return None,
    };
    Some(value)
}

/// Writes one register, likewise. False if that is none, or may not be written now.
pub(super) fn write(controls: &mut Controls, vectors: &Vectors, offset: u64, data: &[u8]) -> bool {
    if data.len() == 8 && address_at(offset).is_some() {
        let (low, high) = data.split_at(4);
        return write(controls, vectors, offset, low) && write(controls, vectors, offset + 4, high);
    }
    let mut value = [0; 4];
    let (Ok(offset), Some(place)) = (u32::try_from(offset), value.get_mut(..data.len())) else {
        return false;
    };
    place.copy_from_slice(data);
    let value = u32::from_le_bytes(value);
    let vector = u16::try_from(value).unwrap_or(NO_VECTOR);
    match (offset, data.len()) {
        DEVICE_FEATURE_SELECT => controls.device_features_page = value,
        DRIVER_FEATURE_SELECT => controls.driver_features_page = value,
        DRIVER_FEATURE => return controls.accept_features(value),
        CONFIG_VECTOR => vectors.set(None, vector),
        STATUS => controls.session.write_status(value),
        QUEUE_SELECT => controls.selected_queue = value,
        QUEUE_SIZE => return controls.set_up(|queue| queue.set_size(value)),
        QUEUE_VECTOR => vectors.set(selected(controls), vector),
        // "The driver MUST NOT write a 0 to queue_enable" (§4.1.4.3.2).
        QUEUE_ENABLE => return value == 1 && controls.write_ready(value),
        (_, 4) => {
            let Some((area, half)) = address_at(offset.into()) else {
                return false;
            };
            return controls.set_address(area, half, value);
        }
        _ => return false,
    }
    true
}

/// The selected queue, as vectors know it: there are never so many that the last number is one's.
fn selected(controls: &Controls) -> Option<u16> {
    Some(u16::try_from(controls.selected_queue).unwrap_or(u16::MAX))
}

/// Which half of which of a queue's addresses is at an offset.
fn address_at(offset: u64) -> Option<(Area, Half)> {
    let place = match u32::try_from(offset).ok()? {
        0x20 => (Area::Descriptors, Half::Low),
        0x24 => (Area::Descriptors, Half::High),
        0x28 => (Area::Driver, Half::Low),
        0x2c => (Area::Driver, Half::High),
        0x30 => (Area::Device, Half::Low),
        0x34 => (Area::Device, Half::High),
        _ => return None,
    };
    Some(place)
}
