//! The socket device.

use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;
use crate::options::Options;

/// vsock on a unix socket: `cid=N,socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's address, 3 to 4294967294.
    pub cid: u32,
    /// Where the host's programs connect; where the guest's calls to port P go,
    /// with `_P` behind it.
    pub socket: PathBuf,
}

impl VsockConfig {
    /// Itself, if all of it is in range.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        // unix(7): 108 bytes with the NUL; the longest port takes 11 more.
        const MAX_PATH: usize = 107 - "_4294967295".len();
        if !(3..u32::MAX).contains(&self.cid) {
            return Err(ConfigError::Cid(self.cid));
        }
        let len = self.socket.as_os_str().len();
        if len > MAX_PATH {
            return Err(ConfigError::SocketPath { len, max: MAX_PATH });
        }
        Ok(self)
    }
}

impl FromStr for VsockConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["cid", "socket"])?;
        let vsock = Self {
            cid: options.required("cid")?,
            socket: options.required("socket")?,
        };
        vsock.checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_socket_device_has_an_address_and_a_socket() {
        let vsock: VsockConfig = "cid=3,socket=/s".parse().unwrap();
        assert_eq!((vsock.cid, vsock.socket), (3, "/s".into()));
        assert_eq!(refusal::<VsockConfig>("cid=3"), "'socket' is missing");
        assert_eq!(
            refusal::<VsockConfig>("cid=2,socket=/s"),
            "cid=2: 3 to 4294967294 is possible"
        );
        assert_eq!(
            refusal::<VsockConfig>(&format!("cid=3,socket=/{}", "x".repeat(96))),
            "the socket's path is 97 bytes long, 96 is possible"
        );
    }
}
