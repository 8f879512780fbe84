//! Networks with Linux in the guest: one boot with two devices, one of which leaves work to the
//! other side.

use std::io::{self, BufReader};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use tests::network::{alone, links, set_up};
use tests::podvmm::kvm_is_here;
use tests::transfer::{self, Checksum};
use tests::{Podvmm, guest};

/// Bytes each way. An emulated guest copies slowly.
const BYTES: u64 = 256 << 10;

/// A stream to a program of the guest's, once it listens.
fn call(address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().expect("an address");
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Sends a checked transfer and gets another one back.
fn exchange(address: &str, seed: u64) -> io::Result<()> {
    let mut stream = call(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(300)))?;
    transfer::send(&mut stream, seed, BYTES)?;
    stream.shutdown(Shutdown::Write)?;
    let mut stream = BufReader::new(stream);
    let sent = Checksum::of_sent(seed, BYTES);
    assert_eq!(Checksum::read(&mut stream)?, sent);
    let received = Checksum::of_all(&mut stream)?;
    assert_eq!(received, Checksum::of_sent(sent.seed(), BYTES));
    Ok(())
}

#[test]
fn frames_go_both_ways_with_and_without_offloads() {
    if !kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    alone(|| {
        let root = guest::root(&["sh", "ifconfig", "ping", "cat"]);
        let script = "ifconfig eth0 10.77.0.2 netmask 255.255.255.0 up &&
            ifconfig eth1 10.78.0.2 netmask 255.255.255.0 up &&
            cat /sys/class/net/eth0/address /sys/class/net/eth1/mtu /sys/class/net/eth0/carrier &&
            ping -c 1 -W 60 10.77.0.1 >/dev/null && ping -c 1 -W 60 10.78.0.1 >/dev/null &&
            echo pinged && guest_load tcp-serve 5000 2";
        let plain = "tap=plain0,mtu=1400,offload_csum=off,offload_tso=off,offload_ufo=off";
        let arguments = [
            "--rootfs",
            root.path().to_str().unwrap(),
            "--net",
            "tap=fast0,mac=02:00:00:00:00:07",
            "--net",
            plain,
            "--",
            "/bin/sh",
            "-c",
            script,
        ];
        let running = Podvmm::new(arguments).spawn();
        set_up("fast0", "10.77.0.1/24");
        set_up("plain0", "10.78.0.1/24");
        exchange("10.77.0.2:5000", 7).unwrap();
        exchange("10.78.0.2:5000", 9).unwrap();
        let outcome = running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let lines: Vec<_> = outcome.stdout.lines().collect();
        assert_eq!(
            lines,
            ["02:00:00:00:00:07", "1400", "1", "pinged"],
            "{outcome:?}"
        );
        assert!(!links().contains("fast0") && !links().contains("plain0"));
    });
}
