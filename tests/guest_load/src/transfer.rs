//! Bytes that both ends of a transfer can make and check.

use std::io::{self, Read, Write};

/// FNV-1a over what came, and how much that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    pub hash: u64,
    pub len: u64,
}

impl Checksum {
    const BYTES: usize = 16;

    fn new() -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            len: 0,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.len += bytes.len() as u64;
    }

    /// Of all that `from` has until its end.
    pub fn of_all(from: &mut impl Read) -> io::Result<Self> {
        let mut checksum = Self::new();
        let mut bytes = vec![0; 64 << 10];
        loop {
            match from.read(&mut bytes)? {
                0 => return Ok(checksum),
                count => checksum.add(&bytes[..count]),
            }
        }
    }

    /// Of what [`send`] sends.
    pub fn of_sent(seed: u64, len: u64) -> Self {
        let mut checksum = Self::new();
        pieces(seed, len).for_each(|piece| checksum.add(&piece));
        checksum
    }

    /// What the other end answers with.
    pub fn seed(&self) -> u64 {
        self.hash | 1
    }

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.hash.to_le_bytes());
        bytes[8..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut word = || {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes)?;
            io::Result::Ok(u64::from_le_bytes(bytes))
        };
        Ok(Self {
            hash: word()?,
            len: word()?,
        })
    }
}

/// Sends `len` bytes that follow from `seed`, which is not 0.
pub fn send(to: &mut impl Write, seed: u64, len: u64) -> io::Result<()> {
    pieces(seed, len).try_for_each(|piece| to.write_all(&piece))
}

/// Bytes of a record.
pub const RECORD_LEN: usize = 16 << 10;

/// One of a file of records, by its place.
pub fn record(number: u64) -> Vec<u8> {
    pieces(number + 1, RECORD_LEN as u64).flatten().collect()
}

/// Pieces of bytes by xorshift.
fn pieces(seed: u64, len: u64) -> impl Iterator<Item = Vec<u8>> {
    const PIECE: usize = 16 << 10;
    let mut state = seed;
    let mut left = len;
    std::iter::from_fn(move || {
        let size = usize::try_from(left.min(PIECE as u64)).expect("at most a piece");
        left -= size as u64;
        let mut piece = Vec::with_capacity(PIECE);
        while piece.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend_from_slice(&state.to_le_bytes());
        }
        piece.truncate(size);
        (size > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_has_the_checksum_foretold() {
        let mut bytes = Vec::new();
        send(&mut bytes, 7, 100_001).unwrap();
        let checksum = Checksum::of_all(&mut bytes.as_slice()).unwrap();
        assert_eq!(checksum, Checksum::of_sent(7, 100_001));
        assert_ne!(checksum, Checksum::of_sent(9, 100_001));
        let read = Checksum::read(&mut checksum.to_bytes().as_slice()).unwrap();
        assert_eq!(read, checksum);
    }
}
