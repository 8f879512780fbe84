//! The agent's own figures, and those of volumes.

use std::fmt::Write;
use std::io;

use protocol::agent::messages::{VolumeStatsResponse, VolumeUsage, VolumeUsageUnit};

/// The agent's own figures, in the text format of Prometheus.
pub(crate) fn metrics(containers: usize) -> io::Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let figures = [
        (
            "podvmm_agent_resident_memory_bytes",
            "Memory the agent has in use.",
            number(&status, "VmRSS") * 1024,
        ),
        (
            "podvmm_agent_threads",
            "Threads of the agent.",
            number(&status, "Threads"),
        ),
        (
            "podvmm_containers",
            "Containers that are there.",
            containers.try_into().unwrap_or(u64::MAX),
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in figures {
        // A string takes all that is written to it.
        let _ = write!(
            text,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n"
        );
    }
    Ok(text)
}

/// The number behind `key` in the text of /proc/PID/status; 0 if there is none.
fn number(status: &str, key: &str) -> u64 {
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(name, _)| *name == key);
    let number = value.and_then(|(_, value)| value.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

/// How full the file system at `path` is.
pub(crate) fn volume(path: &str) -> io::Result<VolumeStatsResponse> {
    let stats = rustix::fs::statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stats.f_frsize);
    Ok(VolumeStatsResponse {
        usage: vec![
            VolumeUsage {
                available: bytes(stats.f_bavail),
                total: bytes(stats.f_blocks),
                used: bytes(stats.f_blocks.saturating_sub(stats.f_bfree)),
                unit: VolumeUsageUnit::Bytes.into(),
            },
            VolumeUsage {
                available: stats.f_favail,
                total: stats.f_files,
                used: stats.f_files.saturating_sub(stats.f_ffree),
                unit: VolumeUsageUnit::Inodes.into(),
            },
        ],
        volume_condition: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn figures_are_lines_of_prometheus() {
        let text = metrics(3).unwrap();
        assert!(text.ends_with("# TYPE podvmm_containers gauge\npodvmm_containers 3\n"));
        let values = text.lines().filter(|line| !line.starts_with('#'));
        let values: Vec<u64> = values
            .map(|line| line.split_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert!(values[0] > 4096 && values[1] > 0, "{text}");
    }

    #[test]
    fn numbers_are_found_by_name() {
        let status = "Name:\tVmRSS: 3\nVmRSS:\t    1234 kB\nBroken\nNone:\n";
        let values = ["VmRSS", "None", "Broken", "No"].map(|key| number(status, key));
        assert_eq!(values, [1234, 0, 0, 0]);
    }

    #[test]
    fn a_volume_has_a_size() {
        let stats = volume("/").unwrap();
        assert!(stats.usage[0].total >= stats.usage[0].used);
        volume("/no/such/folder").unwrap_err();
    }

    proptest! {
        #[test]
        fn any_text_has_a_number_or_none(text in "(VmRSS:|\\PC|[0-9]|\n){0,20}") {
            let _ = number(&text, "VmRSS");
        }
    }
}
