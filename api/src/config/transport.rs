//! How devices are reached.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// How a guest finds its virtio devices, notifies them and is interrupted by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportConfig {
    /// Windows of registers that its kernel's command line names, with a pin of the I/O APIC each.
    #[default]
    Mmio,
    /// Functions on a PCI bus, which send messages.
    Pci,
}

impl FromStr for TransportConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "mmio" => Ok(Self::Mmio),
            "pci" => Ok(Self::Pci),
            _ => Err(ConfigError::Transport(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;
    use crate::error::tests::printed;

    #[test]
    fn a_transport_is_one_of_two_words_in_options_and_in_json() {
        let words = ["mmio", "pci"].map(|word| word.parse::<TransportConfig>().unwrap());
        assert_eq!(words, [TransportConfig::Mmio, TransportConfig::Pci]);
        assert_eq!(
            printed(&"isa".parse::<TransportConfig>().unwrap_err()),
            "'isa' is none of mmio, pci"
        );
        let given = |json: &str| VmConfig::parse(json.as_bytes()).map(|vm| vm.transport);
        let default = given(r#"{"payload": {"kernel": "/k"}}"#);
        assert_eq!(default.unwrap(), TransportConfig::Mmio);
        let pci = given(r#"{"payload": {"kernel": "/k"}, "transport": "pci"}"#);
        assert_eq!(pci.unwrap(), TransportConfig::Pci);
        given(r#"{"payload": {"kernel": "/k"}, "transport": "isa"}"#).unwrap_err();
    }
}
