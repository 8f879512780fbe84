//! Stands in for podvmm where the shim is tested against a guest that lies. There is no VM: requests to the
//! API do nothing, and behind the vsock's socket is an agent ([`agent`]) that answers as it should but for the
//! lies ([`lies`]) that the environment variable `LIES` has.

mod agent;
mod lies;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lies::Lies;

fn main() -> io::Result<()> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let api = match &arguments[..] {
        [_, flag, path] if flag == "--api-socket" => PathBuf::from(path),
        _ => return Err(io::Error::other("usage: lying_podvmm --api-socket PATH")),
    };
    let lies = Arc::new(Lies::parse(&std::env::var("LIES").unwrap_or_default()));
    // Before the API's, as the guest comes up after a request.
    let vsock = UnixListener::bind(api.with_file_name("vsock"))?;
    let requests = UnixListener::bind(api)?;
    {
        let lies = Arc::clone(&lies);
        thread::spawn(move || print(&lies));
    }
    thread::spawn(move || serve(&requests, |stream| requests_of(&stream)));
    serve(&vsock, move |stream| agent::serve(&stream, &lies));
    Ok(())
}

/// Does `each` for all who connect, on threads of their own.
fn serve(
    listener: &UnixListener,
    each: impl Fn(UnixStream) -> io::Result<()> + Clone + Send + 'static,
) {
    for stream in listener.incoming().flatten() {
        let each = each.clone();
        // Its end is that of the connection.
        thread::spawn(move || each(stream));
    }
}

/// Answers all requests of a connection with success. Descriptors that come along are dropped.
fn requests_of(stream: &UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut body = 0;
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 && line != "\r\n" {
            if let Some(length) = line.strip_prefix("Content-Length: ") {
                body = length.trim().parse().map_err(io::Error::other)?;
            }
            line.clear();
        }
        if line.is_empty() {
            return Ok(());
        }
        reader.read_exact(&mut vec![0; body])?;
        (&*stream).write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
    }
}

/// The guest's console, which says what it likes.
fn print(lies: &Lies) {
    match lies.next("console") {
        Some("lines") => loop {
            let said = "../\u{1b}[2J\0\"\\ ".repeat(40) + "\n";
            let _ = io::stdout().write_all(said.as_bytes());
        },
        Some("line") => loop {
            let _ = io::stdout().write_all(&[1; 64 << 10]);
        },
        Some("heir") => {
            // It holds the console open after the end of this process.
            let child = std::process::Command::new("sleep").arg("40").spawn();
            drop(child);
        }
        _ => thread::sleep(Duration::from_millis(1)),
    }
}
