//! What benches print and write down.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

/// What the figures depend on.
pub fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.map_or("an unknown CPU", |name| {
        name.trim_start_matches([' ', '\t', ':'])
    });
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = kernel.split('-').next().unwrap_or_default().trim();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let emulating = Path::new("/sys/module/kvm_pvm").exists();
    let kvm = if emulating {
        "an emulating KVM"
    } else {
        "hardware KVM"
    };
    format!("{cpu}, {cpus} CPUs, Linux {version}, {kvm}")
}

/// A time, as short as it is.
pub fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// A size, rounded down.
pub fn mebibytes(bytes: u64) -> String {
    let hundredths = bytes * 100 / (1 << 20);
    format!("{}.{:02} MiB", hundredths / 100, hundredths % 100)
}

/// The middle of some measurements.
pub fn median<T: Copy + Ord>(samples: &[T]) -> T {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// Writes raw numbers to `target/NAME.json`.
pub fn save(name: &str, figures: &Value) {
    let path = in_workspace(&format!("target/{name}.json"));
    fs::write(path, format!("{figures:#}\n")).expect("target can be written");
    eprintln!("written to target/{name}.json");
}

/// Writes a table into a document of the workspace, between the marks of its name.
pub fn update(document: &str, name: &str, table: impl Display) {
    let (begin, end) = (
        format!("<!-- {name}: begin -->\n"),
        format!("<!-- {name}: end -->"),
    );
    let path = in_workspace(document);
    let text = fs::read_to_string(&path).expect("the document is there");
    let (before, rest) = text.split_once(&begin).expect("it marks its table");
    let (_, after) = rest.split_once(&end).expect("and the end of it");
    let text = format!("{before}{begin}{table}{end}{after}");
    fs::write(path, text).expect("the document can be written");
}

fn in_workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}
