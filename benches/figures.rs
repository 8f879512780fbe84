//! The figures of the README: start, boot and memory, against another VMM if
//! `PODVMM_PEER` names one.
//!
//! podvmm and the peer are run in turn, so that their ratio holds although the
//! machine's speed drifts. Results go to `target/figures.json`; with
//! `PODVMM_UPDATE_README` set, the README's table is written from them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use benches::{LinuxGuest, hello_kernel, median, peer, podvmm, time_to_first_byte};
use serde_json::{Value, json};

const STARTS: usize = 40;
const BOOTS: usize = 3;
const TABLE_BEGIN: &str = "<!-- figures: begin -->\n";
const TABLE_END: &str = "<!-- figures: end -->";

/// A row of the table.
struct Row {
    what: &'static str,
    figure: String,
    goal: &'static str,
}

fn main() {
    let kernel = hello_kernel();
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for run in 0..=STARTS {
        let mine = time_to_first_byte(podvmm(&kernel)).0;
        let other = peer(&kernel).map(|peer| time_to_first_byte(peer).0);
        // The first of each only warms the page cache.
        if run > 0 {
            ours.push(mine);
            theirs.extend(other);
        }
    }
    eprintln!("start: {:?}", median(&ours));

    let mut boots = Vec::new();
    let mut overheads = Vec::new();
    for _ in 0..BOOTS {
        let guest = LinuxGuest::boot(&["/bin/sleep", "1000"]);
        boots.push(guest.ready);
        overheads.push(guest.overhead_bytes());
        eprintln!(
            "boot: {:?}, overhead {} bytes",
            guest.ready,
            guest.overhead_bytes()
        );
    }
    let binary_bytes = fs::metadata(tests::podvmm::binary())
        .expect("it was just run")
        .len();

    let mut rows = vec![
        Row {
            what: "process start to first guest instruction (15 MiB kernel, 128 MiB RAM)",
            figure: milliseconds(median(&ours)),
            goal: "5 ms",
        },
        Row {
            what: "process start to the agent starting a command (1 vCPU, 128 MiB RAM)",
            figure: format!("{:.1} s", median(&boots).as_secs_f64()),
            goal: "15 s on an emulating KVM",
        },
        Row {
            what: "resident memory of podvmm without guest RAM",
            figure: mebibytes(median(&overheads)),
            goal: "4 MiB",
        },
        Row {
            what: "binary, stripped",
            figure: mebibytes(binary_bytes),
            goal: "4 MiB",
        },
    ];
    if !theirs.is_empty() {
        rows.push(Row {
            what: "the same start by the peer, run in turn",
            figure: format!(
                "{}, {:.1} times ours",
                milliseconds(median(&theirs)),
                median(&theirs).as_secs_f64() / median(&ours).as_secs_f64()
            ),
            goal: "",
        });
    }
    let table = table(&rows);
    println!("{table}");
    save(&json!({
        "machine": machine(),
        "start_us": microseconds(&ours),
        "peer": std::env::var("PODVMM_PEER").ok(),
        "peer_start_us": microseconds(&theirs),
        "ready_us": microseconds(&boots),
        "overhead_bytes": overheads,
        "binary_bytes": binary_bytes,
    }));
    if std::env::var_os("PODVMM_UPDATE_README").is_some() {
        update_readme(&table);
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "Measured on {}.\n\n| | median | goal |\n|---|---|---|\n",
        machine()
    );
    for Row { what, figure, goal } in rows {
        text.push_str(&format!("| {what} | {figure} | {goal} |\n"));
    }
    text
}

/// What the figures depend on.
fn machine() -> String {
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

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn mebibytes(bytes: u64) -> String {
    let hundredths = bytes * 100 / (1 << 20);
    format!("{}.{:02} MiB", hundredths / 100, hundredths % 100)
}

fn microseconds(times: &[Duration]) -> Vec<u64> {
    times
        .iter()
        .map(|time| u64::try_from(time.as_micros()).expect("runs take minutes"))
        .collect()
}

fn save(figures: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/figures.json");
    fs::write(&path, format!("{figures:#}\n")).expect("target can be written");
    eprintln!("written to target/figures.json");
}

fn update_readme(table: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(&path).expect("there is a README");
    let (before, rest) = readme
        .split_once(TABLE_BEGIN)
        .expect("the README marks its table");
    let (_, after) = rest.split_once(TABLE_END).expect("and the end of it");
    fs::write(
        &path,
        format!("{before}{TABLE_BEGIN}{table}{TABLE_END}{after}"),
    )
    .expect("the README can be written");
}
