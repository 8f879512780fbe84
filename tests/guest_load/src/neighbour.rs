//! What a pod does that keeps to itself, and what one does that takes all it can get: programs of the
//! guest's, for the test of the same name.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of a small file.
const FILE: usize = 4096;
/// Bytes of a page.
const PAGE: usize = 4096;
/// The time from one request to the next.
const PAUSE: Duration = Duration::from_millis(10);

/// Carries out `count` small requests one after the other: a program is started, a file written, read and
/// removed, and a message sent over the loopback and back. Prints a line for each: how long these took,
/// in microseconds.
pub fn requests(count: u32, folder: &Path) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        io::copy(&mut stream.try_clone()?, &mut stream)
    });
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let own = std::env::current_exe()?;
    let path = folder.join("small");
    let mut lines = String::new();
    for _ in 0..count {
        let start = Instant::now();
        Command::new(&own).arg("nothing").status()?;
        let program = start.elapsed();
        fs::write(&path, [7; FILE])?;
        let read = fs::read(&path)?;
        fs::remove_file(&path)?;
        assert_eq!(read, [7; FILE], "the file is as it was written");
        let file = start.elapsed() - program;
        let mut message = [7; 64];
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        let loopback = start.elapsed() - program - file;
        let micros = [program, file, loopback].map(|it| it.as_micros().to_string());
        lines += &(micros.join(" ") + "\n");
        thread::sleep(PAUSE);
    }
    print!("{lines}");
    Ok(())
}

/// Takes as much as there is of `what`, until it is killed. Memory is `mib` MiB.
pub fn disturb(what: &str, mib: u32, folder: &Path, host: &str) -> io::Result<()> {
    let (folder, host) = (folder.to_path_buf(), host.to_owned());
    let wants = |kind: &str| what == kind || what == "all";
    let mut threads = Vec::new();
    if wants("cpu") {
        for _ in 0..2 {
            threads.push(thread::spawn(spin));
        }
    }
    if wants("memory") {
        threads.push(thread::spawn(move || fill(mib)));
    }
    if wants("files") {
        threads.push(thread::spawn(move || write_and_read(&folder)));
    }
    if wants("network") {
        threads.push(thread::spawn(move || flood(&host)));
    }
    println!("disturbs");
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().expect("no panic"))
}

fn spin() -> io::Result<()> {
    loop {
        std::hint::spin_loop();
    }
}

/// Writes to each page of so much memory, again and again.
fn fill(mib: u32) -> io::Result<()> {
    let mut memory = vec![0_u8; (mib as usize) << 20];
    for round in (0..=u8::MAX).cycle() {
        for page in memory.chunks_mut(PAGE) {
            page[0] = round;
        }
        std::hint::black_box(&memory);
    }
    Ok(())
}

/// Writes a file and reads it from where it is, again and again.
fn write_and_read(folder: &Path) -> io::Result<()> {
    let path = folder.join("large");
    let piece = vec![7; 1 << 20];
    loop {
        let mut file = File::create(&path)?;
        for _ in 0..8 {
            file.write_all(&piece)?;
        }
        file.sync_data()?;
        let file = File::open(&path)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        io::copy(&mut &file, &mut io::sink())?;
    }
}

/// Sends datagrams that no program wants.
fn flood(host: &str) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    loop {
        // That no program wants them comes back as an error.
        let _ = socket.send_to(&[7; 1400], (host, 9));
    }
}
