//! The guest's CPUs. Those that the monitor has added wait to be brought online.

use std::fs;
use std::io;
use std::path::Path;

/// Where the kernel has a folder for each CPU.
pub(crate) const FOLDER: &str = "/sys/devices/system/cpu";

/// Brings CPUs online until `total` are, the one that cannot go offline among them. The lowest numbers
/// come first, as the monitor adds them. CPUs that are not there are not waited for.
pub(crate) fn online(folder: &Path, total: u32) -> io::Result<()> {
    let mut waiting = Vec::new();
    let mut online = 1;
    for index in 1_u32.. {
        let path = folder.join(format!("cpu{index}/online"));
        let Ok(state) = fs::read_to_string(&path) else {
            break;
        };
        match state.trim() {
            "0" => waiting.push(path),
            _ => online += 1,
        }
    }
    let missing = total.saturating_sub(online);
    let missing = usize::try_from(missing).unwrap_or(usize::MAX);
    let mut chosen = waiting.iter().take(missing);
    chosen.try_for_each(|path| fs::write(path, "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_online_as_there_are_to_be() {
        let folder = std::env::temp_dir().join(format!("podvmm-agent-cpus-{}", std::process::id()));
        let file = |index: u32| folder.join(format!("cpu{index}/online"));
        for index in 1..5 {
            fs::create_dir_all(folder.join(format!("cpu{index}"))).unwrap();
            let state = if index == 2 { "1\n" } else { "0\n" };
            fs::write(file(index), state).unwrap();
        }
        let states = |total: u32| {
            online(&folder, total).unwrap();
            [1, 2, 3, 4].map(|index| fs::read_to_string(file(index)).unwrap().trim() == "1")
        };
        assert_eq!(states(0), [false, true, false, false]);
        assert_eq!(states(2), [false, true, false, false]);
        assert_eq!(states(3), [true, true, false, false]);
        // Asked twice it is the same.
        assert_eq!(states(3), [true, true, false, false]);
        assert_eq!(states(9), [true; 4]);
        fs::remove_dir_all(&folder).unwrap();
    }
}
