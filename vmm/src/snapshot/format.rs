//! The form of a saved state: one JSON object, whose header says whether the rest can be understood and is
//! whole.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;

/// What a file of ours holds.
pub(super) trait Document: Serialize + DeserializeOwned {
    /// What the document calls itself.
    const MAGIC: &'static str;
    /// Goes up with each change after which an older podvmm, or the same document, is misunderstood.
    const VERSION: u32;
}

const ARCH: &str = std::env::consts::ARCH;

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    magic: String,
    arch: String,
    version: u32,
    /// Length of `state`, in bytes.
    length: usize,
    /// CRC-32 (IEEE) of `state`.
    crc32: u32,
    #[serde(borrow)]
    state: &'a RawValue,
}

/// Why a file is none that can be used.
#[derive(Debug, Error)]
pub enum FormatError {
    #[error("it is truncated, or no JSON")]
    Json(#[source] serde_json::Error),
    #[error("it is no {0}")]
    Magic(&'static str),
    #[error("it is of a VM on {0}, this is podvmm for {ARCH}")]
    Arch(String),
    #[error("its format is version {found}, this podvmm reads {expected}")]
    Version { expected: u32, found: u32 },
    #[error("its state is {found} bytes long and should be {expected}")]
    Length { expected: usize, found: usize },
    #[error("it is damaged: its checksum is another")]
    Checksum,
    #[error("its state is not as podvmm writes it")]
    State(#[source] serde_json::Error),
}

pub(super) fn encode<D: Document>(document: &D) -> Result<String, serde_json::Error> {
    let state = serde_json::value::to_raw_value(document)?;
    serde_json::to_string(&Envelope {
        magic: D::MAGIC.into(),
        arch: ARCH.into(),
        version: D::VERSION,
        length: state.get().len(),
        crc32: crc32fast::hash(state.get().as_bytes()),
        state: &state,
    })
}

pub(super) fn decode<D: Document>(bytes: &[u8]) -> Result<D, FormatError> {
    #[derive(Deserialize)]
    struct Header {
        magic: Option<String>,
        arch: Option<String>,
        version: Option<u32>,
    }
    // What another version has besides is its own affair, so first what never changes.
    let header: Header = serde_json::from_slice(bytes).map_err(FormatError::Json)?;
    match (header.magic, header.arch, header.version) {
        (Some(magic), _, _) if magic != D::MAGIC => return Err(FormatError::Magic(D::MAGIC)),
        (Some(_), Some(arch), _) if arch != ARCH => return Err(FormatError::Arch(arch)),
        (Some(_), Some(_), Some(found)) if found != D::VERSION => {
            let expected = D::VERSION;
            return Err(FormatError::Version { expected, found });
        }
        (Some(_), Some(_), Some(_)) => {}
        _ => return Err(FormatError::Magic(D::MAGIC)),
    }
    let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(FormatError::Json)?;
    let state = envelope.state.get();
    if state.len() != envelope.length {
        return Err(FormatError::Length {
            expected: envelope.length,
            found: state.len(),
        });
    }
    if crc32fast::hash(state.as_bytes()) != envelope.crc32 {
        return Err(FormatError::Checksum);
    }
    serde_json::from_str(state).map_err(FormatError::State)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::State;
    use super::*;

    fn sealed(state: &str) -> Value {
        json!({
            "magic": State::MAGIC, "arch": ARCH, "version": State::VERSION,
            "length": state.len(), "crc32": crc32fast::hash(state.as_bytes()),
            "state": serde_json::from_str::<Value>(state).unwrap(),
        })
    }

    fn refusal(envelope: &Value) -> String {
        decode::<State>(envelope.to_string().as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_reason() {
        let ours = State::VERSION;
        let version = format!("its format is version 1, this podvmm reads {ours}");
        let cases = [
            ("magic", json!("firecracker"), "it is no podvmm snapshot"),
            ("magic", Value::Null, "it is no podvmm snapshot"),
            (
                "arch",
                json!("riscv64"),
                "it is of a VM on riscv64, this is podvmm for x86_64",
            ),
            ("version", json!(1), &version),
            (
                "length",
                json!(3),
                "its state is 2 bytes long and should be 3",
            ),
            ("crc32", json!(3), "it is damaged: its checksum is another"),
        ];
        for (field, value, why) in cases {
            let mut envelope = sealed("{}");
            envelope[field] = value;
            assert_eq!(refusal(&envelope), why, "{field}");
        }
        assert_eq!(
            refusal(&sealed("{}")),
            "its state is not as podvmm writes it"
        );
        let text = sealed("{}").to_string();
        let cut = decode::<State>(&text.as_bytes()[..text.len() - 1]).unwrap_err();
        assert_eq!(cut.to_string(), "it is truncated, or no JSON");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            prop_assert!(decode::<State>(&bytes).is_err());
        }
    }
}
