//! What the Linux tests and benches run inside the guest: the other ends of their transfers, and
//! loads on their devices. Linked statically.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;

use tests::transfer::{self, Checksum};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["vsock-serve", port, count] => vsock_serve(number(port), number(count)),
        ["tcp-serve", port, count] => tcp_serve(number(port), number(count)),
        ["vsock-call", port] => vsock_call(number(port)),
        ["vsock-shell", port] => vsock_shell(number(port)),
        ["loads", port] => loads(number(port)),
        _ => Err(io::Error::other("unknown command")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest_load {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number(word: &str) -> u32 {
    word.parse().expect("a number")
}

/// Serves `count` connections at once, each of which sends and gets a checked transfer.
fn vsock_serve(port: u32, count: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    let served: Vec<_> = (0..count)
        .map(|_| {
            let (stream, _) = listener.accept()?;
            Ok(thread::spawn(move || serve(stream)))
        })
        .collect::<io::Result<_>>()?;
    for thread in served {
        thread.join().expect("no panic")?;
    }
    Ok(())
}

/// Serves `count` connections one after the other in the same way.
fn tcp_serve(port: u32, count: u32) -> io::Result<()> {
    let port = u16::try_from(port).map_err(io::Error::other)?;
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    (0..count).try_for_each(|_| {
        let (stream, _) = listener.accept()?;
        serve(stream)
    })
}

/// Runs the line that each connection sends as a command of the shell, and sends back what that
/// says.
fn vsock_shell(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        let said = Command::new("/bin/sh").args(["-c", &line]).output()?;
        stream.write_all(&said.stdout)?;
        stream.write_all(&said.stderr)?;
        stream.end_sending()?;
        io::copy(&mut stream, &mut io::sink())?;
    }
}

/// A stream whose halves end one by one.
trait Halves: Read + Write {
    fn end_sending(&self) -> io::Result<()>;
}

impl Halves for VsockStream {
    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Halves for TcpStream {
    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Takes all the other end sends, answers with its checksum and as many bytes of its own.
fn serve(mut stream: impl Halves) -> io::Result<()> {
    let checksum = Checksum::of_all(&mut stream)?;
    stream.write_all(&checksum.to_bytes())?;
    transfer::send(&mut stream, checksum.seed(), checksum.len)?;
    stream.end_sending()?;
    // The other end goes first, so that nothing of ours is lost.
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}

/// Calls the host, says hello, ends its half and prints the answer.
fn vsock_call(port: u32) -> io::Result<()> {
    let mut stream = VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, port))?;
    stream.write_all(b"hello from the guest")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Bytes of one transfer of a load.
const BLOCK: usize = 64 << 10;
const PAGE: usize = 4 << 10;

/// Does what the host writes line by line, `NAME COUNT`, and answers each line when it is done.
fn loads(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    let (mut told, _) = listener.accept()?;
    let lines = BufReader::new(told.try_clone()?);
    for line in lines.lines() {
        let line = line?;
        let (name, count) = line.split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
        load(name, number(count), &listener)?;
        writeln!(told, "done")?;
    }
    Ok(())
}

fn load(name: &str, count: u32, listener: &VsockListener) -> io::Result<()> {
    const FILE: &str = "/mnt/load";
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true);
        // Each is a request of its own, whatever the guest's cache may hold.
        options.custom_flags(libc::O_DIRECT).open(FILE)
    };
    let count = u64::from(count);
    match name {
        "idle" => Ok(()),
        "fs-write" => {
            (0..count).try_for_each(|at| open()?.write_all_at(&Aligned::new().0, at * BLOCK as u64))
        }
        "fs-read" => {
            let file = open()?;
            let mut block = Aligned::new();
            (0..count).try_for_each(|at| file.read_exact_at(&mut block.0, at * BLOCK as u64))
        }
        "fs-random-read" => {
            let file = open()?;
            let pages = file.metadata()?.len() / PAGE as u64;
            let mut block = Aligned::new();
            (0..count).try_for_each(|at| {
                let page = at.wrapping_mul(0x9e37_79b9) % pages;
                file.read_exact_at(&mut block.0[..PAGE], page * PAGE as u64)
            })
        }
        "fs-create" => (0..count)
            .try_for_each(|at| fs::write(Path::new("/mnt").join(at.to_string()), b"small")),
        "fs-stat" => (0..count)
            .try_for_each(|at| fs::metadata(Path::new("/mnt").join(at.to_string())).map(drop)),
        "vsock-out" => blocks_out(listener.accept()?.0, count),
        "vsock-in" => all_in(listener.accept()?.0),
        "vsock-echo" => echo(listener.accept()?.0),
        "tcp-out" => blocks_out(tcp()?, count),
        "tcp-in" => all_in(tcp()?),
        "tcp-echo" => echo(tcp()?),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn tcp() -> io::Result<TcpStream> {
    let stream = TcpListener::bind(("0.0.0.0", 7001))?.accept()?.0;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn blocks_out(mut stream: impl Halves, count: u64) -> io::Result<()> {
    let block = Aligned::new();
    (0..count).try_for_each(|_| stream.write_all(&block.0))?;
    stream.end_sending()?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

fn all_in(mut stream: impl Read) -> io::Result<()> {
    let mut block = Aligned::new();
    while stream.read(&mut block.0)? > 0 {}
    Ok(())
}

/// Each byte comes back, one by one.
fn echo(mut stream: impl Read + Write) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// A block as O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

impl Aligned {
    fn new() -> Box<Self> {
        Box::new(Self([7; BLOCK]))
    }
}
