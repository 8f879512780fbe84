//! Network devices.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::os::fd::{OwnedFd, RawFd};
use std::str::FromStr;
use std::sync::Arc;

use super::{ConfigError, RateLimits};
use crate::options::Options;

/// A network device: `tap=NAME|fd=N[:N...][,mac=M][,mtu=N][,queues=N][,queue_size=N]`
/// `[,offload_tso=off][,offload_ufo=off][,offload_csum=off]`, and what [`RateLimits`] takes.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The host's side.
    pub tap: TapSource,
    /// The guest's address.
    pub mac: MacAddr,
    /// Bytes of IP in a frame, 68 to 65535.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 16.
    pub pairs: u16,
    /// Descriptors in each queue, a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Leave segments of TCP to the other side.
    pub offload_tso: bool,
    /// Leave segments of UDP to the other side.
    pub offload_ufo: bool,
    /// Leave checksums to the other side.
    pub offload_csum: bool,
    /// What each direction is held to.
    pub rates: RateLimits,
}

/// Where a tap comes from.
#[derive(Clone, Debug)]
pub enum TapSource {
    /// By name; it is made if there is none.
    Name(String),
    /// Open descriptors of podvmm's by number, one for each pair.
    Numbers(Vec<RawFd>),
    /// Descriptors that came with a request, one for each pair.
    Passed(Vec<Arc<OwnedFd>>),
}

/// An address of one network device (IEEE 802).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// One that nobody was given: locally administered, at random.
    pub fn random() -> Self {
        // Keyed anew by the system each time.
        let [first, rest @ ..] = RandomState::new().hash_one(()).to_le_bytes();
        let [b, c, d, e, f, ..] = rest;
        Self([first & 0xfc | 0x02, b, c, d, e, f])
    }
}

impl FromStr for MacAddr {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Mac(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let part = part.ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        // The lowest bit of the first byte means a group.
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl NetConfig {
    /// A device on `tap` with defaults for everything else.
    pub fn new(tap: TapSource) -> Self {
        let pairs = match &tap {
            TapSource::Name(_) => 1,
            TapSource::Numbers(fds) => fds.len(),
            TapSource::Passed(fds) => fds.len(),
        };
        Self {
            tap,
            mac: MacAddr::random(),
            mtu: None,
            pairs: u16::try_from(pairs).unwrap_or(u16::MAX),
            queue_size: 256,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            rates: RateLimits::default(),
        }
    }

    /// Itself, if all of it is in range.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        let fds = match &self.tap {
            TapSource::Name(_) => usize::from(self.pairs),
            TapSource::Numbers(fds) => {
                if let Some(fd) = fds.iter().find(|fd| **fd < 3) {
                    return Err(ConfigError::StandardFd(*fd));
                }
                fds.len()
            }
            TapSource::Passed(fds) => fds.len(),
        };
        if fds != usize::from(self.pairs) {
            return Err(ConfigError::Pairs {
                pairs: self.pairs,
                fds,
            });
        }
        super::check_queues(self.pairs, self.queue_size, 16)?;
        self.rates.checked()?;
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(ConfigError::Mtu(self.mtu.unwrap_or(0)));
        }
        Ok(self)
    }
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &[
            "tap",
            "fd",
            "mac",
            "mtu",
            "queues",
            "queue_size",
            "offload_tso",
            "offload_ufo",
            "offload_csum",
            "bw_size",
            "bw_one_time_burst",
            "bw_refill_time",
            "ops_size",
            "ops_one_time_burst",
            "ops_refill_time",
        ];
        let options = Options::parse(text, KEYS)?;
        let tap = match (options.value("tap")?, options.value::<String>("fd")?) {
            (Some(name), None) => TapSource::Name(name),
            (None, Some(fds)) => {
                let numbers = fds.split(':').map(|fd| {
                    let wrong = || ConfigError::Fd(fd.into());
                    let number = fd.parse().map_err(|_| wrong())?;
                    (number >= 0).then_some(number).ok_or_else(wrong)
                });
                TapSource::Numbers(numbers.collect::<Result<_, _>>()?)
            }
            _ => return Err(ConfigError::TapOrFd),
        };
        let default = Self::new(tap);
        Self {
            mac: options.value("mac")?.unwrap_or(default.mac),
            mtu: options.value("mtu")?,
            pairs: options.value("queues")?.unwrap_or(default.pairs),
            queue_size: options.value("queue_size")?.unwrap_or(default.queue_size),
            offload_tso: options.switch("offload_tso", true)?,
            offload_ufo: options.switch("offload_ufo", true)?,
            offload_csum: options.switch("offload_csum", true)?,
            rates: RateLimits::of(&options)?,
            ..default
        }
        .checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_network_device_has_a_tap_by_name_or_by_descriptors() {
        let net: NetConfig = "tap=t0,mac=02:00:00:0a:0B:ff,mtu=1400".parse().unwrap();
        assert!(matches!(net.tap, TapSource::Name(name) if name == "t0"));
        assert_eq!(net.mac.to_string(), "02:00:00:0a:0b:ff");
        let net: NetConfig = "fd=5:6".parse().unwrap();
        assert!(matches!(net.tap, TapSource::Numbers(fds) if fds == [5, 6]));
        assert_eq!(net.pairs, 2);
    }

    #[test]
    fn nonsense_about_networks_is_named() {
        let cases = [
            ("mac=02:00:00:00:00:01", "give either tap=NAME or fd=N"),
            ("tap=a,fd=3", "give either tap=NAME or fd=N"),
            ("fd=1", "fd=1 is a standard stream, not a tap"),
            ("fd=x", "fd='x' is not a number"),
            ("fd=-1", "fd='-1' is not a number"),
            (
                "fd=5,queues=2",
                "2 pairs of queues with 1 descriptors: one goes with each",
            ),
            ("tap=a,queues=17", "queues=17: 1 to 16 are possible"),
            ("tap=a,bw_size=1", "'bw_refill_time' is missing"),
            ("tap=a,ops_one_time_burst=1", "'ops_size' is missing"),
            (
                "tap=a,ops_size=0,ops_refill_time=1",
                "a rate's size and refill time are at least 1",
            ),
            ("tap=a,mtu=67", "mtu=67: 68 to 65535 is possible"),
            (
                "tap=a,queue_size=8",
                "queue_size=8 is not a power of two from 16 to 1024",
            ),
            (
                "tap=a,mac=01:00:00:00:00:01",
                "mac: '01:00:00:00:00:01' is not the address of one device, such as 02:00:00:00:00:01",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(refusal::<NetConfig>(text), message);
        }
    }

    #[test]
    fn random_addresses_are_locally_administered_and_differ() {
        let (one, other) = (MacAddr::random(), MacAddr::random());
        assert_eq!((one.0[0] & 3, other.0[0] & 3), (2, 2));
        assert_ne!(one, other);
        assert_eq!(one.to_string().parse::<MacAddr>().unwrap(), one);
    }
}
