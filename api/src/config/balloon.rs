//! Memory balloon.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Others, Part};
use crate::units::ByteSize;

/// A balloon: takes memory from the guest and gives it to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonConfig {
    /// Memory that the balloon takes from the guest at first.
    pub size: ByteSize,
    /// The guest may take pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest gives free pages back by itself.
    pub free_page_reporting: bool,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

impl Part for BalloonConfig {
    const SECTION: &'static str = "balloon";
    const USAGE: &'static [&'static str] =
        &["[size=S][,deflate_on_oom=on][,free_page_reporting=on]"];

    fn checked(self) -> Result<Self, ConfigError> {
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_balloon_has_a_size_and_two_switches() {
        let expected = BalloonConfig {
            size: ByteSize(64 << 20),
            free_page_reporting: true,
            ..BalloonConfig::default()
        };
        let balloon = BalloonConfig::from_options("size=64M,free_page_reporting=on");
        assert_eq!(balloon.unwrap(), expected);
        assert_eq!(
            refusal::<BalloonConfig>("size=much"),
            "size: 'much' is not a size: write bytes, or a number with K, M, G or T"
        );
    }
}
