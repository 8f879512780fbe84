//! vsock with Linux in the guest: one boot for all of it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tests::podvmm::kvm_is_here;
use tests::transfer::{self, Checksum};
use tests::{Podvmm, guest};

/// Connections at once.
const CONNECTIONS: u32 = 20;
/// Bytes on each, each way. An emulated guest copies slowly.
const BYTES: u64 = 64 << 10;

/// A stream to `port` of the guest. Held until somebody listens there.
fn call(socket: &Path, port: u32) -> io::Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(300)))?;
    writeln!(stream, "connect {port}")?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    assert!(line.starts_with("OK "), "{line:?}");
    Ok(reader)
}

/// Sends a checked transfer and gets another one back.
fn exchange(mut stream: BufReader<UnixStream>, seed: u64) -> io::Result<()> {
    let sent = Checksum::of_sent(seed, BYTES);
    transfer::send(stream.get_mut(), seed, BYTES)?;
    stream.get_ref().shutdown(Shutdown::Write)?;
    assert_eq!(Checksum::read(&mut stream)?, sent);
    let received = Checksum::of_all(&mut stream)?;
    assert_eq!(received, Checksum::of_sent(sent.seed(), BYTES));
    Ok(())
}

#[test]
fn streams_are_carried_both_ways() {
    if !kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let root = guest::root(&["sh"]);
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("vsock");
    let listener = UnixListener::bind(folder.path().join("vsock_77")).unwrap();
    let vsock = format!("cid=3,socket={}", socket.display());
    let script = format!("guest_load vsock-serve 5000 {CONNECTIONS} && guest_load vsock-call 77");
    let options = ["--rootfs", root.path().to_str().unwrap(), "--vsock", &vsock];
    let running = Podvmm::new(options.iter().chain(&["--", "/bin/sh", "-c", &script])).spawn();
    while !socket.exists() {
        thread::sleep(Duration::from_millis(1));
    }
    // All of them are there before the guest is.
    let exchanges: Vec<_> = (1..=u64::from(CONNECTIONS))
        .map(|seed| {
            let socket = socket.clone();
            thread::spawn(move || exchange(call(&socket, 5000)?, seed))
        })
        .collect();
    for exchange in exchanges {
        exchange.join().unwrap().unwrap();
    }
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = String::new();
    stream.read_to_string(&mut hello).unwrap();
    assert_eq!(hello, "hello from the guest");
    stream.write_all(b"hello from the host").unwrap();
    drop(stream);
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stdout, "hello from the host\n", "{outcome:?}");
    assert!(!socket.exists(), "the socket is left behind");
}
