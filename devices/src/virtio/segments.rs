//! A run of guest memory made of the pieces that descriptors name, read or written from its front.
//!
//! Holds guest addresses and no pointers, so it may be kept while the device waits for its host.
//! Each access looks the memory up again; should it be gone by then, the access fails.

use std::io;

use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use super::GuestRam;

/// Why a device cannot read or write what a chain offers.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("the chain is {0} bytes too short")]
    TooShort(usize),
    #[error("access guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Guest bytes in one piece, so that one pointer and one length describe them to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: GuestAddress,
    len: usize,
}

/// Pieces of guest memory, consumed from the front.
#[derive(Debug, Default)]
pub struct Segments {
    pieces: Vec<Piece>,
    /// Pieces before this one are consumed.
    first: usize,
    /// Bytes not yet consumed.
    len: usize,
}

impl Segments {
    /// Forgets everything but keeps the room for the next chain.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Appends the guest's buffer, which may lie across several regions but wholly inside RAM.
    pub(super) fn push(
        &mut self,
        ram: &GuestRam,
        start: GuestAddress,
        len: u32,
    ) -> Result<(), AccessError> {
        let mut start = start;
        for slice in ram.get_slices(start, len as usize) {
            let len = slice?.len();
            self.pieces.push(Piece { start, len });
            self.len += len;
            start = GuestAddress(start.0.wrapping_add(len as u64));
        }
        Ok(())
    }

    /// Appends what is left of `other`.
    pub fn append(&mut self, other: &Self) {
        self.pieces.extend_from_slice(&other.pieces[other.first..]);
        self.len += other.len;
    }

    /// Number of pieces left.
    pub fn pieces(&self) -> usize {
        self.pieces.len() - self.first
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Consumes `count` bytes unseen, or all that is left.
    pub fn skip(&mut self, count: usize) {
        let mut count = count.min(self.len);
        self.len -= count;
        while count > 0 {
            let piece = &mut self.pieces[self.first];
            let step = count.min(piece.len);
            piece.start = GuestAddress(piece.start.0 + step as u64);
            piece.len -= step;
            count -= step;
            if piece.len == 0 {
                self.first += 1;
            }
        }
    }

    /// Drops all but the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        while self.len > len {
            let excess = self.len - len;
            let last = self
                .pieces
                .last_mut()
                .expect("a length above zero is held by pieces");
            let step = excess.min(last.len);
            last.len -= step;
            self.len -= step;
            if last.len == 0 {
                self.pieces.pop();
            }
        }
        self.first = self.first.min(self.pieces.len());
    }

    /// Moves the first `count` bytes into `front`, which forgets what it had.
    pub fn split_front(&mut self, count: usize, front: &mut Self) -> Result<(), AccessError> {
        self.check(count)?;
        front.clear();
        while front.len < count {
            let piece = self.pieces[self.first];
            let len = piece.len.min(count - front.len);
            front.pieces.push(Piece { len, ..piece });
            front.len += len;
            self.skip(len);
        }
        Ok(())
    }

    /// Takes the last byte away and says where it is: the place for a status that comes last.
    pub fn split_last(&mut self) -> Option<GuestAddress> {
        let start = self.len.checked_sub(1)?;
        let last = self.pieces.last()?;
        let address = GuestAddress(last.start.0 + (last.len as u64 - 1));
        self.truncate(start);
        Some(address)
    }

    /// Reads exactly `buffer.len()` bytes.
    pub fn read(&mut self, ram: &GuestRam, buffer: &mut [u8]) -> Result<(), AccessError> {
        self.check(buffer.len())?;
        let mut done = 0;
        self.consume(ram, buffer.len(), |slice| {
            slice.copy_to(&mut buffer[done..]);
            done += slice.len();
        })
    }

    /// Like [`read`](Self::read), without consuming. The guest may have written something else by the
    /// time that it is read.
    pub fn peek(&self, ram: &GuestRam, buffer: &mut [u8]) -> Result<(), AccessError> {
        self.check(buffer.len())?;
        let mut done = 0;
        for slice in self.slices(ram, buffer.len()) {
            let slice = slice?;
            slice.copy_to(&mut buffer[done..]);
            done += slice.len();
        }
        Ok(())
    }

    /// Reads one `T` as it lies in memory; virtio's fields are little-endian.
    pub fn read_obj<T: ByteValued>(&mut self, ram: &GuestRam) -> Result<T, AccessError> {
        let mut value = T::zeroed();
        self.read(ram, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes all of `bytes`, or nothing if there is not enough room.
    pub fn write(&mut self, ram: &GuestRam, bytes: &[u8]) -> Result<(), AccessError> {
        self.check(bytes.len())?;
        let mut done = 0;
        self.consume(ram, bytes.len(), |slice| {
            slice.copy_from(&bytes[done..]);
            done += slice.len();
        })
    }

    /// Fills `count` bytes with zero.
    pub fn zero(&mut self, ram: &GuestRam, count: usize) -> Result<(), AccessError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        self.check(count)?;
        let mut left = count;
        while left > 0 {
            let step = left.min(ZEROES.len());
            self.write(ram, &ZEROES[..step])?;
            left -= step;
        }
        Ok(())
    }

    /// The pieces as slices, at most `max_bytes` in all, without consuming them.
    pub fn slices<'m>(
        &self,
        ram: &'m GuestRam,
        max_bytes: usize,
    ) -> impl Iterator<Item = Result<VolatileSlice<'m>, AccessError>> {
        let mut left = max_bytes;
        self.pieces[self.first..].iter().map_while(move |piece| {
            let len = piece.len.min(left);
            left -= len;
            (len > 0).then(|| Ok(ram.get_slice(piece.start, len)?))
        })
    }

    fn check(&self, count: usize) -> Result<(), AccessError> {
        match count.checked_sub(self.len) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(AccessError::TooShort(missing)),
        }
    }

    fn consume(
        &mut self,
        ram: &GuestRam,
        count: usize,
        mut each: impl FnMut(VolatileSlice<'_>),
    ) -> Result<(), AccessError> {
        for slice in self.slices(ram, count) {
            each(slice?);
        }
        self.skip(count);
        Ok(())
    }
}

