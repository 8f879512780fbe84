//! Sizes and counts with their ranges.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Why a number was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    /// A text that is not a size.
    #[error("'{0}' is not a size: write bytes, or a number with K, M, G or T")]
    NotASize(String),
    /// A size larger than 64 bits hold.
    #[error("'{0}' is more than 16 EiB")]
    SizeOverflow(String),
    /// A size outside the range of RAM sizes.
    #[error("{0} of RAM: {min} to {max} is possible", min = RamSize::MIN, max = RamSize::MAX)]
    RamOutOfRange(ByteSize),
    /// A size of RAM that is not whole pages of 2 MiB.
    #[error("{0} of RAM is not a multiple of 2M")]
    RamUnaligned(ByteSize),
    /// A number outside the range of CPU counts.
    #[error("{0} vCPUs: 1 to {max} is possible", max = CpuCount::MAX)]
    CpusOutOfRange(u32),
}

/// A number of bytes, written plainly or with a binary suffix: `512M`, `4G`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            Some(b'T' | b't') => (&text[..text.len() - 1], 40),
            _ => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(UnitError::NotASize(text.into()));
        }
        digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .map(ByteSize)
            .ok_or_else(|| UnitError::SizeOverflow(text.into()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= KIB * MIB && bytes % (KIB * MIB) == 0 => {
                write!(f, "{}G", bytes / (KIB * MIB))
            }
            bytes if bytes >= MIB && bytes % MIB == 0 => write!(f, "{}M", bytes / MIB),
            bytes if bytes >= KIB && bytes % KIB == 0 => write!(f, "{}K", bytes / KIB),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

/// Guest RAM: 32 MiB to 1 TiB in steps of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ByteSize", into = "ByteSize")]
pub struct RamSize(ByteSize);

impl RamSize {
    /// The least RAM of a guest: less does not hold a kernel, its tables and an initramfs.
    pub const MIN: ByteSize = ByteSize(32 * MIB);
    /// The most RAM of a guest: what 40-bit physical addresses reach, the least any 64-bit CPU has.
    pub const MAX: ByteSize = ByteSize(KIB * KIB * MIB);

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0.0
    }
}

impl Default for RamSize {
    /// A guest's RAM if no size is given: 512 MiB.
    fn default() -> Self {
        Self(ByteSize(512 * MIB))
    }
}

impl TryFrom<ByteSize> for RamSize {
    type Error = UnitError;

    fn try_from(size: ByteSize) -> Result<Self, UnitError> {
        if size < Self::MIN || size > Self::MAX {
            Err(UnitError::RamOutOfRange(size))
        } else if !size.0.is_multiple_of(2 * MIB) {
            Err(UnitError::RamUnaligned(size))
        } else {
            Ok(Self(size))
        }
    }
}

impl From<RamSize> for ByteSize {
    fn from(size: RamSize) -> Self {
        size.0
    }
}

impl FromStr for RamSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        text.parse::<ByteSize>()?.try_into()
    }
}

impl fmt::Display for RamSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number of vCPUs: 1 to 254, as many as an MP table can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct CpuCount(u8);

impl CpuCount {
    /// One vCPU.
    pub const ONE: Self = Self(1);
    /// APIC ids are one byte; 255 means all and one belongs to the IOAPIC.
    pub const MAX: Self = Self(254);

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u32> for CpuCount {
    type Error = UnitError;

    fn try_from(count: u32) -> Result<Self, UnitError> {
        match u8::try_from(count) {
            Ok(few) if (Self::ONE.0..=Self::MAX.0).contains(&few) => Ok(Self(few)),
            _ => Err(UnitError::CpusOutOfRange(count)),
        }
    }
}

impl From<CpuCount> for u32 {
    fn from(count: CpuCount) -> Self {
        count.0.into()
    }
}

impl fmt::Display for CpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_suffixes() {
        let parsed =
            ["4096", "4K", "512M", "4g", "1T"].map(|text| text.parse::<ByteSize>().unwrap().0);
        assert_eq!(parsed, [4096, 4096, 512 << 20, 4 << 30, 1 << 40]);
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let refused = ["", "M", "-1", "1.5G", "0x10", "12Q", " 1", "+1"];
        assert!(
            refused
                .iter()
                .all(|text| text.parse::<ByteSize>() == Err(UnitError::NotASize((*text).into())))
        );
    }

    #[test]
    fn a_size_past_64_bits_is_refused() {
        assert_eq!(
            "16777216T".parse::<ByteSize>(),
            Err(UnitError::SizeOverflow("16777216T".into()))
        );
    }

    #[test]
    fn ram_has_a_range_and_a_step() {
        assert!("32M".parse::<RamSize>().is_ok());
        assert!("1T".parse::<RamSize>().is_ok());
        assert_eq!(
            "30M".parse::<RamSize>(),
            Err(UnitError::RamOutOfRange(ByteSize(30 << 20)))
        );
        assert!(matches!(
            "1025G".parse::<RamSize>(),
            Err(UnitError::RamOutOfRange(_))
        ));
        assert!(matches!(
            "33M".parse::<RamSize>(),
            Err(UnitError::RamUnaligned(_))
        ));
    }

    #[test]
    fn cpu_counts_are_1_to_254() {
        assert_eq!(CpuCount::try_from(254).map(CpuCount::get), Ok(254));
        let refused = [0, 255, 256, u32::MAX];
        assert!(
            refused
                .iter()
                .all(|count| CpuCount::try_from(*count).is_err())
        );
    }

    #[test]
    fn sizes_print_with_the_largest_whole_unit() {
        let printed = [
            ByteSize(1 << 30),
            ByteSize(512 << 20),
            ByteSize(1536),
            ByteSize(4096),
        ]
        .map(|size| size.to_string());
        assert_eq!(printed, ["1G", "512M", "1536 bytes", "4K"]);
    }
}
