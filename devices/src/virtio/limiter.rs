//! Bounds how many bytes and requests a device carries per time, by token buckets.
//!
//! A bucket holds `size` tokens and is filled at an even rate, from empty to full in its refill
//! time. A request may go while there is a token, and takes what it costs, if need be more than
//! there are: so one larger than the bucket goes as well, and those after it wait the longer. A
//! handler that must wait leaves its requests in the ring and is woken by a timer.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A rate of tokens: bytes or requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens per refill time, and the most that are saved up. Not 0.
    pub size: u64,
    /// Tokens there are besides at the start, once.
    pub one_time_burst: u64,
    /// The refill time, at least a millisecond.
    pub refill_time: Duration,
}

/// What a device is held to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The rate of bytes, if it is bounded.
    pub bandwidth: Option<Rate>,
    /// The rate of requests, if it is bounded.
    pub operations: Option<Rate>,
}

impl Limits {
    pub fn any(&self) -> bool {
        self.bandwidth.is_some() || self.operations.is_some()
    }
}

/// The tokens of a device. They last as long as the device, so a driver that resets it gets no new
/// ones.
#[derive(Debug)]
pub(super) struct Tokens(Option<Arc<Mutex<Buckets>>>);

/// Holds one handler to limits, which it may share with others.
#[derive(Debug)]
pub(super) struct Limiter {
    buckets: Arc<Mutex<Buckets>>,
    timer: OwnedFd,
}

/// What a request takes of the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) bytes: u64,
    pub(super) requests: u64,
}

impl Cost {
    /// That of one request which moves so many bytes.
    pub(super) fn of_bytes(bytes: usize) -> Self {
        Self {
            bytes: bytes as u64,
            requests: 1,
        }
    }
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Tokens {
    /// Full buckets, as `limits` have them.
    pub(super) fn new(limits: Limits) -> Self {
        let now = Instant::now();
        let buckets = || Buckets {
            bytes: limits.bandwidth.map(|rate| Bucket::new(rate, now)),
            requests: limits.operations.map(|rate| Bucket::new(rate, now)),
        };
        Self(limits.any().then(|| Arc::new(Mutex::new(buckets()))))
    }

    /// A limiter for one more handler, held with all others of these tokens to the limits. `None` if
    /// there are no limits.
    pub(super) fn limiter(&self) -> io::Result<Option<Limiter>> {
        let limiter = |buckets: &Arc<Mutex<Buckets>>| {
            Ok(Limiter {
                buckets: buckets.clone(),
                timer: timerfd_create(
                    TimerfdClockId::Monotonic,
                    TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
                )?,
            })
        };
        self.0.as_ref().map(limiter).transpose()
    }
}

impl Limiter {
    /// Has the handler's loop watch the timer, with `data`.
    pub(super) fn watch(&self, ops: &mut EventOps, data: u32) {
        if let Err(error) = ops.add(Events::with_data(&self.timer, data, EventSet::IN)) {
            log::error!("watch a rate limiter: {error}");
        }
    }

    /// The timer has expired.
    pub(super) fn woken(&mut self) {
        // There is nothing to read if it was set anew just now; then it wakes again.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }

    /// Whether a request may go now. If not, the timer wakes the handler when it may.
    pub(super) fn admits(&mut self) -> bool {
        let wait = self.buckets().wait(Instant::now());
        match wait {
            None => true,
            Some(wait) => {
                if let Err(error) = set(&self.timer, wait) {
                    log::error!("set a rate limiter's timer: {error}");
                    return true;
                }
                false
            }
        }
    }

    /// A request has gone that costs so much.
    pub(super) fn charge(&self, cost: Cost) {
        let mut buckets = self.buckets();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(cost.bytes);
        }
        if let Some(bucket) = &mut buckets.requests {
            bucket.take(cost.requests);
        }
    }

    fn buckets(&self) -> std::sync::MutexGuard<'_, Buckets> {
        self.buckets.lock().expect("a panic ends the process")
    }
}

fn set(timer: &OwnedFd, wait: Duration) -> io::Result<()> {
    let never = Duration::from_secs(u32::MAX.into());
    let wait = wait.min(never);
    let seconds = i64::try_from(wait.as_secs()).expect("at most never");
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: seconds,
            tv_nsec: wait.subsec_nanos().into(),
        },
    };
    timerfd_settime(timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(())
}

impl Buckets {
    /// How long until both have tokens. None if they do.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let buckets = [&mut self.bytes, &mut self.requests];
        let waits = buckets.into_iter().flatten().filter_map(|bucket| {
            bucket.fill(now);
            bucket.wait()
        });
        waits.max()
    }
}

