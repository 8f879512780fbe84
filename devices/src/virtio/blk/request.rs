//! What the guest asks of a disk, read from a chain and checked against the disk's limits before
//! anything is done (virtio 1.3 §5.2.6, Device Operation).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR;
use crate::virtio::{GuestRam, Segments};

/// Most bytes of one read or write: four times what Linux makes of its own accord. The queue's thread
/// is at a request until it is done.
pub(super) const MAX_TRANSFER: u64 = 16 << 20;
/// Ranges one discard request may name.
pub(super) const MAX_DISCARD_RANGES: u32 = 16;
/// Sectors one discarded range may have: 256 MiB.
pub(super) const MAX_DISCARD: u32 = 1 << 19;
/// Ranges one write-zeroes request may name.
pub(super) const MAX_ZERO_RANGES: u32 = 4;
/// Sectors one zeroed range may have: 16 MiB, as they may have to be written.
pub(super) const MAX_ZEROES: u32 = 1 << 15;

/// Bytes that the guest reads as the disk's serial number.
pub(super) const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Length of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: usize = 16;

/// What limits a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) sectors: u64,
    /// Bytes of a logical block.
    pub(super) block: u32,
    pub(super) readonly: bool,
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// VIRTIO_BLK_S_IOERR: it reaches outside the disk, or asks for what may not be.
    Invalid,
    /// VIRTIO_BLK_S_UNSUPP: this device has no such request.
    Unsupported,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// A request that may be carried out as it is. Offsets are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the chain's writable part.
    Read {
        offset: u64,
    },
    /// Store the chain's readable part.
    Write {
        offset: u64,
    },
    Flush,
    Id,
    Discard(Vec<Range>),
    Zero(Vec<Range>),
}

impl Request {
    /// Reads the header from the front of `out`, and decides. `room` is the writable part without
    /// the status byte.
    pub(super) fn parse(
        ram: &GuestRam,
        out: &mut Segments,
        room: &Segments,
        limits: Limits,
    ) -> Result<Self, Refusal> {
        let mut header = [0; 16];
        out.read(ram, &mut header).map_err(|_| Refusal::Invalid)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Ok(Self::Read {
                offset: limits.transfer(sector, room.len())?,
            }),
            VIRTIO_BLK_T_OUT => {
                limits.writable()?;
                Ok(Self::Write {
                    offset: limits.transfer(sector, out.len())?,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Id),
            VIRTIO_BLK_T_DISCARD => {
                // "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard commands
                // if the unmap flag is set" (virtio 1.3 §5.2.6.2).
                let known = 0;
                let most = (MAX_DISCARD_RANGES, MAX_DISCARD);
                limits.ranges(ram, out, most, known).map(Self::Discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let known = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let most = (MAX_ZERO_RANGES, MAX_ZEROES);
                limits.ranges(ram, out, most, known).map(Self::Zero)
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl Limits {
    fn writable(self) -> Result<(), Refusal> {
        if self.readonly {
            Err(Refusal::Invalid)
        } else {
            Ok(())
        }
    }

    /// The offset of a transfer of `len` bytes, which must be whole blocks inside the disk.
    fn transfer(self, sector: u64, len: usize) -> Result<u64, Refusal> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR) || len > MAX_TRANSFER {
            return Err(Refusal::Invalid);
        }
        self.range(sector, len / SECTOR)
    }

    /// The offset of `count` sectors from `sector`.
    fn range(self, sector: u64, count: u64) -> Result<u64, Refusal> {
        let end = sector.checked_add(count).ok_or(Refusal::Invalid)?;
        // No overflow: the disk's size in bytes is a u64.
        let aligned = |sectors: u64| (sectors * SECTOR).is_multiple_of(self.block.into());
        if end > self.sectors || !aligned(sector) || !aligned(count) {
            return Err(Refusal::Invalid);
        }
        Ok(sector * SECTOR)
    }

    /// The ranges that `out` names, of which there may be so many with so many sectors each. `known`
    /// are the flags the request may have.
    fn ranges(
        self,
        ram: &GuestRam,
        out: &mut Segments,
        (max_ranges, max_sectors): (u32, u32),
        known: u32,
    ) -> Result<Vec<Range>, Refusal> {
        self.writable()?;
        let count = out.len() / RANGE_LEN;
        let too_many = count > max_ranges as usize;
        if out.is_empty() || too_many || !out.len().is_multiple_of(RANGE_LEN) {
            return Err(Refusal::Invalid);
        }
        (0..count)
            .map(|_| self.next_range(ram, out, max_sectors, known))
            .collect()
    }

    fn next_range(
        self,
        ram: &GuestRam,
        out: &mut Segments,
        max_sectors: u32,
        known: u32,
    ) -> Result<Range, Refusal> {
        let mut fields = || out.read_obj::<u32>(ram).map(u32::from_le);
        let fields = (|| Ok([fields()?, fields()?, fields()?, fields()?]))();
        let [low, high, count, flags] =
            fields.map_err(|_: crate::virtio::AccessError| Refusal::Invalid)?;
        if flags & !known != 0 {
            return Err(Refusal::Unsupported);
        }
        if count > max_sectors {
            return Err(Refusal::Invalid);
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        let offset = self.range(sector, count.into())?;
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        Ok(Range {
            offset,
            len: u64::from(count) * SECTOR,
            unmap,
        })
    }
}
