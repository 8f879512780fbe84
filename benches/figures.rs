//! The figures of the README: start, boot and memory, against another VMM if
//! `PODVMM_PEER` names one.
//!
//! podvmm and the peer are run in turn, so that their ratio holds although the
//! machine's speed drifts. Results go to `target/figures.json`; with
//! `PODVMM_UPDATE_README` set, the README's table is written from them.

use std::fs;
use std::time::Duration;

use benches::report::{machine, mebibytes, median, milliseconds, save, update};
use benches::{LinuxGuest, hello_kernel, peer, podvmm, time_to_first_byte};
use serde_json::json;

const STARTS: usize = 40;
const BOOTS: usize = 3;

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
    let figures = json!({
        "machine": machine(),
        "start_us": microseconds(&ours),
        "peer": std::env::var("PODVMM_PEER").ok(),
        "peer_start_us": microseconds(&theirs),
        "ready_us": microseconds(&boots),
        "overhead_bytes": overheads,
        "binary_bytes": binary_bytes,
    });
    save("figures", &figures);
    if std::env::var_os("PODVMM_UPDATE_README").is_some() {
        update("README.md", "figures", table);
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

fn microseconds(times: &[Duration]) -> Vec<u64> {
    times
        .iter()
        .map(|time| u64::try_from(time.as_micros()).expect("runs take minutes"))
        .collect()
}
