//! Memory balloon.

use std::str::FromStr;

use super::ConfigError;
use crate::options::Options;
use crate::units::ByteSize;

/// A balloon: `[size=S][,deflate_on_oom=on][,free_page_reporting=on]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// What it takes from the guest at first.
    pub size: ByteSize,
    /// The guest may take pages back rather than kill a process.
    pub deflate_on_oom: bool,
    /// The guest gives free pages back by itself.
    pub free_page_reporting: bool,
}

impl FromStr for BalloonConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let known = &["size", "deflate_on_oom", "free_page_reporting"];
        let options = Options::parse(text, known)?;
        Ok(Self {
            size: options.value("size")?.unwrap_or(ByteSize(0)),
            deflate_on_oom: options.switch("deflate_on_oom", false)?,
            free_page_reporting: options.switch("free_page_reporting", false)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_balloon_has_a_size_and_two_switches() {
        let balloon: BalloonConfig = "size=64M,free_page_reporting=on".parse().unwrap();
        let expected = BalloonConfig {
            size: ByteSize(64 << 20),
            deflate_on_oom: false,
            free_page_reporting: true,
        };
        assert_eq!(balloon, expected);
        assert_eq!(
            refusal::<BalloonConfig>("size=much"),
            "size: 'much' is not a size: write bytes, or a number with K, M, G or T"
        );
    }
}
