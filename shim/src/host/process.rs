//! A process by a handle that stays its own.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process. It stays the same one even if another process has its number later.
#[derive(Debug)]
pub(crate) struct Process(OwnedFd);

impl Process {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    pub(crate) fn kill(&self) {
        // One that has ended needs no signal.
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }

    /// Waits for its end, which its parent need not have heard of.
    pub(crate) fn await_end(&self, timeout: Duration) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout))? {
            0 => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "podvmm does not end",
            )),
            _ => Ok(()),
        }
    }
}

/// The processors' time in the text of /proc/PID/stat (proc_pid_stat(5)): utime and stime, in hundredths
/// of a second. The name of the program before them may have any characters.
pub(crate) fn cpu_usec(stat: &str) -> Option<u64> {
    const TICK_USEC: u64 = 10_000;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    // Each is rounded down.
    let ticks = ticks()?.saturating_add(ticks()?).saturating_add(2);
    Some(ticks.saturating_mul(TICK_USEC))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn the_processors_time_is_found_behind_any_name() {
        let stat = "1 (a) b) S 2 3 4 5 6 7 8 9 10 11 150 250 14 15 16";
        assert_eq!(cpu_usec(stat), Some(4_020_000));
        assert_eq!((cpu_usec("1 (a) S 2"), cpu_usec("")), (None, None));
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(cpu_usec(&own).is_some());
    }

    #[test]
    fn a_process_is_killed_and_its_end_awaited() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let late = process.await_end(Duration::from_millis(1)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        process.kill();
        process.await_end(Duration::from_secs(10)).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        process.kill();
    }
}
