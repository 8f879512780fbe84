//! What the devices' data paths cost with Linux in the guest, per operation: notifications of the
//! driver, interrupts, other exits, and time, over each transport that the guest's kernel knows. On an
//! emulating KVM the time is the guest's; the other figures are the device's. With `PODVMM_UPDATE_DOCS` set,
//! the table of docs/figures.md is written from them.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use benches::report::{machine, save, update};
use serde_json::{Value, json};
use tests::network::{alone, set_up};
use tests::{Podvmm, guest};

const BLOCK: usize = 64 << 10;
const TRANSPORTS: [&str; 2] = ["mmio", "pci"];

/// A load: what the guest is told, what that is, how often it does it, and the device it is on.
struct Load {
    name: &'static str,
    title: &'static str,
    count: u32,
    device: &'static str,
}

const fn load(name: &'static str, title: &'static str, count: u32, device: &'static str) -> Load {
    Load {
        name,
        title,
        count,
        device,
    }
}

const LOADS: [Load; 11] = [
    load("fs-write", "open, write 64 KiB, close", 64, "fs1"),
    load(
        "fs-read",
        "read 64 KiB of a shared file (`O_DIRECT`)",
        64,
        "fs1",
    ),
    load("fs-random-read", "read 4 KiB of it at random", 200, "fs1"),
    load("fs-create", "make a small file and write it", 50, "fs1"),
    load("fs-stat", "ask for a file's attributes", 50, "fs1"),
    load("vsock-out", "send 64 KiB by vsock", 32, "vsock"),
    load("vsock-in", "get 64 KiB by vsock", 32, "vsock"),
    load("vsock-echo", "one byte by vsock and back", 100, "vsock"),
    load("tcp-out", "send 64 KiB by TCP on a tap", 32, "net0"),
    load("tcp-in", "get 64 KiB by TCP on a tap", 32, "net0"),
    load("tcp-echo", "one byte by TCP and back", 50, "net0"),
];

/// How far the counters are.
#[derive(Clone, Copy)]
struct Counts {
    kicks: u64,
    interrupts: u64,
    exits: u64,
    bytes: u64,
}

fn counts(api: &Path, device: &str) -> Counts {
    let counters = Client::connect(api)
        .and_then(|mut client| client.call("GET", "/api/v1/vm.counters", None, &[]))
        .expect("podvmm answers");
    let counters: Value = serde_json::from_slice(&counters).expect("in JSON");
    let of = |section: &str, name: &str| counters[section][name].as_u64().unwrap_or(0);
    let exits = ["io_in", "io_out", "mmio_read", "mmio_write"];
    Counts {
        kicks: of(device, "kicks"),
        interrupts: of(device, "interrupts"),
        exits: exits.iter().map(|kind| of("exits", kind)).sum(),
        bytes: of(device, "bytes_in") + of(device, "bytes_out"),
    }
}

/// What an operation costs.
struct Cost {
    kicks: f64,
    interrupts: f64,
    exits: f64,
    bytes: f64,
    ms: f64,
}

fn main() {
    alone(|| {
        let costs = TRANSPORTS.map(|transport| {
            if transport == "pci" && !kernel_has_pci() {
                eprintln!("SKIPPED: the guest's kernel has no PCI, so it finds no device there");
                return Vec::new();
            }
            run(transport).expect("the loads run")
        });
        tell(&costs);
    });
}

/// Whether the guest's kernel finds virtio devices on a PCI bus, by the configuration that is kept beside it.
fn kernel_has_pci() -> bool {
    let kernel = fs::canonicalize(guest::folder().join("vmlinux")).expect("the guest was built");
    let config = fs::read_to_string(kernel.with_file_name("config"));
    config.is_ok_and(|config| config.lines().any(|line| line == "CONFIG_VIRTIO_PCI=y"))
}

