//! Network devices.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::os::fd::{OwnedFd, RawFd};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    ConfigError, HostPath, JsonError, Others, Part, RATES, RateLimits, check_queues, checked, part,
};
use crate::options::Options;

/// A network device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct NetConfig {
    /// The host's side by name; it is made if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// The host's side as open descriptors, rather than by name. Clients are not told their numbers.
    #[serde(skip)]
    fds: Option<TapFds>,
    /// The guest's address.
    pub mac: MacAddr,
    /// Bytes of IP in a frame, 68 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Number of queues: two for each pair, of 1 to 16 pairs. `None` stands for two for each
    /// descriptor.
    #[serde(skip_serializing_if = "Option::is_none")]
    num_queues: Option<u16>,
    /// Descriptors in each queue, a power of two from 16 to 1024.
    pub queue_size: u16,
    /// Leave segments of TCP to the other side.
    pub offload_tso: bool,
    /// Leave the segmentation of UDP to the other side (USO; virtio 1.3 §5.1.3, VIRTIO_NET_F_HOST_USO). Cloud
    /// Hypervisor's API, and so Kata, names it by UFO, an earlier way that podvmm does not offer.
    pub offload_ufo: bool,
    /// Leave checksums to the other side.
    pub offload_csum: bool,
    /// Bounds of each direction.
    #[serde(skip_serializing_if = "RateLimits::are_none")]
    pub rate_limiter_config: RateLimits,
    /// What it is called: a name that podvmm gives it, if its client does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The tap's address. Kata reads it back; podvmm gives taps no address.
    ip: String,
    /// The tap's mask. Kata reads it back, too; podvmm does not set it.
    mask: String,
    /// Fields that podvmm has no use for.
    #[serde(flatten)]
    pub others: Others,
}

/// Open descriptors of taps, one for each pair of queues.
#[derive(Clone, Debug)]
enum TapFds {
    Inherited(Vec<RawFd>),
    Passed(Vec<Arc<OwnedFd>>),
}

