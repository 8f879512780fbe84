//! KVM's structures as a saved state has them: their bytes, in hexadecimal.

use std::borrow::Cow;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// One of KVM's structures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw<T>(pub(super) T);

/// Any number of one of KVM's structures.
#[derive(Clone, Debug)]
pub(super) struct RawList<T>(pub(super) Vec<T>);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = bytes(deserializer)?;
        let value = T::read_from_bytes(&bytes).map_err(|_| {
            let (found, expected) = (bytes.len(), size_of::<T>());
            D::Error::custom(format_args!("{found} bytes instead of {expected}"))
        })?;
        Ok(Self(value))
    }
}

impl<T: IntoBytes + Immutable> Serialize for RawList<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(self.0.as_slice().as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for RawList<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = bytes(deserializer)?;
        let items = bytes.chunks(size_of::<T>()).map(T::read_from_bytes);
        let items = items.collect::<Result<_, _>>().map_err(|_| {
            let (found, size) = (bytes.len(), size_of::<T>());
            D::Error::custom(format_args!("{found} bytes are no multiple of {size}"))
        })?;
        Ok(Self(items))
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    let digit = |digit: u8| {
        char::from(digit)
            .to_digit(16)
            .and_then(|it| u8::try_from(it).ok())
    };
    let byte = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    let bytes = text.as_bytes().chunks(2).map(byte);
    bytes
        .collect::<Option<_>>()
        .ok_or_else(|| D::Error::custom("not bytes in hexadecimal"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes: [u8; 24], words: Vec<u32>) {
            let text = serde_json::to_string(&Raw(bytes)).unwrap();
            prop_assert_eq!(serde_json::from_str::<Raw<[u8; 24]>>(&text).unwrap().0, bytes);
            let text = serde_json::to_string(&RawList(words.clone())).unwrap();
            prop_assert_eq!(serde_json::from_str::<RawList<u32>>(&text).unwrap().0, words);
        }

        #[test]
        fn anything_else_is_refused(text: String) {
            let json = serde_json::to_string(&text).unwrap();
            let fits = text.len() == 4 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
            prop_assert_eq!(serde_json::from_str::<Raw<u16>>(&json).is_ok(), fits);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_named() {
        let refusal = |text: &str| {
            serde_json::from_str::<Raw<u32>>(text)
                .unwrap_err()
                .to_string()
        };
        assert!(refusal(r#""0102""#).starts_with("2 bytes instead of 4"));
        assert!(refusal(r#""012""#).starts_with("not bytes in hexadecimal"));
    }
}
