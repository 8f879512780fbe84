//! vsock.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, HostPath, Others, Part};

/// vsock on a unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VsockConfig {
    /// The guest's address, 3 to 4294967294.
    pub cid: u32,
    /// Path of the socket where the host's programs connect. The guest's calls to port P go to this
    /// path with `_P` behind it.
    pub socket: PathBuf,
    /// What it is called: a name that podvmm gives it, if its client does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

impl Part for VsockConfig {
    const SECTION: &'static str = "vsock";
    const USAGE: &'static [&'static str] = &["cid=N,socket=PATH"];

    fn host_paths(&self) -> Vec<HostPath> {
        vec![HostPath::socket(&self.socket)]
    }

    fn checked(self) -> Result<Self, ConfigError> {
        // unix(7): 108 bytes with the NUL; the longest port takes 11 more.
        const MAX_PATH: usize = 107 - "_4294967295".len();
        let len = self.socket.as_os_str().len();
        if len == 0 {
            Err(ConfigError::Missing("socket"))
        } else if len > MAX_PATH {
            Err(ConfigError::SocketPath { len, max: MAX_PATH })
        } else if !(3..u32::MAX).contains(&self.cid) {
            Err(ConfigError::Cid(self.cid))
        } else {
            Ok(self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_socket_device_has_an_address_and_a_socket() {
        let vsock = VsockConfig::from_options("cid=3,socket=/s").unwrap();
        assert_eq!((vsock.cid, vsock.socket), (3, "/s".into()));
        assert_eq!(refusal::<VsockConfig>("cid=3"), "'socket' is missing");
        for cid in ["", "cid=0,", "cid=2,"] {
            let refused = refusal::<VsockConfig>(&format!("{cid}socket=/s"));
            assert!(
                refused.ends_with("3 to 4294967294 is possible"),
                "{refused}"
            );
        }
        assert_eq!(
            refusal::<VsockConfig>(&format!("cid=3,socket=/{}", "x".repeat(96))),
            "the socket's path is 97 bytes long, 96 is possible"
        );
    }
}
