//! The guest's time of day, which follows the host's.
//!
//! Two sources tell how far it is off. Where KVM answers hypercalls, the guest's kernel reads the host's
//! clock itself (`ptp_kvm`), to some microseconds. Elsewhere there is only the host's word, which is late
//! by as long as it was under way. Each reading is one or two system calls; nothing waits here.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// The time between readings that the host does not ask for. Clocks drift by some 20 ppm, which is
/// 0.2 ms in this time.
const PERIOD: Duration = Duration::from_secs(10);

/// What poll(2) can wait for at least.
const RESOLUTION: Duration = Duration::from_millis(1);

const DEVICES: &str = "/sys/class/ptp";
/// What KVM's clock calls itself (Linux, drivers/ptp/ptp_kvm_common.c).
const KVM: &str = "KVM virtual PTP";

const NANOS: i64 = 1_000_000_000;
/// Below this the clock is slewed: by 0.5 ms a second (Linux, `ADJ_OFFSET_SINGLESHOT`), so that it keeps
/// running forward. Above it the clock is set, or it would be wrong for minutes.
const SLEWED_NANOS: i64 = 10_000_000;
/// Below this the clock is slewed back by the host's word that the guest is ahead: it is no further
/// ahead than this word was late.
const SLEWED_BACK_NANOS: i64 = 100_000_000;
/// The word and the device are of one clock if they differ by no more. Else the word counts: it is what
/// the host wants, which may be another time than its own.
const AGREE_NANOS: i64 = NANOS;

/// Sets the clock, by the host's word that it is so much after 1970.
pub(crate) fn follow_word(seconds: i64, microseconds: i64) -> io::Result<()> {
    if !(0..1_000_000).contains(&microseconds) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let told = nanos(seconds, microseconds * 1000).ok_or(io::ErrorKind::InvalidInput)?;
    let word = told - now();
    match device_offset() {
        Some(offset) if (offset - word).abs() < AGREE_NANOS => adjust(offset, SLEWED_NANOS),
        _ if word < 0 => adjust(word, SLEWED_BACK_NANOS),
        _ => adjust(word, SLEWED_NANOS),
    }
}

/// Sets the clock by the device. Says whether there is one.
pub(crate) fn follow_device() -> io::Result<bool> {
    match device_offset() {
        Some(offset) => adjust(offset, SLEWED_NANOS).map(|()| true),
        None => Ok(false),
    }
}

/// Follows the device now and then, for a loop that waits for other things.
#[derive(Debug)]
pub(crate) struct Follower {
    /// When the clock is to be looked at next; none where there is nothing to follow.
    due: Option<Instant>,
}

impl Follower {
    /// One that does nothing before a [`PERIOD`] has passed, and outside of a VM nothing at all.
    pub(crate) fn new() -> Self {
        let is_guests = std::process::id() == 1;
        Self {
            due: is_guests.then(|| Instant::now() + PERIOD),
        }
    }

    /// Follows the device if it is time. Says how long the loop may wait then.
    pub(crate) fn turn(&mut self) -> Option<Duration> {
        let due = self.due?;
        let left = due.saturating_duration_since(Instant::now());
        if left >= RESOLUTION {
            return Some(left);
        }
        // Without a device, or the right, there will be none later.
        let goes_on = follow_device().unwrap_or(false);
        self.due = goes_on.then(|| Instant::now() + PERIOD);
        self.due.map(|_| PERIOD)
    }
}

/// Moves the clock by so many nanoseconds: slowly, if they are fewer than `slewed`.
fn adjust(offset: i64, slewed: i64) -> io::Result<()> {
    let change = change(offset, slewed);
    // SAFETY: timex is integers, for which zero is a value.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    match change {
        Change::Slew { microseconds } => {
            timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
            timex.offset = microseconds;
        }
        Change::Set { seconds, nanos } => {
            timex.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
            timex.time.tv_sec = seconds;
            timex.time.tv_usec = nanos;
        }
    }
    // SAFETY: `timex` outlives the call.
    match unsafe { libc::adjtimex(&raw mut timex) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    Slew {
        microseconds: i64,
    },
    /// Moves the clock by these together; `nanos` is never negative (clock_adjtime(2)).
    Set {
        seconds: i64,
        nanos: i64,
    },
}

