//! What the Linux tests run inside the guest: the other ends of their transfers. Linked statically.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
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
