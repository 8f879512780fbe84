//! What podvmm's filters and jail cost a start: its system calls, and the time until the API answers.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use api::http::Client;
use tempfile::TempDir;

/// What stands between podvmm and the node.
#[derive(Clone, Copy, Debug)]
pub enum Walls {
    None,
    Filters,
    /// And a jail, with four paths besides the socket's folder.
    Jail,
}

/// All of them, in the order of what they cost.
pub const ALL: [Walls; 3] = [Walls::None, Walls::Filters, Walls::Jail];

impl Walls {
    fn arguments(self, folder: &Path) -> Vec<String> {
        let seccomp = match self {
            Self::None => "false",
            Self::Filters | Self::Jail => "true",
        };
        let socket = folder.join("api").display().to_string();
        let mut words = vec!["--api-socket".into(), socket];
        words.extend(["--seccomp", seccomp].map(String::from));
        if let Self::Jail = self {
            words.extend(["--jail", "required"].map(String::from));
            for (access, name) in [("read", "a"), ("read", "b"), ("write", "c"), ("write", "d")] {
                let path = folder.join(name);
                fs::write(&path, "").expect("the folder is ours");
                words.push("--jail-path".into());
                words.push(format!("{access}={}", path.display()));
            }
        }
        words
    }
}

/// Runs a podvmm by `program` until its API has answered once, and returns how long that took.
fn answered(mut program: Command, walls: Walls, folder: &Path) -> Duration {
    let socket = folder.join("api");
    program.args(walls.arguments(folder)).stdin(Stdio::null());
    let started = Instant::now();
    let mut child = program.spawn().expect("podvmm starts");
    let mut client = loop {
        if let Ok(client) = Client::connect(&socket) {
            break client;
        }
        let ended = child.try_wait().expect("it is a child of ours");
        assert!(ended.is_none(), "podvmm ended: {ended:?}");
        std::thread::sleep(Duration::from_micros(20));
    };
    client.ping().expect("podvmm answers");
    let took = started.elapsed();
    client.exit().expect("podvmm ends");
    child.wait().expect("it is a child of ours");
    took
}

/// From the start of the process to the API's first answer.
pub fn time_to_answer(walls: Walls) -> Duration {
    let folder = TempDir::new().expect("there is a temporary folder");
    let program = Command::new(::tests::podvmm::binary());
    answered(program, walls, folder.path())
}

/// The system calls of all threads until the API's first answer. `None` where there is no strace(1).
pub fn system_calls(walls: Walls) -> Option<usize> {
    let folder = TempDir::new().expect("there is a temporary folder");
    let log = folder.path().join("calls");
    let mut program = Command::new("strace");
    let found = program.arg("-V").stdout(Stdio::null()).status();
    found.ok().filter(std::process::ExitStatus::success)?;
    let mut program = Command::new("strace");
    program.args(["-f", "-qq", "-s", "16", "-o"]).arg(&log);
    program.arg(::tests::podvmm::binary());
    answered(program, walls, folder.path());
    let log = fs::read_to_string(log).expect("strace has written it");
    Some(until_answer(&log))
}

/// How many calls begin before the one that answers. Of one that others interrupt, the end is a line of its own.
fn until_answer(log: &str) -> usize {
    let before = log
        .lines()
        .take_while(|line| !line.contains("HTTP/1.1 200"));
    let is_call = |line: &&str| line.contains('(') && !line.contains(" resumed>");
    before.filter(is_call).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_once_until_the_answer() {
        let log = "\
7 execve(\"podvmm\", [\"podvmm\"], 0x1) = 0
7 epoll_wait(3,  <unfinished ...>
8 --- SIGCHLD {si_signo=SIGCHLD} ---
8 futex(0x1, FUTEX_WAKE, 1) = 1
7 <... epoll_wait resumed>[], 1, -1) = 1
7 write(5, \"HTTP/1.1 200 \\r\\nC\"..., 90) = 90
7 exit_group(0) = ?
";
        assert_eq!(until_answer(log), 3);
    }
}
