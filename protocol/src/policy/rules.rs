//! The rules of a policy, each as one line of text.

use std::fmt;
use std::path::{Component, Path};
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

use super::CALLS;

/// Why a text is no rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each is what its message says")]
pub enum RuleError {
    #[error("{0:?} is no call of the agent's, such as ExecProcess")]
    Call(String),
    #[error(
        "{0:?} is no rule for devices: give a kind, c or b, and numbers, as in \"c 10:229\" or \"b 253:*\""
    )]
    Device(String),
    #[error(
        "{0:?} is no rule for mounts: give a type and, if not all, a source, as in \"tmpfs\" or \
         \"bind /run/kata-containers/sandbox/\""
    )]
    Mount(String),
}

/// A call that is allowed: one of [`CALLS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallRule(&'static str);

impl CallRule {
    pub(super) fn covers(self, method: &str) -> bool {
        self.0 == method
    }

    /// The rules for all calls but some.
    pub fn all_but(others: &[Self]) -> Vec<Self> {
        let all = CALLS.into_iter().map(Self);
        all.filter(|rule| !others.contains(rule)).collect()
    }
}

// Derived, it would borrow its name from what is read.
impl<'de> Deserialize<'de> for CallRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl FromStr for CallRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let known = CALLS.into_iter().find(|known| *known == text);
        known.map(Self).ok_or_else(|| RuleError::Call(text.into()))
    }
}

impl fmt::Display for CallRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is what it is called")]
pub enum Kind {
    Character,
    Block,
}

/// Devices that are allowed: those of these numbers, major and minor, or of any.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct DeviceRule {
    pub(super) kind: Kind,
    pub(super) numbers: [Option<u32>; 2],
}

impl DeviceRule {
    /// Whether it allows all that the other one does.
    pub(super) fn covers(&self, other: &Self) -> bool {
        let mut numbers = self.numbers.iter().zip(&other.numbers);
        self.kind == other.kind && numbers.all(|(own, other)| own.is_none() || own == other)
    }
}

impl FromStr for DeviceRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let wrong = || RuleError::Device(text.into());
        let (kind, numbers) = text.split_once(' ').ok_or_else(wrong)?;
        let kind = match kind {
            "c" => Kind::Character,
            "b" => Kind::Block,
            _ => return Err(wrong()),
        };
        let number = |text: &str| match text {
            "*" => Ok(None),
            // A sign is no part of a number.
            _ if text.starts_with('+') => Err(wrong()),
            _ => text.parse().map(Some).map_err(|_| wrong()),
        };
        let (major, minor) = numbers.split_once(':').ok_or_else(wrong)?;
        let numbers = [number(major)?, number(minor)?];
        Ok(Self { kind, numbers })
    }
}

impl fmt::Display for DeviceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Character => 'c',
            Kind::Block => 'b',
        };
        let number = |number: Option<u32>| match number {
            Some(number) => number.to_string(),
            None => "*".into(),
        };
        let [major, minor] = self.numbers.map(number);
        write!(f, "{kind} {major}:{minor}")
    }
}

/// Mounts that are allowed: of a type, and of one source, of all in a folder, or of any.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct MountRule {
    kind: String,
    /// If it ends with a slash, all below that folder, and else this alone.
    source: Option<String>,
}

impl MountRule {
    pub(super) fn covers(&self, kind: &str, source: &str) -> bool {
        if self.kind != kind {
            return false;
        }
        match &self.source {
            None => true,
            Some(folder) if folder.ends_with('/') => is_below(source, folder),
            Some(whole) => whole == source,
        }
    }
}

/// Whether a path is below a folder, and goes no step back.
fn is_below(path: &str, folder: &str) -> bool {
    let mut parts = Path::new(path).components();
    path.starts_with(folder) && !parts.any(|part| part == Component::ParentDir)
}

impl FromStr for MountRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (kind, source) = match text.split_once(' ') {
            Some((kind, source)) => (kind, Some(source)),
            None => (text, None),
        };
        let is_plain = !text.chars().any(char::is_control);
        if kind.is_empty() || source.is_some_and(str::is_empty) || !is_plain {
            return Err(RuleError::Mount(text.into()));
        }
        Ok(Self {
            kind: kind.into(),
            source: source.map(Into::into),
        })
    }
}

impl fmt::Display for MountRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        let mut source = self.source.iter();
        source.try_for_each(|source| write!(f, " {source}"))
    }
}

impl TryFrom<String> for DeviceRule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}

impl TryFrom<String> for MountRule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}
