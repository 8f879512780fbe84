//! How fast a device may be.

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// How [`RateLimits`] are written on a command line: `bw` bounds bytes, `ops` requests.
pub(crate) const RATES: &str = "[,bw_size=N,bw_refill_time=MS][,bw_one_time_burst=N]\
                                [,ops_size=N,ops_refill_time=MS][,ops_one_time_burst=N]";

/// Bounds of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimits {
    /// Bound of the bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<RateLimit>,
    /// Bound of the requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<RateLimit>,
}

/// A bound of so many bytes or requests per time, on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimit {
    /// Bytes or requests in each refill time, and at once after an idle time; at least 1.
    pub size: u64,
    /// Bytes or requests that are allowed besides, once, at the start.
    pub one_time_burst: u64,
    /// The refill time in milliseconds, at least 1.
    pub refill_time: u64,
}

impl RateLimits {
    /// Whether nothing is bounded.
    pub(super) fn are_none(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let mut limits = [self.bandwidth, self.ops].into_iter().flatten();
        if limits.any(|limit| limit.size == 0 || limit.refill_time == 0) {
            return Err(ConfigError::ZeroRate);
        }
        Ok(())
    }
}
