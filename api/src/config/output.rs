//! Where consoles print.

use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;

/// Where a serial port's or console's bytes go, and come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// There is no such device.
    Off,
    /// It is there; what it prints is kept only for the message of a crash.
    Null,
    /// podvmm's own terminal or standard streams.
    Tty,
    /// Appended to a file.
    File(PathBuf),
}

impl FromStr for Output {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match (text, text.strip_prefix("file=")) {
            ("off", _) => Ok(Self::Off),
            ("null", _) => Ok(Self::Null),
            ("tty", _) => Ok(Self::Tty),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConfigError::Output(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn outputs_are_off_null_tty_or_a_file() {
        let outputs = ["off", "null", "tty", "file=/x"].map(|text| text.parse::<Output>().unwrap());
        assert_eq!(
            outputs,
            [
                Output::Off,
                Output::Null,
                Output::Tty,
                Output::File("/x".into())
            ]
        );
        assert_eq!(
            refusal::<Output>("file="),
            "'file=' is none of off, null, tty, file=PATH"
        );
    }
}
