//! What snapshots cost: how long a restore takes, with guests of a few instructions and with Linux, how much
//! memory clones take, and how long a VM is paused for a snapshot.
//!
//! Needs `PODVMM_GUEST`, and boots Linux once. With `PODVMM_UPDATE_DOCS` set, the table of
//! docs/snapshots.md is written from it. Set `PODVMM_BIN` to a release build.

use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use benches::report::{machine, mebibytes, median, milliseconds, save, update};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::pod::Agent;
use tests::service::{Service, put};
use tests::{code, guest};

const RUNS: usize = 30;
const CLONES: u64 = 10;
/// How long Linux is left idle before its snapshot, as a template that is made ahead is.
const SETTLING: Duration = Duration::from_secs(5);
const MIB: u64 = 1 << 20;
/// How long clones are left to themselves before their memory is looked at.
const IDLE: Duration = Duration::from_secs(10);

// Says '!' again and again.
code!(
    chatter,
    ".code32",
    "1: mov dx, 0x3f8",
    "mov al, '!'",
    "out dx, al",
    "mov ecx, 1000",
    "2: loop 2b",
    "jmp 1b",
);

fn ask(client: &mut Client, name: &str, body: Option<Value>) -> Duration {
    let started = Instant::now();
    put(client, name, body).expect("it is not refused");
    started.elapsed()
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// Writes a guest of a few instructions with so much RAM down.
fn write_chatter(folder: &Path, memory: u64) {
    let service = Service::start(chatter());
    let mut client = service.client();
    let mut vm = service.definition();
    vm["memory"]["size"] = memory.into();
    ask(&mut client, "vm.create", Some(vm));
    ask(&mut client, "vm.boot", None);
    thread::sleep(Duration::from_millis(100));
    ask(&mut client, "vm.pause", None);
    let body = json!({"destination_url": url(folder)});
    ask(&mut client, "vm.snapshot", Some(body));
    service.dismiss();
}

/// From before the process is made until the guest has said something.
fn time_to_life(folder: &Path) -> Duration {
    let started = Instant::now();
    let mut child = Command::new(tests::podvmm::binary())
        .arg("--restore")
        .arg(folder)
        .args(["--serial", "tty"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("podvmm starts");
    let mut stdout = child.stdout.take().expect("it was piped");
    stdout.read_exact(&mut [0]).expect("the guest goes on");
    let took = started.elapsed();
    child.kill().expect("it is a child of ours");
    child.wait().expect("it is a child of ours");
    took
}

/// A Linux guest with an agent, and 512 MiB.
fn boot_linux() -> (Service, Client) {
    let service = Service::start(&[]);
    let mut client = service.client();
    let parts = guest::folder();
    let vm = json!({
        "payload": {
            "kernel": parts.join("vmlinux"),
            "initramfs": parts.join("initramfs.cpio"),
            "cmdline": "podvmm.pod quiet",
        },
        "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
        "memory": {"size": 512 * MIB},
        "balloon": {"size": 0, "free_page_reporting": true},
        "fs": [{"tag": "kataShared", "shared_dir": service.folder.path()}],
        "vsock": {"cid": 3, "socket": service.folder.path().join("vsock")},
    });
    ask(&mut client, "vm.create", Some(vm));
    ask(&mut client, "vm.boot", None);
    Agent::reach(&service.folder.path().join("vsock")).check();
    (service, client)
}

struct Clone {
    service: Service,
    /// From before the process was made.
    running: Duration,
    answered: Duration,
    /// When it had not run yet.
    private_at_first: u64,
}

fn clone(folder: &Path) -> Clone {
    let started = Instant::now();
    let service = Service::start(&[]);
    let mut client = service.client();
    let own = service.folder.path();
    let vsock = own.join("vsock");
    let body = json!({
        "source_url": url(folder),
        "config": {
            "fs": [{"tag": "kataShared", "shared_dir": own}],
            "vsock": {"socket": vsock},
        },
    });
    ask(&mut client, "vm.restore", Some(body));
    let looking = Instant::now();
    let private_at_first = private(service.running.pid());
    let looked = looking.elapsed();
    ask(&mut client, "vm.resume", None);
    let running = started.elapsed() - looked;
    Agent::reach(&vsock).check();
    Clone {
        answered: started.elapsed() - looked,
        service,
        running,
        private_at_first,
    }
}

/// Bytes of memory that are a process's own.
fn private(pid: u32) -> u64 {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = fs::read_to_string(path).expect("it runs");
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib = line.expect("smaps_rollup has it").trim();
    let kib = kib.trim_end_matches(" kB").parse::<u64>();
    kib.expect("it is a number") << 10
}

fn main() {
    let _turn = guest::one_at_a_time();
    let folder = TempDir::new().expect("there is a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let mut rows = Vec::new();
    for (name, memory) in [("512 MiB", 512 * MIB), ("8 GiB", 8192 * MIB)] {
        write_chatter(&at(name), memory);
        let times: Vec<_> = (0..RUNS).map(|_| time_to_life(&at(name))).collect();
        let goal = if memory == 512 * MIB {
            "4 ms"
        } else {
            "the same"
        };
        let what = format!("process start to a guest of {name} that runs");
        rows.push((what, milliseconds(median(&times)), goal));
    }

    let (service, mut client) = boot_linux();
    thread::sleep(SETTLING);
    let full = || json!({"destination_url": url(&at("linux")), "incremental": true});
    let pause = ask(&mut client, "vm.pause", None);
    let whole = ask(&mut client, "vm.snapshot", Some(full()));
    let size = allocated(&at("linux"));
    ask(&mut client, "vm.resume", None);
    thread::sleep(Duration::from_secs(2));
    let stop = Instant::now();
    ask(&mut client, "vm.pause", None);
    let body = json!({"destination_url": url(&at("later")), "incremental": true});
    ask(&mut client, "vm.snapshot", Some(body));
    ask(&mut client, "vm.resume", None);
    let incremental = stop.elapsed();
    service.dismiss();
    rows.push((
        format!(
            "snapshot of an idle Linux of 512 MiB, {} of it",
            mebibytes(size)
        ),
        milliseconds(pause + whole),
        "its touched pages",
    ));
    rows.push((
        "standstill for an incremental snapshot, 2 s later".into(),
        milliseconds(incremental),
        "50 ms",
    ));

    let clones: Vec<_> = (0..RUNS)
        .map(|_| {
            let clone = clone(&at("linux"));
            let times = (clone.running, clone.answered, clone.private_at_first);
            clone.service.dismiss();
            times
        })
        .collect();
    let column = |of: fn(&(Duration, Duration, u64)) -> Duration| {
        milliseconds(median(&clones.iter().map(of).collect::<Vec<_>>()))
    };
    let first = median(&clones.iter().map(|(.., bytes)| *bytes).collect::<Vec<_>>());
    rows.push((
        "process start to Linux that runs, by the API".into(),
        column(|it| it.0),
        "",
    ));
    rows.push((
        "process start to its agent's answer".into(),
        column(|it| it.1),
        "30 ms",
    ));
    rows.push((
        "private memory of podvmm before it runs".into(),
        mebibytes(first),
        "0.6 MiB",
    ));
    let many: Vec<_> = (0..CLONES).map(|_| clone(&at("linux"))).collect();
    thread::sleep(IDLE);
    let each: Vec<_> = many
        .iter()
        .map(|it| private(it.service.running.pid()))
        .collect();
    rows.push((
        format!(
            "private memory of each of {CLONES} clones after {} s",
            IDLE.as_secs()
        ),
        mebibytes(each.iter().sum::<u64>() / CLONES),
        "15 MiB",
    ));
    many.into_iter().for_each(|it| it.service.dismiss());

    tell(&rows);
}

/// Prints what was measured, and puts it where it is kept.
fn tell(rows: &[(String, String, &str)]) {
    let mut table = format!(
        "Measured on {}; medians of {RUNS}.\n\n| | | goal |\n|---|---|---|\n",
        machine()
    );
    for (what, value, goal) in rows {
        writeln!(table, "| {what} | {value} | {goal} |").expect("text can be written");
    }
    println!("{table}");
    let rows: Vec<_> = rows
        .iter()
        .map(|(what, value, _)| json!([what, value]))
        .collect();
    save("restore", &json!({"machine": machine(), "rows": rows}));
    if std::env::var_os("PODVMM_UPDATE_DOCS").is_some() {
        update("docs/snapshots.md", "restore", table);
    }
}

/// Bytes that the files of a folder take on disk.
fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(folder).expect("it was written");
    let files = entries.map(|entry| entry.expect("it is there").metadata());
    files
        .map(|file| file.expect("it is there").blocks() * 512)
        .sum()
}
