//! `key=value,key=value`: how structured options are written on a command line.
//! A value cannot contain a comma.

use std::error::Error as StdError;
use std::str::FromStr;

use thiserror::Error;

/// Why an option's text was refused.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// A part without `=`.
    #[error("'{0}' is not of the form key=value")]
    NotAPair(String),
    /// The same key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A key the option does not have.
    #[error("there is no key '{key}', the keys are {}", .known.join(", "))]
    UnknownKey {
        /// What was written.
        key: String,
        /// What could have been.
        known: &'static [&'static str],
    },
    /// A key that must be there.
    #[error("'{0}' is missing")]
    Missing(&'static str),
    /// A value that does not parse.
    #[error("{key}")]
    Value {
        /// Its key.
        key: &'static str,
        /// What is wrong with it.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// The parts of one option.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Options<'a> {
    /// Splits `text`, refusing keys that are not `known`.
    pub(crate) fn parse(
        text: &'a str,
        known: &'static [&'static str],
    ) -> Result<Self, OptionsError> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionsError::NotAPair(part.into()))?;
            if !known.contains(&key) {
                return Err(OptionsError::UnknownKey {
                    key: key.into(),
                    known,
                });
            }
            if pairs.iter().any(|(seen, _)| *seen == key) {
                return Err(OptionsError::Twice(key.into()));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// Whether `key` is given.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(name, _)| *name == key)
    }

    /// The value of `key`, if given.
    pub(crate) fn value<T>(&self, key: &'static str) -> Result<Option<T>, OptionsError>
    where
        T: FromStr,
        T::Err: StdError + Send + Sync + 'static,
    {
        match self.pairs.iter().find(|(name, _)| *name == key) {
            None => Ok(None),
            Some((_, value)) => {
                value
                    .parse()
                    .map(Some)
                    .map_err(|source: T::Err| OptionsError::Value {
                        key,
                        source: source.into(),
                    })
            }
        }
    }

    /// The value of `key`, which must be given.
    pub(crate) fn required<T>(&self, key: &'static str) -> Result<T, OptionsError>
    where
        T: FromStr,
        T::Err: StdError + Send + Sync + 'static,
    {
        self.value(key)?.ok_or(OptionsError::Missing(key))
    }

    /// A switch, written `on` or `off`.
    pub(crate) fn switch(&self, key: &'static str, default: bool) -> Result<bool, OptionsError> {
        Ok(self.value(key)?.map_or(default, |switch: Switch| switch.0))
    }
}

struct Switch(bool);

#[derive(Debug, Error)]
#[error("'{0}' is neither on nor off")]
struct NotASwitch(String);

impl FromStr for Switch {
    type Err = NotASwitch;

    fn from_str(text: &str) -> Result<Self, NotASwitch> {
        match text {
            "on" => Ok(Self(true)),
            "off" => Ok(Self(false)),
            _ => Err(NotASwitch(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    const KNOWN: &[&str] = &["size", "shared"];

    fn message(text: &str) -> String {
        Options::parse(text, KNOWN).unwrap_err().to_string()
    }

    #[test]
    fn parts_are_found_by_key() {
        let options = Options::parse("size=3,shared=on", KNOWN).unwrap();
        assert_eq!(options.required::<u32>("size").unwrap(), 3);
        assert!(options.switch("shared", false).unwrap());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(message("size"), "'size' is not of the form key=value");
        assert_eq!(
            message("sise=1"),
            "there is no key 'sise', the keys are size, shared"
        );
        assert_eq!(message("size=1,size=2"), "'size' is given twice");
    }

    #[test]
    fn a_bad_value_names_its_key() {
        let options = Options::parse("size=x,shared=1", KNOWN).unwrap();
        let size = chain(&options.value::<u32>("size").unwrap_err());
        let shared = chain(&options.switch("shared", false).unwrap_err());
        assert_eq!(size, ["size", "invalid digit found in string"]);
        assert_eq!(shared, ["shared", "'1' is neither on nor off"]);
    }
}
