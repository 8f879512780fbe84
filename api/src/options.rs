//! `key=value,key=value`: how a part of a VM is written on a command line.
//!
//! The keys are those of the part's JSON, or shorter words for them ([`SHORT`]), and a value is read as
//! what the part's field is: `on` and `off` for a boolean, `512M` for a number of bytes. A value cannot
//! contain a comma.

use std::fmt::Display;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use thiserror::Error;

use crate::units::ByteSize;

/// Why an option's text was refused.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// A part without `=`.
    #[error("'{0}' is not of the form key=value")]
    NotAPair(String),
    /// A key that is given twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A key the option does not have.
    #[error("there is no key '{key}', the keys are {known}")]
    UnknownKey {
        /// The key that was given.
        key: String,
        /// The keys the option has.
        known: String,
    },
    /// A value that is none for its key.
    #[error("{key}: {reason}")]
    Value {
        /// Key of the value.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that is none, before it is known of which key.
    #[error("{0}")]
    Reason(String),
}

impl de::Error for OptionsError {
    fn custom<T: Display>(message: T) -> Self {
        Self::Reason(message.to_string())
    }
}

/// Keys of a command line that are shorter than where JSON has the same.
const SHORT: &[(&str, &str)] = &[
    ("boot", "boot_vcpus"),
    ("max", "max_vcpus"),
    ("queues", "num_queues"),
    ("id", "serial"),
    ("bw_size", "rate_limiter_config.bandwidth.size"),
    (
        "bw_refill_time",
        "rate_limiter_config.bandwidth.refill_time",
    ),
    (
        "bw_one_time_burst",
        "rate_limiter_config.bandwidth.one_time_burst",
    ),
    ("ops_size", "rate_limiter_config.ops.size"),
    ("ops_refill_time", "rate_limiter_config.ops.refill_time"),
    (
        "ops_one_time_burst",
        "rate_limiter_config.ops.one_time_burst",
    ),
];

/// The pairs of one option.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Options<'a> {
    /// Splits `text`, refusing keys that `usage` does not name.
    pub(crate) fn parse(text: &'a str, usage: &[&'static str]) -> Result<Self, OptionsError> {
        let known: Vec<&str> = usage.iter().flat_map(|usage| keys(usage)).collect();
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionsError::NotAPair(part.into()))?;
            if !known.contains(&key) {
                return Err(OptionsError::UnknownKey {
                    key: key.into(),
                    known: known.join(", "),
                });
            }
            if pairs.iter().any(|(seen, _)| *seen == key) {
                return Err(OptionsError::Twice(key.into()));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// Takes out the value of `key`, which means something else than its field in JSON.
    pub(crate) fn take(&mut self, key: &str) -> Option<&'a str> {
        let index = self.pairs.iter().position(|(name, _)| *name == key)?;
        Some(self.pairs.remove(index).1)
    }

    /// The part that they describe.
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<T, OptionsError> {
        let mut fields = Fields::default();
        for (key, text) in self.pairs {
            let short = SHORT.iter().find(|(short, _)| *short == key);
            fields.insert(short.map_or(key, |(_, path)| path), Text { key, text });
        }
        T::deserialize(Node::Fields(fields))
    }
}

/// The keys that `usage` names: each is written before a `=`.
fn keys(usage: &'static str) -> impl Iterator<Item = &'static str> {
    let words = usage.split([',', '|', '[', ']']);
    words.filter_map(|word| Some(word.split_once('=')?.0))
}

/// A value as it was written, and its key.
#[derive(Clone, Copy, Debug)]
struct Text<'a> {
    key: &'a str,
    text: &'a str,
}

/// What was written, in the shape that it has in JSON.
#[derive(Debug)]
enum Node<'a> {
    Text(Text<'a>),
    Fields(Fields<'a>),
}

/// Fields by key, which are read from the last to the first.
#[derive(Debug, Default)]
struct Fields<'a>(Vec<(&'a str, Node<'a>)>);

impl<'a> Fields<'a> {
    /// Puts `text` at `path`, such as `rate_limiter_config.ops.size`.
    fn insert(&mut self, path: &'a str, text: Text<'a>) {
        let Some((first, rest)) = path.split_once('.') else {
            self.0.push((path, Node::Text(text)));
            return;
        };
        let found = self.0.iter().position(|(name, _)| *name == first);
        let index = found.unwrap_or_else(|| {
            self.0.push((first, Node::Fields(Fields::default())));
            self.0.len() - 1
        });
        if let Node::Fields(fields) = &mut self.0[index].1 {
            fields.insert(rest, text);
        }
    }
}

impl<'de> MapAccess<'de> for Fields<'de> {
    type Error = OptionsError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, OptionsError> {
        let Some((name, _)) = self.0.last() else {
            return Ok(None);
        };
        seed.deserialize(StrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, OptionsError> {
        let (_, node) = self.0.pop().expect("serde reads a key first");
        let key = match &node {
            Node::Text(text) => Some(text.key),
            Node::Fields(_) => None,
        };
        seed.deserialize(node).map_err(|error| match (error, key) {
            (OptionsError::Reason(reason), Some(key)) => OptionsError::Value {
                key: key.into(),
                reason,
            },
            (error, _) => error,
        })
    }
}

impl Node<'_> {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) => text.text,
            Self::Fields(_) => "",
        }
    }

    fn parse<T: std::str::FromStr<Err: Display>>(&self) -> Result<T, OptionsError> {
        self.text().parse().map_err(de::Error::custom)
    }
}

impl<'de> Deserializer<'de> for Node<'de> {
    type Error = OptionsError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        match self {
            Self::Text(text) => visitor.visit_str(text.text),
            Self::Fields(fields) => visitor.visit_map(fields),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        match self.text() {
            "on" => visitor.visit_bool(true),
            "off" => visitor.visit_bool(false),
            other => Err(de::Error::custom(format!(
                "'{other}' is neither on nor off"
            ))),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        visitor.visit_u8(self.parse()?)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        visitor.visit_u16(self.parse()?)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        visitor.visit_u32(self.parse()?)
    }

    /// What has 64 bits may be written with a binary suffix.
    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        visitor.visit_u64(self.parse::<ByteSize>()?.0)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionsError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionsError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionsError> {
        visitor.visit_enum(StrDeserializer::new(self.text()))
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    const USAGE: &[&str] = &["size=S[,shared=on][,queues=N]", "[,ops_size=N]"];

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Part {
        size: u64,
        shared: bool,
        num_queues: u16,
        rate_limiter_config: serde_json::Value,
    }

    fn read(text: &str) -> Result<Part, OptionsError> {
        Options::parse(text, USAGE)?.read()
    }

    fn message(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn values_are_read_as_what_their_fields_are() {
        let part = read("size=3K,shared=on,queues=2,ops_size=1").unwrap();
        assert_eq!(
            (part.size, part.shared, part.num_queues),
            (3 << 10, true, 2)
        );
        assert_eq!(part.rate_limiter_config["ops"]["size"], "1");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(message("size"), "'size' is not of the form key=value");
        assert_eq!(
            message("sise=1"),
            "there is no key 'sise', the keys are size, shared, queues, ops_size"
        );
        assert_eq!(message("size=1,size=2"), "'size' is given twice");
        assert_eq!(message("shared=1"), "shared: '1' is neither on nor off");
        let many = "queues: number too large to fit in target type";
        assert_eq!(message("queues=65536"), many);
    }
}