/// Runs all loads in a guest whose devices are reached by `transport`.
fn run(transport: &str) -> io::Result<Vec<Cost>> {
    let root = guest::root(&["sh", "mount", "ifconfig"]);
    let scratch = tempfile::TempDir::new()?;
    let share = scratch.path().join("share");
    fs::create_dir(&share)?;
    let (vsock, api) = (scratch.path().join("vsock"), scratch.path().join("api"));
    let script = "mount -t virtiofs share /mnt && ifconfig eth0 10.79.0.2 up &&
        exec guest_load loads 7000";
    let options = [
        "--transport".into(),
        transport.into(),
        "--rootfs".into(),
        root.path().display().to_string(),
        "--fs".into(),
        format!("tag=share,shared_dir={}", share.display()),
        "--vsock".into(),
        format!("cid=3,socket={}", vsock.display()),
        "--net".into(),
        "tap=load0".into(),
        "--api-socket".into(),
        api.display().to_string(),
        "--".into(),
        "/bin/sh".into(),
        "-c".into(),
        script.into(),
    ];
    let running = Podvmm::new(options).spawn();
    set_up("load0", "10.79.0.1/24");
    while !vsock.exists() {
        thread::sleep(Duration::from_millis(1));
    }
    let mut told = call(&vsock)?;
    println!(
        "{:16} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9}",
        transport, "ops", "kicks/op", "irqs/op", "exits/op", "bytes/op", "ms/op"
    );
    let mut costs = Vec::new();
    for load in &LOADS {
        let before = counts(&api, load.device);
        let started = Instant::now();
        writeln!(told.get_mut(), "{} {}", load.name, load.count)?;
        work(load, &vsock)?;
        if told.read_line(&mut String::new())? == 0 {
            return Err(io::Error::other(format!(
                "the guest failed: {:?}",
                running.wait()
            )));
        }
        let took = started.elapsed();
        let after = counts(&api, load.device);
        let per = |before: u64, after: u64| (after - before) as f64 / f64::from(load.count);
        let cost = Cost {
            kicks: per(before.kicks, after.kicks),
            interrupts: per(before.interrupts, after.interrupts),
            exits: per(before.exits, after.exits),
            bytes: per(before.bytes, after.bytes),
            ms: took.as_secs_f64() * 1000.0 / f64::from(load.count),
        };
        println!(
            "{:16} {:>5} {:>9.2} {:>9.2} {:>9.2} {:>9.0} {:>9.2}",
            load.name, load.count, cost.kicks, cost.interrupts, cost.exits, cost.bytes, cost.ms
        );
        costs.push(cost);
    }
    drop(told);
    running.wait();
    Ok(costs)
}

/// Puts the figures where they are kept: what each load costs over each transport, side by side.
fn tell(costs: &[Vec<Cost>; 2]) {
    let mut table = format!(
        "Measured on {}.\n\n| | notifications, mmio | pci | interrupts, mmio | pci | exits, mmio | pci |\n\
         |---|---|---|---|---|---|---|\n",
        machine()
    );
    let mut rows = Vec::new();
    for (index, load) in LOADS.iter().enumerate() {
        let both = costs.each_ref().map(|costs| costs.get(index));
        let cell = |figure: fn(&Cost) -> f64| {
            both.map(|cost| cost.map_or(String::new(), |cost| format!("{:.2}", figure(cost))))
                .join(" | ")
        };
        let cells = [
            cell(|cost| cost.kicks),
            cell(|cost| cost.interrupts),
            cell(|cost| cost.exits),
        ];
        let cells = cells.join(" | ");
        writeln!(table, "| {} | {cells} |", load.title).expect("text can be written");
        let figures = both.map(|cost| {
            cost.map(|cost| {
                json!({"kicks": cost.kicks, "interrupts": cost.interrupts, "exits": cost.exits,
                    "bytes": cost.bytes, "ms": cost.ms})
            })
        });
        rows.push(json!({"load": load.name, "mmio": figures[0], "pci": figures[1]}));
    }
    println!("\n{table}");
    save(
        "loads",
        &json!({"machine": machine(), "per_operation": rows}),
    );
    if std::env::var_os("PODVMM_UPDATE_DOCS").is_some() {
        update("docs/figures.md", "loads", table);
    }
}

fn call(socket: &Path) -> io::Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "CONNECT 7000")?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.starts_with("OK ") {
        Ok(reader)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// The host's part of it.
fn work(load: &Load, vsock: &Path) -> io::Result<()> {
    match load.name.split_once('-') {
        Some(("vsock", part)) => {
            let mut stream = call(vsock)?.into_inner();
            transfer(part, load.count, &mut stream)?;
            stream.shutdown(Shutdown::Write)
        }
        Some(("tcp", part)) => {
            let mut stream = loop {
                match TcpStream::connect("10.79.0.2:7001") {
                    Ok(stream) => break stream,
                    Err(_) => thread::sleep(Duration::from_millis(20)),
                }
            };
            stream.set_nodelay(true)?;
            transfer(part, load.count, &mut stream)?;
            stream.shutdown(Shutdown::Write)
        }
        _ => Ok(()),
    }
}

fn transfer(part: &str, count: u32, stream: &mut (impl Read + Write)) -> io::Result<()> {
    match part {
        "out" => io::copy(stream, &mut io::sink()).map(drop),
        "in" => (0..count).try_for_each(|_| stream.write_all(&[7; BLOCK])),
        _ => (0..count).try_for_each(|_| {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])
        }),
    }
}
