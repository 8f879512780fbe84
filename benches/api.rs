//! What the API costs: from the start of the process to its socket, from a definition to a guest that
//! runs, answers while the guest is busy, resizes, and the end. With a guest of a few instructions, so
//! that it is podvmm's time.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::http::Client;
use benches::report::median;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::payload::Protocol;
use tests::{Payload, code};

const RUNS: usize = 40;
const MIB: u64 = 1 << 20;

// Touches 512 MiB of RAM from 16 MiB on, says so at the serial port, and is busy.
code!(
    touch_and_spin,
    ".code32",
    "mov edi, 0x1000000",
    "2: mov byte ptr [edi], 1",
    "add edi, 4096",
    "cmp edi, 0x21000000",
    "jb 2b",
    "mov dx, 0x3f8",
    "mov al, '!'",
    "out dx, al",
    "1: pause",
    "jmp 1b",
);

struct Service {
    folder: TempDir,
    child: Child,
    ready: Duration,
}

impl Service {
    fn start() -> Self {
        let folder = TempDir::new().expect("there is a temporary folder");
        let socket = folder.path().join("api");
        let started = Instant::now();
        let child = Command::new(tests::podvmm::binary())
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .expect("podvmm starts");
        while UnixStream::connect(&socket).is_err() {
            std::thread::sleep(Duration::from_micros(20));
        }
        Self {
            folder,
            child,
            ready: started.elapsed(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }
}

fn put(client: &mut Client, name: &str, body: Option<&Value>) -> Duration {
    let body = body.map(Value::to_string);
    let started = Instant::now();
    let path = format!("/api/v1/{name}");
    client
        .call("PUT", &path, body.as_deref(), &[])
        .expect("it is not refused");
    started.elapsed()
}

/// The first byte of the guest's, wherever it ran before.
fn first_byte(console: &std::path::Path) {
    while fs::metadata(console).map_or(0, |file| file.len()) == 0 {
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn main() {
    let kernel = Payload::new(touch_and_spin(), Protocol::Pvh);
    let mut times: [Vec<Duration>; 6] = Default::default();
    for _ in 0..RUNS {
        let mut service = Service::start();
        let mut client = Client::connect(&service.socket()).expect("it serves");
        let console = service.folder.path().join("console");
        let definition = json!({
            "payload": {"kernel": kernel.path()},
            "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
            "memory": {"size": 1024 * MIB, "hotplug_size": 1024 * MIB},
            "serial": {"mode": "File", "file": console},
        });
        let booted =
            put(&mut client, "vm.create", Some(&definition)) + put(&mut client, "vm.boot", None);
        first_byte(&console);
        let mut infos: Vec<_> = (0..20)
            .map(|_| {
                let started = Instant::now();
                client
                    .call("GET", "/api/v1/vm.info", None, &[])
                    .expect("it is not refused");
                started.elapsed()
            })
            .collect();
        infos.sort();
        let vcpu = put(&mut client, "vm.resize", Some(&json!({"desired_vcpus": 2})));
        let more = json!({"desired_ram": 1536 * MIB});
        let memory = put(&mut client, "vm.resize", Some(&more));
        let started = Instant::now();
        put(&mut client, "vmm.shutdown", None);
        service.child.wait().expect("it is a child of ours");
        let gone = started.elapsed();
        let values = [service.ready, booted, infos[10], vcpu, memory, gone];
        for (all, value) in times.iter_mut().zip(values) {
            all.push(value);
        }
    }
    let what = [
        ("start to the first connection to the API", "1.5 ms"),
        ("vm.create and vm.boot, to the answers", "5 ms"),
        ("vm.info while the guest is busy", "0.2 ms"),
        ("vm.resize of +1 vCPU", "5 ms"),
        ("vm.resize of +512 MiB", "5 ms"),
        ("vmm.shutdown to gone, 512 MiB touched", "20 ms"),
    ];
    println!("median of {RUNS}");
    for ((what, goal), times) in what.into_iter().zip(&times) {
        let median = median(times).as_secs_f64() * 1000.0;
        println!("{what:44} {median:8.3} ms   goal {goal}");
    }
}