fn change(offset: i64, slewed: i64) -> Change {
    if offset.abs() < slewed {
        return Change::Slew {
            microseconds: offset / 1000,
        };
    }
    Change::Set {
        seconds: offset.div_euclid(NANOS),
        nanos: offset.rem_euclid(NANOS),
    }
}

/// A moment in nanoseconds since 1970; `None` centuries away.
fn nanos(seconds: i64, nanos: i64) -> Option<i64> {
    seconds.checked_mul(NANOS)?.checked_add(nanos)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
}

/// How many nanoseconds the host's clock is ahead of this one.
fn device_offset() -> Option<i64> {
    static DEVICE: OnceLock<Option<File>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| find(Path::new(DEVICES)));
    let mut times = Times::default();
    // SAFETY: the kernel writes no more than `Times`, which is laid out as its ptp_sys_offset_precise.
    let reading = unsafe { Updater::<{ PTP_SYS_OFFSET_PRECISE }, Times>::new(&mut times) };
    // SAFETY: the opcode is the one that takes such a structure.
    unsafe { ioctl(device.as_ref()?.as_fd(), reading) }.ok()?;
    times.host.nanos()?.checked_sub(times.guest.nanos()?)
}

/// The device that tells the host's time.
fn find(devices: &Path) -> Option<File> {
    let mut found = fs::read_dir(devices).ok()?.filter_map(Result::ok);
    let is_kvms = |name: &Path| {
        fs::read_to_string(name.join("clock_name")).is_ok_and(|name| name.trim() == KVM)
    };
    let device = found.find(|device| is_kvms(&device.path()))?;
    File::open(Path::new("/dev").join(device.file_name())).ok()
}

/// The request by which a clock device tells both times together, from linux/ptp_clock.h.
const PTP_SYS_OFFSET_PRECISE: Opcode = opcode::read_write::<Times>(b'=', 8);

#[repr(C)]
#[derive(Debug, Default)]
struct Times {
    host: PtpTime,
    /// The guest's `CLOCK_REALTIME`, at the same moment.
    guest: PtpTime,
    monotonic: PtpTime,
    reserved: [u32; 4],
}

#[repr(C)]
#[derive(Debug, Default)]
struct PtpTime {
    seconds: i64,
    nanos: u32,
    reserved: u32,
}

impl PtpTime {
    fn nanos(&self) -> Option<i64> {
        nanos(self.seconds, self.nanos.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_slewed_and_much_is_set() {
        let slew = |microseconds| Change::Slew { microseconds };
        let set = |seconds, nanos| Change::Set { seconds, nanos };
        for (offset, expected) in [
            (0, slew(0)),
            (1_999, slew(1)),
            (-9_999_999, slew(-9_999)),
            (10_000_000, set(0, 10_000_000)),
            (-10_000_000, set(-1, 990_000_000)),
            (3_600 * NANOS, set(3_600, 0)),
            (-90 * NANOS - 1, set(-91, NANOS - 1)),
        ] {
            assert_eq!(change(offset, SLEWED_NANOS), expected, "{offset}");
        }
        assert_eq!(change(-60_000_000, SLEWED_BACK_NANOS), slew(-60_000));
    }

    #[test]
    fn times_that_are_none_are_refused() {
        for (seconds, microseconds) in [(0, -1), (0, 1_000_000), (i64::MAX, 0), (i64::MIN, 0)] {
            let refused = follow_word(seconds, microseconds).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn the_request_is_the_kernels() {
        assert_eq!(PTP_SYS_OFFSET_PRECISE, 0xc040_3d08);
    }

    #[test]
    fn a_device_is_known_by_its_name() {
        let folder = std::env::temp_dir().join(format!("podvmm-agent-ptp-{}", std::process::id()));
        // Any file of /dev will do for one.
        fs::create_dir_all(folder.join("null")).unwrap();
        fs::write(folder.join("null/clock_name"), "a network card\n").unwrap();
        assert!(find(&folder).is_none());
        fs::write(folder.join("null/clock_name"), "KVM virtual PTP\n").unwrap();
        assert!(find(&folder).is_some());
        fs::remove_dir_all(&folder).unwrap();
        assert!(find(&folder).is_none());
    }
}