impl From<AccessError> for io::Error {
    fn from(error: AccessError) -> Self {
        io::Error::new(io::ErrorKind::InvalidInput, error)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// Two regions that touch at 0x1000, and a hole from 0x2000.
    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    fn segments(ram: &GuestRam, buffers: &[(u64, u32)]) -> Segments {
        let mut segments = Segments::default();
        for &(start, len) in buffers {
            segments.push(ram, GuestAddress(start), len).unwrap();
        }
        segments
    }

    #[test]
    fn a_buffer_across_two_regions_becomes_two_pieces() {
        let ram = ram();
        let segments = segments(&ram, &[(0xffe, 4), (0x10, 0)]);
        assert_eq!((segments.pieces(), segments.len()), (2, 4));
    }

    #[test]
    fn a_buffer_outside_ram_is_refused() {
        let mut segments = Segments::default();
        segments.push(&ram(), GuestAddress(0x1fff), 2).unwrap_err();
        segments
            .push(&ram(), GuestAddress(u64::MAX), 2)
            .unwrap_err();
        segments
            .push(&ram(), GuestAddress(0), u32::MAX)
            .unwrap_err();
    }

    #[test]
    fn what_is_written_across_pieces_is_read_back() {
        let ram = ram();
        let buffers = [(0xffe, 4), (0x20, 1), (0x100, 3)];
        segments(&ram, &buffers).write(&ram, b"abcdefgh").unwrap();
        let mut source = segments(&ram, &buffers);
        let mut front = [0; 5];
        source.read(&ram, &mut front).unwrap();
        assert_eq!(&front, b"abcde");
        assert_eq!(
            source.read_obj::<u16>(&ram).unwrap(),
            u16::from_le_bytes(*b"fg")
        );
        assert_eq!(source.len(), 1);
    }

    #[test]
    fn an_access_beyond_the_end_consumes_nothing() {
        let ram = ram();
        let mut segments = segments(&ram, &[(0, 3)]);
        assert!(matches!(
            segments.write(&ram, b"abcd"),
            Err(AccessError::TooShort(1))
        ));
        segments.read_obj::<u32>(&ram).unwrap_err();
        segments.zero(&ram, 4).unwrap_err();
        assert_eq!(segments.len(), 3);
    }

    #[test]
    fn the_last_byte_can_be_set_aside() {
        let ram = ram();
        let mut segments = segments(&ram, &[(0x10, 2), (0x30, 1)]);
        assert_eq!(segments.split_last(), Some(GuestAddress(0x30)));
        assert_eq!(segments.split_last(), Some(GuestAddress(0x11)));
        assert_eq!((segments.pieces(), segments.len()), (1, 1));
        assert_eq!(segments.split_last(), Some(GuestAddress(0x10)));
        assert_eq!(segments.split_last(), None);
    }

    #[test]
    fn skipping_and_truncating_meet_in_the_middle() {
        let ram = ram();
        let mut segments = segments(&ram, &[(0x10, 4), (0x20, 4), (0x30, 4)]);
        segments.skip(5);
        segments.truncate(2);
        let places: Vec<_> = segments.pieces[segments.first..].to_vec();
        assert_eq!(
            places,
            [Piece {
                start: GuestAddress(0x21),
                len: 2
            }]
        );
        segments.skip(usize::MAX);
        segments.truncate(0);
        assert_eq!((segments.pieces(), segments.len()), (0, 0));
    }

    #[test]
    fn zeroes_fill_more_than_one_page() {
        let ram = ram();
        ram.write_slice(&[0xff; 0x2000], GuestAddress(0)).unwrap();
        segments(&ram, &[(0, 0x1800)]).zero(&ram, 0x1800).unwrap();
        let mut bytes = [1; 0x2000];
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes[..0x1800].iter().all(|&byte| byte == 0));
        assert!(bytes[0x1800..].iter().all(|&byte| byte == 0xff));
    }
}