#[derive(Debug)]
struct Bucket {
    size: i128,
    refill_ns: i128,
    /// Tokens times `refill_ns`, so that nothing is lost to rounding. Below zero it is a debt.
    level: i128,
    /// What is left of the one-time burst, in tokens.
    burst: u64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let size = i128::from(rate.size);
        let longest = u128::from(u64::MAX >> 8);
        let refill_ns = rate.refill_time.as_nanos().clamp(1, longest).cast_signed();
        Self {
            size,
            refill_ns,
            level: size * refill_ns,
            burst: rate.one_time_burst,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        self.filled = now;
        let full = self.size * self.refill_ns;
        let earned = self.size.saturating_mul(elapsed.cast_signed());
        self.level = self.level.saturating_add(earned).min(full);
    }

    fn wait(&self) -> Option<Duration> {
        if self.burst > 0 || self.level >= self.refill_ns {
            return None;
        }
        // Until a whole token is there.
        let missing = self.refill_ns.saturating_sub(self.level);
        let nanos = missing.div_euclid(self.size) + 1;
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let cost = i128::from(tokens - from_burst) * self.refill_ns;
        self.level = self.level.saturating_sub(cost);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, burst: u64, refill_ms: u64) -> (Bucket, Instant) {
        let rate = Rate {
            size,
            one_time_burst: burst,
            refill_time: Duration::from_millis(refill_ms),
        };
        let now = Instant::now();
        (Bucket::new(rate, now), now)
    }

    #[test]
    fn a_full_bucket_lets_its_size_through_at_once_and_then_at_its_rate() {
        let (mut bucket, start) = bucket(1000, 0, 1000);
        bucket.take(1000);
        let wait = bucket.wait().unwrap();
        assert!(
            (1_000_000..1_000_002).contains(&wait.as_nanos()),
            "{wait:?}"
        );
        bucket.fill(start + wait);
        assert_eq!(bucket.wait(), None);
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_and_is_paid_for_after() {
        let (mut bucket, start) = bucket(1000, 0, 1000);
        bucket.take(5000);
        bucket.fill(start + Duration::from_millis(3999));
        assert!(bucket.wait().is_some());
        bucket.fill(start + Duration::from_millis(4001));
        assert_eq!(bucket.wait(), None);
    }

    #[test]
    fn the_burst_comes_once() {
        let (mut bucket, start) = bucket(10, 100, 1000);
        bucket.take(100);
        bucket.fill(start + Duration::from_secs(1000));
        bucket.take(10);
        assert!(bucket.wait().is_some(), "only the size is saved up");
    }

    #[test]
    fn the_slower_of_two_limits_holds() {
        let rate = |size| Rate {
            size,
            one_time_burst: 0,
            refill_time: Duration::from_secs(100),
        };
        let limits = Limits {
            bandwidth: Some(rate(1 << 40)),
            operations: Some(rate(2)),
        };
        let tokens = Tokens::new(limits);
        let mut all = [0, 1].map(|_| tokens.limiter().unwrap().unwrap());
        for limiter in &mut all {
            assert!(limiter.admits());
            limiter.charge(Cost::of_bytes(100));
        }
        assert!(!all[0].admits(), "the other one's request counts as well");
        let mut later = tokens.limiter().unwrap().unwrap();
        assert!(!later.admits(), "a new driver finds no new tokens");
        let none = Tokens::new(Limits::default());
        assert!(none.limiter().unwrap().is_none());
    }

    proptest! {
        #[test]
        fn in_the_long_run_the_rate_is_kept(
            size in 1..10_000u64,
            refill_ms in 1..2000u64,
            costs in prop::collection::vec(1..5000u64, 50..100),
        ) {
            let (mut bucket, start) = bucket(size, 0, refill_ms);
            let mut now = start;
            let mut passed = 0;
            for cost in costs {
                if let Some(wait) = bucket.wait() {
                    now += wait;
                    bucket.fill(now);
                }
                prop_assert_eq!(bucket.wait(), None);
                bucket.take(cost);
                passed += cost;
            }
            // All but the last, which may be in debt, and what was there at first.
            let earned = now.duration_since(start).as_nanos() * u128::from(size)
                / (u128::from(refill_ms) * 1_000_000);
            prop_assert!(u128::from(passed) <= earned + u128::from(size) + 5000);
        }

        #[test]
        fn no_numbers_overflow(size in 1..=u64::MAX, burst: u64, refill: u64, cost: u64) {
            let rate = Rate {
                size,
                one_time_burst: burst,
                refill_time: Duration::from_millis(refill.max(1)),
            };
            let now = Instant::now();
            let mut bucket = Bucket::new(rate, now);
            bucket.take(cost);
            bucket.take(cost);
            bucket.fill(now + Duration::from_secs(1 << 30));
            let _ = bucket.wait();
        }
    }
}
