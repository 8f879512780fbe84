//! Reading, patching and writing JSON.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use thiserror::Error;

/// Why a body is not what is wanted.
#[derive(Debug, Error)]
#[error("{path}")]
pub struct Misread {
    /// Where in the body, `.` for all of it.
    path: String,
    source: serde_json::Error,
}

/// Reads `body`. Where it is no JSON, the error says in which line.
pub(crate) fn value(body: &[u8]) -> Result<Value, Misread> {
    serde_json::from_slice(body).map_err(|source| Misread {
        path: ".".into(),
        source,
    })
}

/// Reads a `T` of `value`. Where it is none, the error names the field.
pub(crate) fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, Misread> {
    serde_path_to_error::deserialize(value).map_err(|error| Misread {
        path: error.path().to_string(),
        source: error.into_inner(),
    })
}

/// RFC 7396: objects are merged, null takes away, and anything else replaces.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let target = target.as_object_mut().expect("just made one");
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Takes every field that is null away: it asks for what is so without it.
pub(crate) fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// Writes `value` in ASCII alone: Kata's Rust client decodes answers piece by piece and panics
/// where a piece ends within a character.
pub(crate) fn ascii(value: &Value) -> String {
    let text = value.to_string();
    if text.is_ascii() {
        return text;
    }
    // Outside strings JSON is ASCII, so what is not is a part of one.
    let mut ascii = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_ascii() {
            ascii.push(char);
        } else {
            let mut units = [0; 2];
            for unit in char.encode_utf16(&mut units) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_are_ascii() {
        let value = json!({"path": "/größe/🦀"});
        let text = ascii(&value);
        assert!(text.is_ascii());
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