/// Where a tap comes from.
#[derive(Clone, Copy, Debug)]
pub enum TapSource<'a> {
    /// The tap of this name; it is made if there is none.
    Name(&'a str),
    /// Descriptors that podvmm was started with, by number, one for each pair.
    Inherited(&'a [RawFd]),
    /// Descriptors that came with a request, one for each pair.
    Passed(&'a [Arc<OwnedFd>]),
}

/// An address of one network device (IEEE 802).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A random one, locally administered.
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

impl TryFrom<String> for MacAddr {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl NetConfig {
    /// A device whose host's side are these open taps, one for each pair of queues.
    pub fn on(taps: Vec<OwnedFd>) -> Self {
        Self {
            fds: passed(taps.into_iter()),
            ..Self::default()
        }
    }

    /// The host's side. Descriptors come before a name.
    pub fn source(&self) -> Result<TapSource<'_>, ConfigError> {
        match (&self.fds, &self.tap) {
            (Some(TapFds::Inherited(fds)), _) => Ok(TapSource::Inherited(fds)),
            (Some(TapFds::Passed(fds)), _) => Ok(TapSource::Passed(fds)),
            (None, Some(name)) => Ok(TapSource::Name(name)),
            (None, None) => Err(ConfigError::TapOrFd),
        }
    }

    /// Pairs of queues.
    pub fn pairs(&self) -> u16 {
        self.num_queues.unwrap_or(2) / 2
    }

    /// Takes from `fds` those that stand for its tap, if it names none: one for each pair.
    pub(crate) fn take_fds(&mut self, fds: &mut impl Iterator<Item = OwnedFd>) {
        if self.tap.is_none() {
            self.fds = passed(fds.take(self.pairs().into()));
        }
    }

    /// Reads JSON that `fds` came with, which stand for the tap, also if it names one.
    pub(crate) fn passed(body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, JsonError> {
        checked(Self {
            fds: passed(fds.into_iter()),
            ..part(body)?
        })
    }
}

impl Default for NetConfig {
    /// A network device without a tap yet, with an address that no other device has.
    fn default() -> Self {
        Self {
            tap: None,
            fds: None,
            mac: MacAddr::random(),
            mtu: None,
            num_queues: None,
            queue_size: 256,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            rate_limiter_config: RateLimits::default(),
            id: None,
            ip: "192.168.249.1".into(),
            mask: "255.255.255.0".into(),
            others: Others::new(),
        }
    }
}

impl Part for NetConfig {
    const SECTION: &'static str = "net";
    const USAGE: &'static [&'static str] = &[
        "tap=NAME|fd=N[:N...][,mac=M][,mtu=N][,queues=N][,queue_size=N]",
        "[,offload_tso=off][,offload_ufo=off][,offload_csum=off]",
        RATES,
    ];

    /// On a command line `queues` counts pairs, and `fd` stands for the tap.
    fn from_options(text: &str) -> Result<Self, ConfigError> {
        let mut options = Options::parse(text, Self::USAGE)?;
        let fds = options.take("fd").map(numbers).transpose()?;
        let pairs = options.take("queues").map(|pairs| {
            let pairs: u16 = pairs.parse().map_err(|_| ConfigError::Queues(u16::MAX))?;
            pairs.checked_mul(2).ok_or(ConfigError::Queues(pairs))
        });
        let net = Self {
            fds: fds.map(TapFds::Inherited),
            num_queues: pairs.transpose()?,
            ..options.read()?
        };
        if net.tap.is_some() && net.fds.is_some() {
            return Err(ConfigError::TapOrFd);
        }
        net.checked()
    }

    fn host_paths(&self) -> Vec<HostPath> {
        match self.source() {
            Ok(TapSource::Name(_)) => vec![HostPath::write("/dev/net/tun".as_ref())],
            _ => Vec::new(),
        }
    }

    fn checked(mut self) -> Result<Self, ConfigError> {
        // Numbers of the client's, which mean nothing here.
        self.others.remove("fds");
        let fds = match self.source()? {
            TapSource::Name(_) => None,
            TapSource::Passed(fds) => Some(fds.len()),
            TapSource::Inherited(fds) => {
                if let Some(fd) = fds.iter().find(|fd| **fd < 3) {
                    return Err(ConfigError::StandardFd(*fd));
                }
                Some(fds.len())
            }
        };
        let queues = match self.num_queues {
            None => u16::try_from(2 * fds.unwrap_or(1)).unwrap_or(u16::MAX),
            Some(queues) if !queues.is_multiple_of(2) => {
                return Err(ConfigError::OddQueues(queues));
            }
            Some(queues) => queues,
        };
        self.num_queues = Some(queues);
        let pairs = self.pairs();
        if let Some(fds) = fds
            && fds != usize::from(pairs)
        {
            return Err(ConfigError::Pairs { pairs, fds });
        }
        check_queues(pairs, self.queue_size, 16)?;
        self.rate_limiter_config.check()?;
        match self.mtu {
            Some(mtu) if mtu < 68 => Err(ConfigError::Mtu(mtu)),
            _ => Ok(self),
        }
    }
}

/// Descriptors that came with a request, unless there are none.
fn passed(fds: impl Iterator<Item = OwnedFd>) -> Option<TapFds> {
    let fds: Vec<_> = fds.map(Arc::new).collect();
    (!fds.is_empty()).then_some(TapFds::Passed(fds))
}

/// Descriptors by number, `5:6`.
fn numbers(fds: &str) -> Result<Vec<RawFd>, ConfigError> {
    let numbers = fds.split(':').map(|fd| {
        let wrong = || ConfigError::Fd(fd.into());
        let number = fd.parse().map_err(|_| wrong())?;
        (number >= 0).then_some(number).ok_or_else(wrong)
    });
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn a_network_device_has_a_tap_by_name_or_by_descriptors() {
        let net = NetConfig::from_options("tap=t0,mac=02:00:00:0a:0B:ff,mtu=1400").unwrap();
        assert!(matches!(net.source(), Ok(TapSource::Name("t0"))));
        assert_eq!(net.mac.to_string(), "02:00:00:0a:0b:ff");
        let net = NetConfig::from_options("fd=5:6").unwrap();
        assert_eq!(net.pairs(), 2);
        assert!(matches!(net.source(), Ok(TapSource::Inherited([5, 6]))));
        let net = NetConfig::from_options("tap=t0,queues=3").unwrap();
        assert_eq!((net.pairs(), net.num_queues), (3, Some(6)));
    }

    #[test]
    fn nonsense_about_networks_is_named() {
        const RATE: &str = "a rate needs a size and a refill time, each at least 1";
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
            ("tap=a,bw_size=1", RATE),
            ("tap=a,ops_one_time_burst=1", RATE),
            ("tap=a,ops_size=0,ops_refill_time=1", RATE),
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
