//! How fast a device may be.

use super::ConfigError;
use crate::options::{Options, OptionsError};

/// Bounds of a device: `[,bw_size=N,bw_refill_time=MS][,bw_one_time_burst=N]` for bytes, and the
/// same with `ops` for requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Option<RateLimit>,
    /// Requests.
    pub operations: Option<RateLimit>,
}

/// So many per time, on average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// In each refill time, and at once after a rest; at least 1.
    pub size: u64,
    /// Besides, once, at the start.
    pub one_time_burst: u64,
    /// Milliseconds, at least 1.
    pub refill_time_ms: u64,
}

impl RateLimits {
    /// From the options of a device, which must have let their keys through.
    pub(super) fn of(options: &Options<'_>) -> Result<Self, ConfigError> {
        let bandwidth = limit(
            options.value("bw_size")?,
            options.value("bw_one_time_burst")?,
            options.value("bw_refill_time")?,
        );
        let operations = limit(
            options.value("ops_size")?,
            options.value("ops_one_time_burst")?,
            options.value("ops_refill_time")?,
        );
        let missing = |prefix| {
            let (size, time) = match prefix {
                "bw" => ("bw_size", "bw_refill_time"),
                _ => ("ops_size", "ops_refill_time"),
            };
            OptionsError::Missing(if options.has(size) { time } else { size })
        };
        Ok(Self {
            bandwidth: bandwidth.map_err(|()| missing("bw"))?,
            operations: operations.map_err(|()| missing("ops"))?,
        })
    }

    /// Itself, if all of it is in range.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        for limit in [self.bandwidth, self.operations].into_iter().flatten() {
            if limit.size == 0 || limit.refill_time_ms == 0 {
                return Err(ConfigError::ZeroRate);
            }
        }
        Ok(self)
    }
}

/// All of it, or none.
fn limit(
    size: Option<u64>,
    burst: Option<u64>,
    refill_time_ms: Option<u64>,
) -> Result<Option<RateLimit>, ()> {
    match (size, burst, refill_time_ms) {
        (None, None, None) => Ok(None),
        (Some(size), burst, Some(refill_time_ms)) => Ok(Some(RateLimit {
            size,
            one_time_burst: burst.unwrap_or(0),
            refill_time_ms,
        })),
        _ => Err(()),
    }
}
