//! A snapshot taken during work: files are being written, frames and vsock packets are under way. Guests
//! restored from it continue that work, and none of their programs waits for an answer that does not come.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_load::transfer::{RECORD_LEN, record};
use protocol::agent::messages::{ReadStreamRequest, ReadStreamResponse};
use protocol::agent::oci::Mount;
use protocol::ttrpc::CallError;
use serde_json::json;
use tempfile::TempDir;
use tests::network::{set_up, tap};
use tests::pod::{Agent, spec, strings};
use tests::template::{Template, Vm};

use super::vm::{self, Pod};

/// Where the guest's program calls the host.
const HOST: &str = "10.79.0.1:7000";
const VSOCK_PORT: u32 = 5000;
const MAC: &str = "02:00:00:00:02:01";
/// What is to happen happens well within it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn check(template: &Template) {
    let since = Instant::now();
    let host = Host::start();
    let share = vm::share();
    let places = TempDir::new().unwrap();
    let snapshot = places.path().join("busy");
    let net = json!({"mac": MAC});
    let taps = [host.tap.as_fd()];

    let mut first = template.restore_with(share.path(), &net, &taps);
    let call = take_call(&first);
    let agent = first.agent();
    start(&agent);
    assert_eq!(call.recv_timeout(PATIENCE), Ok("came"));
    // As with a shim, a thread waits for output all the time.
    let reads = thread::spawn(move || read(&agent));
    let records = share.path().join("one/rootfs/records");
    until("work is under way", || {
        (written(&records) > 5 && host.echoed() > 5).then_some(())
    });
    first.pause();
    first.snapshot(&snapshot);
    first.end();
    assert_eq!(call.recv_timeout(PATIENCE), Ok("ended"));
    let lost = reads.join().unwrap();
    assert!(matches!(lost, Err(CallError::Gone(_))), "{lost:?}");
    let (wrote, echoed) = (whole(&records), host.echoed());
    eprintln!("{wrote} records and {echoed} echoes at the snapshot");

    let second = Vm::restore_with(&snapshot, share.path(), &net, &taps);
    let call = take_call(&second);
    let agent = second.agent();
    vm::check(&agent);
    let said = read(&agent).unwrap();
    let reset = "vsock: read Err(ConnectionReset), write ";
    assert!(said.starts_with(reset), "{said}");
    assert_eq!(call.recv_timeout(PATIENCE), Ok("came"));
    until("work goes on", || {
        (written(&records) > wrote + 5 && host.echoed() > echoed + 5).then_some(())
    });
    is_well(&agent);
    agent.signal("busy", "", 9);
    agent.remove("busy");
    drop(agent);
    second.end();
    let count = whole(&records);
    eprintln!("{count} records and {} echoes at the end", host.echoed());

    // All is there but the file that is written.
    let other = vm::share();
    let third = Vm::restore_with(&snapshot, other.path(), &net, &taps);
    let _call = take_call(&third);
    let agent = third.agent();
    let mut said = String::new();
    while !said.contains("records: ") {
        said.push_str(&read(&agent).unwrap());
    }
    eprintln!("without the file: {said:?}");
    assert!(
        said.contains("records: Err(StaleNetworkFileHandle)\n"),
        "{said}"
    );
    is_well(&agent);
    drop(agent);
    third.end();
    eprintln!("clones of a busy guest took {:?}", since.elapsed());
}

/// Starts the work in a container that can see the guest's processes.
fn start(agent: &Agent) {
    let pod = Pod {
        hostname: "busy".into(),
        mac: MAC.into(),
        address: "10.79.0.2".into(),
    };
    pod.settle(agent);
    let mut busy = spec("");
    let process = busy.process.as_mut().unwrap();
    process.args = strings(&["guest_load", "busy", HOST, &VSOCK_PORT.to_string()]);
    busy.mounts.push(Mount {
        destination: "/mnt".into(),
        source: "/proc".into(),
        r#type: "bind".into(),
        options: strings(&["rbind", "ro"]),
    });
    agent.create("busy", busy).unwrap();
    agent.start("busy").unwrap();
}

/// What the work has to say next, up to the end of a line.
fn read(agent: &Agent) -> Result<String, CallError> {
    let mut said = String::new();
    while !said.ends_with('\n') {
        let request = ReadStreamRequest {
            container_id: "busy".into(),
            exec_id: "busy".into(),
            len: 4096,
        };
        let answer: ReadStreamResponse = agent.ask("ReadStdout", &request)?;
        assert!(!answer.data.is_empty(), "it ended after {said:?}");
        said.push_str(&String::from_utf8(answer.data).unwrap());
    }
    Ok(said)
}

/// No task of the guest's waits for ever, and there can be new ones.
fn is_well(agent: &Agent) {
    vm::check(agent);
    let (stuck, status) = agent.exec_shell("busy", "guest_load stuck /mnt");
    assert_eq!((stuck.as_str(), status), ("", 0));
}

/// How many records there are by a file's length. The last may be in the making.
fn written(records: &Path) -> u64 {
    fs::metadata(records).map_or(0, |metadata| metadata.len() / RECORD_LEN as u64)
}

/// How many records there are, once no guest writes any more. Each is whole.
fn whole(records: &Path) -> u64 {
    let bytes = fs::read(records).unwrap();
    let mut count = 0;
    for piece in bytes.chunks(RECORD_LEN) {
        assert!(
            piece == record(count),
            "record {count} of {} bytes",
            bytes.len()
        );
        count += 1;
    }
    count
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// What the host has for all of these VMs: a tap that outlives them, and who answers on it.
struct Host {
    tap: File,
    echoed: Arc<AtomicU64>,
}

impl Host {
    fn start() -> Self {
        let tap = tap("busy");
        set_up("busy", "10.79.0.1/24");
        let listener = TcpListener::bind(HOST).unwrap();
        let echoed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&echoed);
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut word = [0; 8];
            while stream.read_exact(&mut word).is_ok() && stream.write_all(&word).is_ok() {
                count.store(u64::from_le_bytes(word), Ordering::Relaxed);
            }
        });
        Self { tap, echoed }
    }

    /// The last number that came.
    fn echoed(&self) -> u64 {
        self.echoed.load(Ordering::Relaxed)
    }
}

/// Takes one call of the guest's: tells when something comes, and when it has ended.
fn take_call(vm: &Vm) -> Receiver<&'static str> {
    let mut path = vm.vsock().into_os_string();
    path.push(format!("_{VSOCK_PORT}"));
    let listener = UnixListener::bind(path).unwrap();
    let (tell, told) = channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_ok() {
            let _ = tell.send("came");
        }
        // An error is an end, too.
        let _ = io::copy(&mut stream, &mut io::sink());
        let _ = tell.send("ended");
    });
    told
}
