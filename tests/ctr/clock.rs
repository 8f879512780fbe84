//! A container's time of day is the host's, also when that is set.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;
use tests::ctr::Container;
use tests::guest;
use tests::node::{Node, step, within};

use super::on_a_node;

/// How far the clocks may be apart.
const APART: Duration = Duration::from_millis(10);
/// How long the container's may take to follow.
const PATIENCE: Duration = Duration::from_secs(25);
/// Of so many readings the one that took the shortest counts.
const READINGS: u32 = 5;

/// A container that tells the time when it is asked.
struct Teller {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Where its program is.
    _tools: TempDir,
}

impl Teller {
    fn start(node: &Node) -> Self {
        let container = Container::new(node, "clock");
        // busybox's date has no fractions of seconds.
        let tools = guest::root(&[]);
        let from = tools.path().join("bin");
        let mount = format!(
            "type=bind,src={},dst=/tools,options=rbind:ro",
            from.display()
        );
        let options = ["--rm", "--mount", &mount];
        let words = ["/tools/guest_load", "times"];
        let mut command = container.run(&node.containerd, &options, &words);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            asks: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
            _tools: tools,
        }
    }

    /// How far the container's clock is from the host's at least, and how long it took to ask. The answer
    /// is from between question and receipt, and exact if it says such a time.
    fn ask(&mut self) -> (Duration, Duration) {
        let before = now();
        self.asks.write_all(b"\n").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let after = now();
        let said = Duration::from_secs_f64(line.trim().parse().unwrap());
        let behind = before.saturating_sub(said);
        (behind.max(said.saturating_sub(after)), after - before)
    }

    fn apart(&mut self) -> Duration {
        let readings = (0..READINGS).map(|_| self.ask());
        let (apart, took) = readings.min_by_key(|(_, took)| *took).unwrap();
        eprintln!("{apart:?} apart, asked within {took:?}");
        apart
    }

    fn follows(&mut self, what: &str) {
        step(what, || {
            let since = Instant::now();
            while self.apart() > APART {
                assert!(since.elapsed() < PATIENCE, "{what}: it does not follow");
                thread::sleep(Duration::from_secs(1));
            }
        });
    }

    /// Its program ends with its input, and `ctr run --rm` once it has removed the container.
    fn end(self) {
        let Self {
            mut child, asks, ..
        } = self;
        drop(asks);
        within(PATIENCE, "ctr ends", || child.try_wait().unwrap().is_some());
        assert!(child.wait().unwrap().success());
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// Has the host's clock set by so much, in the words of date(1).
fn set_host(by: &str) {
    let set = Command::new("date").args(["--set", by]).output().unwrap();
    assert!(set.status.success(), "{set:?}");
}

#[test]
fn a_containers_clock_follows_the_hosts() {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    if name.trim() != "podvmm-node" {
        eprintln!("SKIPPED: it sets the host's clock, so it is for virtual nodes alone");
        return;
    }
    on_a_node(|node| {
        let mut teller = Teller::start(node);
        teller.follows("as it is");
        for by in ["+90 seconds", "-90 seconds", "+0.2 seconds", "-0.2 seconds"] {
            set_host(by);
            teller.follows(by);
        }
        teller.end();
    });
}
