//! What the devices' data paths cost with Linux in the guest, per operation: notifications of the
//! driver, interrupts, other exits, and time. On an emulating KVM the time is the guest's; the other
//! figures are the device's.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::Value;
use tests::network::{alone, set_up};
use tests::{Podvmm, guest};

const BLOCK: usize = 64 << 10;

/// A load: what the guest is told, how often it does it, and the device it is on.
struct Load {
    name: &'static str,
    count: u32,
    device: &'static str,
}

const fn load(name: &'static str, count: u32, device: &'static str) -> Load {
    Load {
        name,
        count,
        device,
    }
}

const LOADS: [Load; 11] = [
    load("fs-write", 64, "fs1"),
    load("fs-read", 64, "fs1"),
    load("fs-random-read", 200, "fs1"),
    load("fs-create", 50, "fs1"),
    load("fs-stat", 50, "fs1"),
    load("vsock-out", 32, "vsock"),
    load("vsock-in", 32, "vsock"),
    load("vsock-echo", 100, "vsock"),
    load("tcp-out", 32, "net0"),
    load("tcp-in", 32, "net0"),
    load("tcp-echo", 50, "net0"),
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

fn main() {
    alone(|| run().expect("the loads run"));
}

fn run() -> io::Result<()> {
    let root = guest::root(&["sh", "mount", "ifconfig"]);
    let scratch = tempfile::TempDir::new()?;
    let share = scratch.path().join("share");
    std::fs::create_dir(&share)?;
    let (vsock, api) = (scratch.path().join("vsock"), scratch.path().join("api"));
    let script = "mount -t virtiofs share /mnt && ifconfig eth0 10.79.0.2 up &&
        exec guest_load loads 7000";
    let options = [
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
        "load", "ops", "kicks/op", "irqs/op", "exits/op", "bytes/op", "ms/op"
    );
    for load in LOADS {
        let before = counts(&api, load.device);
        let started = Instant::now();
        writeln!(told.get_mut(), "{} {}", load.name, load.count)?;
        work(&load, &vsock)?;
        if told.read_line(&mut String::new())? == 0 {
            return Err(io::Error::other(format!(
                "the guest failed: {:?}",
                running.wait()
            )));
        }
        let took = started.elapsed();
        let after = counts(&api, load.device);
        let per = |before: u64, after: u64| (after - before) as f64 / f64::from(load.count);
        println!(
            "{:16} {:>5} {:>9.2} {:>9.2} {:>9.2} {:>9.0} {:>9.2}",
            load.name,
            load.count,
            per(before.kicks, after.kicks),
            per(before.interrupts, after.interrupts),
            per(before.exits, after.exits),
            per(before.bytes, after.bytes),
            took.as_secs_f64() * 1000.0 / f64::from(load.count)
        );
    }
    drop(told);
    running.wait();
    Ok(())
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
