//! What is where behind the BAR, and the capabilities that say so (virtio 1.3 §4.1.4).

use crate::pci::{COMMAND, ConfigSpace};

/// Bytes of memory behind the BAR, in pages of one region each.
pub const BAR_LEN: u32 = 0x8000;
const PAGE: u32 = 0x1000;

const COMMON: u32 = 0;
/// Registers of the common configuration, without those of features that are not offered.
const COMMON_LEN: u32 = 0x38;
const ISR: u32 = PAGE;
const DEVICE: u32 = 2 * PAGE;
/// Where the queues are notified, one after the other.
pub const NOTIFY: u32 = 3 * PAGE;
/// From one queue's address to the next, in bytes: `notify_off_multiplier`.
pub const NOTIFY_STRIDE: u32 = 4;
pub(super) const TABLE: u32 = 4 * PAGE;
pub(super) const PENDING: u32 = 5 * PAGE;

/// Types of capabilities: `cfg_type`.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

const VENDOR_SPECIFIC: u8 = 0x09;
/// Bit of the status: an interrupt is pending.
const INTERRUPT_STATUS: u32 = 1 << 19;

/// A part of the memory behind the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    Table,
    Pending,
}

impl Region {
    /// The region of an offset into the memory, and the offset within it.
    pub(super) fn of(offset: u64) -> Option<(Self, u64)> {
        let region = match u32::try_from(offset).ok()? / PAGE * PAGE {
            COMMON => Self::Common,
            ISR => Self::Isr,
            DEVICE => Self::Device,
            NOTIFY => Self::Notify,
            TABLE => Self::Table,
            PENDING => Self::Pending,
            _ => return None,
        };
        Some((region, offset % u64::from(PAGE)))
    }
}

/// Adds the five capabilities of virtio.
pub(super) fn add_capabilities(config: &mut ConfigSpace) -> Access {
    let mut add = |kind: u8, offset: u32, len: u32, more: Option<u32>, writable: &[u8]| {
        // cap_len, cfg_type, bar, id and two bytes of padding, offset and length.
        let whole = if more.is_some() { 20 } else { 16 };
        let mut body = vec![whole, kind, 0, 0, 0, 0];
        for word in [Some(offset), Some(len), more].into_iter().flatten() {
            body.extend(word.to_le_bytes());
        }
        config.add_capability(VENDOR_SPECIFIC, &body, writable)
    };
    add(COMMON_CFG, COMMON, COMMON_LEN, None, &[]);
    add(ISR_CFG, ISR, 1, None, &[]);
    add(DEVICE_CFG, DEVICE, PAGE, None, &[]);
    add(NOTIFY_CFG, NOTIFY, PAGE, Some(NOTIFY_STRIDE), &[]);
    // The driver writes which BAR, offset and length, and then the data.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    Access(add(PCI_CFG, 0, 0, Some(0), &writable))
}

/// The capability by which a driver reaches the BAR through configuration space (§4.1.4.9), by its first
/// register.
#[derive(Debug)]
pub(super) struct Access(usize);

impl Access {
    /// Where an access to `register` is to go, and its length. None if it is none to the capability's data, or
    /// asks for what there is not.
    pub(super) fn target(&self, config: &ConfigSpace, register: usize) -> Option<(u64, usize)> {
        let Self(first) = *self;
        if register != first + 4 {
            return None;
        }
        let [bar, ..] = config.read(first + 1).to_le_bytes();
        let (offset, len) = (config.read(first + 2), config.read(first + 3));
        let fits = offset.checked_add(len).is_some_and(|end| end <= BAR_LEN);
        let is_one = bar == 0 && matches!(len, 1 | 2 | 4) && offset % len == 0 && fits;
        is_one.then(|| (offset.into(), usize::try_from(len).expect("it is short")))
    }
}

/// What the status in `register` has besides: whether an interrupt is pending, in words of INTx.
pub(super) fn interrupt_status(register: usize, pending: bool) -> u32 {
    if register == COMMAND && pending {
        INTERRUPT_STATUS
    } else {
        0
    }
}
