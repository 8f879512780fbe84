//! Other people's programs that a test needs while it runs.

use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

/// A program that ends with the test.
#[derive(Debug)]
pub struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// virtiofsd for `folder`, listening on `socket`.
pub fn virtiofsd(folder: &Path, socket: &Path) -> Helper {
    let mut command = Command::new("virtiofsd");
    command.args([
        "--cache",
        "auto",
        "--announce-submounts",
        "--log-level",
        "error",
    ]);
    command.arg("--shared-dir").arg(folder);
    command.arg("--socket-path").arg(socket);
    let child = command.spawn();
    let helper = Helper(child.expect("virtiofsd is installed; resources/test does that"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "virtiofsd never listens");
        thread::sleep(Duration::from_millis(5));
    }
    helper
}
