//! Polling for what the kernel makes or removes on its own time, and tells no process of.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Asks until there is an answer, at most for `deadline`; soon again at first, then less often.
pub(crate) fn until<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    const LONGEST_PAUSE: Duration = Duration::from_millis(50);
    let mut answer = ask();
    if answer.is_some() {
        return answer;
    }
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    while answer.is_none() && start.elapsed() < deadline {
        sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
        answer = ask();
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_asks_until_answered() {
        let mut times = 0;
        let answer = until(Duration::from_secs(60), || {
            times += 1;
            (times == 3).then_some("yes")
        });
        assert_eq!((answer, times), (Some("yes"), 3));
    }

    #[test]
    fn it_asks_once_more_at_the_deadline_and_gives_up() {
        let mut times = 0;
        let answer: Option<()> = until(Duration::from_millis(1), || {
            times += 1;
            None
        });
        assert_eq!(answer, None);
        assert!(times >= 2);
    }
}
