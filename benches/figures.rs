//! The figures of the README: start, boot and memory, and what filters and a jail cost a start; against
//! another VMM if `PODVMM_PEER` names one.
//!
//! podvmm and the peer are run in turn, so that their ratio holds although the
//! machine's speed drifts. Results go to `target/figures.json`; with
//! `PODVMM_UPDATE_README` set, the README's table is written from them.

use std::fs;
use std::time::Duration;

use benches::report::{machine, mebibytes, median, milliseconds, save, update};
use benches::walls::{self, Walls};
use benches::{LinuxGuest, hello_kernel, peer, podvmm, time_to_first_byte};
use serde_json::json;

const STARTS: usize = 40;
const BOOTS: usize = 3;
const COUNTS: usize = 5;

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
    let walls = Costs::take();
    rows.extend(walls.rows());
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
        "answer_us": walls.times.each_ref().map(|times| microseconds(times)),
        "system_calls": walls.calls,
    });
    save("figures", &figures);
    if std::env::var_os("PODVMM_UPDATE_README").is_some() {
        update("README.md", "figures", table);
    }
}

/// What a start costs without filters and a jail, with filters, and with both.
struct Costs {
    /// From the start of the process to the API's first answer.
    times: [Vec<Duration>; 3],
    /// System calls until then; none without strace(1).
    calls: Option<[usize; 3]>,
}

impl Costs {
    fn take() -> Self {
        let mut times: [Vec<Duration>; 3] = Default::default();
        for run in 0..=STARTS {
            // In turn, so that their differences hold although the machine's speed drifts.
            for (times, walls) in times.iter_mut().zip(walls::ALL) {
                let time = walls::time_to_answer(walls);
                if run > 0 {
                    times.push(time);
                }
            }
        }
        let count = |walls: Walls| {
            let mut counts = [0; COUNTS];
            for count in &mut counts {
                *count = walls::system_calls(walls)?;
            }
            Some(median(&counts))
        };
        let calls: Vec<_> = walls::ALL.into_iter().filter_map(count).collect();
        let calls = calls.try_into().ok();
        eprintln!("system calls: {calls:?}");
        Self { times, calls }
    }

    fn rows(&self) -> Vec<Row> {
        let whats = [
            "process start to the API's first answer, without filters and a jail",
            "the same with filters",
            "the same with filters and a jail of four paths",
        ];
        let goals = ["", "", "3 ms more than without, on hardware KVM"];
        let times = self.times.iter().zip(whats.into_iter().zip(goals));
        let times = times.map(|(times, (what, goal))| Row {
            what,
            figure: milliseconds(median(times)),
            goal,
        });
        let calls = self.calls.map(|[none, filters, jail]| Row {
            what: "system calls of these three starts",
            figure: format!("{none}, {filters}, {jail}"),
            goal: "",
        });
        times.chain(calls).collect()
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
