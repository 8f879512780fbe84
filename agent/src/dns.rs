//! The name servers of the pod, for the guest itself: containers are given files of their own.

use std::fs;
use std::io;
use std::path::Path;

const FOLDER: &str = protocol::contract::SANDBOX;
const GUESTS: &str = "/etc/resolv.conf";

/// Writes the lines of a resolv.conf(5), and puts them where the guest looks if it looks anywhere.
pub(crate) fn set(lines: &[String]) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let file = Path::new(FOLDER).join("resolv.conf");
    fs::create_dir_all(FOLDER)?;
    fs::write(&file, text(lines))?;
    if Path::new(GUESTS).exists() {
        rustix::mount::mount_bind(&file, GUESTS)?;
    }
    Ok(())
}

fn text(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_ends() {
        let lines = ["search pod.local", "nameserver 10.0.0.10"].map(String::from);
        assert_eq!(text(&lines), "search pod.local\nnameserver 10.0.0.10\n");
        set(&[]).unwrap();
    }
}
