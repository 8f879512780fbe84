//! A podvmm with a puppet in it, and what must not change while that does its worst: what podvmm holds
//! of the host, RAM and files that no request names, and whether its API answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::json;
use tempfile::TempDir;
use tests::payload::Protocol;
use tests::podvmm::Running;
use tests::service::{get, put};
use tests::{Outcome as Ended, Payload, Podvmm};

use crate::guest;
use crate::pci;
use crate::puppet::{Op, Puppet, Step};

/// As long as anything may take that is not a fault, on a busy host.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// RAM that the guest has, in bytes.
pub(crate) const RAM_BYTES: u64 = 64 << 20;
/// A part of it that no request names.
const CANARY: u64 = 0x300_0000;
const CANARY_BYTES: usize = 4 << 20;
/// What podvmm's own memory may grow by, guest RAM aside. Queues keep the room of their longest request.
const MOST_GROWTH: u64 = 4 << 20;
/// What all of a suite's guests may have podvmm log, in bytes.
const MOST_LOGGED: usize = 16 << 10;

/// What podvmm has of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
}

/// By what the guest reaches its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Mmio,
    Pci,
}

impl Transport {
    pub(crate) const ALL: [Self; 2] = [Self::Mmio, Self::Pci];

    /// How long a device's window is, or the memory behind its BAR.
    pub(crate) fn window_bytes(self) -> u64 {
        match self {
            Self::Mmio => 0x1000,
            Self::Pci => 0x8000,
        }
    }
}

/// A podvmm whose guest is a puppet.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) folder: TempDir,
    pub(crate) puppet: Puppet,
    pub(crate) transport: Transport,
    /// None once it is waited for.
    running: Option<Running>,
    _payload: Payload,
    held: Held,
    own_bytes: u64,
    canaries: Vec<(PathBuf, Vec<u8>)>,
}

impl Rig {
    /// Boots a puppet with the devices that `options` asks for, given the folder for what they need.
    pub(crate) fn boot(options: impl FnOnce(&Path) -> Vec<String>) -> Self {
        Self::boot_on(Transport::Mmio, options)
    }

    /// Likewise, with the devices on a bus of choice.
    pub(crate) fn boot_on(
        transport: Transport,
        options: impl FnOnce(&Path) -> Vec<String>,
    ) -> Self {
        // In memory: a guest that has files made stable does not wait for the host's disk.
        let folder = TempDir::new_in("/dev/shm").expect("there is a folder for temporary files");
        let mut arguments = options(folder.path());
        let given = arguments.clone();
        let has = |option: &str| given.iter().any(|argument| argument == option);
        if !has("--memory") {
            arguments.extend(["--memory".into(), "size=64M".into()]);
        }
        if !has("--serial") {
            let serial = format!("file={}", plain(&folder.path().join("serial")));
            arguments.extend(["--serial".into(), serial]);
        }
        if transport == Transport::Pci {
            arguments.extend(["--transport".into(), "pci".into()]);
        }
        let api = plain(&folder.path().join("api")).to_owned();
        arguments.extend(["--api-socket".into(), api, "--cpus".into(), "boot=2".into()]);
        let payload = Payload::new(guest::image(), Protocol::Linux64);
        let running = Podvmm::new(
            payload
                .arguments()
                .into_iter()
                .map(str::to_owned)
                .chain(arguments),
        )
        .spawn();
        let Some(puppet) = Puppet::attach(running.pid()) else {
            panic!("{:?}", running.wait());
        };
        puppet.ram.write(CANARY, &canary());
        let mut rig = Self {
            folder,
            puppet,
            transport,
            running: Some(running),
            _payload: payload,
            held: Held {
                descriptors: 0,
                threads: 0,
            },
            own_bytes: 0,
            canaries: Vec::new(),
        };
        rig.take_stock();
        rig
    }

    /// Looks at what podvmm holds, which is to be the same later. A client is connected, then and later.
    pub(crate) fn take_stock(&mut self) {
        let _client = self.client();
        self.held = self.held();
        self.own_bytes = self.own_bytes();
    }

    /// Remembers what a file holds, which is not to change.
    pub(crate) fn keeps(mut self, path: &Path) -> Self {
        let content = fs::read(path).expect("it is a file of the test's");
        self.canaries.push((path.into(), content));
        self
    }

    pub(crate) fn client(&self) -> Client {
        let client = Client::connect(&self.folder.path().join("api"));
        let mut client = client.expect("podvmm serves");
        assert!(get(&mut client, "vmm.ping")["pid"].is_u64());
        client
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().expect("it runs").pid()
    }

    /// The window of the first virtio device of this kind, or its BAR.
    pub(crate) fn window(&self, id: u32) -> u64 {
        if self.transport == Transport::Pci {
            let device = pci::find(&self.puppet, id);
            return pci::switch_on(&self.puppet, device);
        }
        let windows = (0..16).map(|index| 0xc000_0000 + index * 0x1000);
        let found = windows.into_iter().find(|window| {
            let ids = self
                .puppet
                .run(&[Step::read(*window, 4), Step::read(window + 8, 4)]);
            (ids[0].value, ids[1].value) == (0x7472_6976, id.into())
        });
        found.unwrap_or_else(|| panic!("there is no device {id}"))
    }

    fn proc(&self, folder: &str) -> usize {
        let path = format!("/proc/{}/{folder}", self.pid());
        fs::read_dir(path).expect("podvmm runs").count()
    }

    pub(crate) fn descriptors(&self) -> usize {
        self.proc("fd")
    }

    fn held(&self) -> Held {
        Held {
            descriptors: self.proc("fd"),
            threads: self.proc("task"),
        }
    }

    /// Memory that the host has given podvmm, without the guest's RAM.
    fn own_bytes(&self) -> u64 {
        self.bytes("Rss:")
    }

    /// The part of it that no file backs, which the pod is charged for whatever the node's page cache has.
    pub(crate) fn private_bytes(&self) -> u64 {
        self.bytes("Anonymous:")
    }

    /// The sum of one of smaps' fields (proc_pid_smaps(5)), without the guest's RAM.
    fn bytes(&self, field: &str) -> u64 {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.pid()));
        let maps = maps.expect("podvmm runs");
        let ram = self.puppet.ram.base()..self.puppet.ram.base() + RAM_BYTES;
        let (mut kib, mut counts) = (0, true);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((start, _)) = first.split_once('-') {
                let start = u64::from_str_radix(start, 16).expect("a mapping has a start");
                counts = !ram.contains(&start) && !line.contains("podvmm-sink");
            } else if first == field && counts {
                let size = words.next().and_then(|size| size.parse::<u64>().ok());
                kib += size.expect("a size is a number");
            }
        }
        kib << 10
    }

    /// Asserts that podvmm answers, and that what it holds comes back to what it was.
    pub(crate) fn is_well(&self, after: &str) {
        let _client = self.client();
        let start = Instant::now();
        while self.held() != self.held {
            let held = self.held();
            let before = self.held;
            assert!(
                start.elapsed() < PATIENCE,
                "{after}: {before:?}, now {held:?}"
            );
            thread::sleep(Duration::from_millis(2));
        }
        let (before, now) = (self.own_bytes, self.own_bytes());
        assert!(
            now < before + MOST_GROWTH,
            "{after}: from {before} to {now} bytes"
        );
        let ram = self.puppet.ram.bytes(CANARY, CANARY_BYTES);
        assert!(
            ram == canary(),
            "{after}: RAM that no request names has changed"
        );
        for (path, content) in &self.canaries {
            let now = fs::read(path).expect("it is still there");
            assert!(now == *content, "{after}: {} has changed", path.display());
        }
    }

    /// Has another podvmm go on with a snapshot of the guest.
    pub(crate) fn restored(self) -> Self {
        let mut client = self.client();
        let snapshot = self.folder.path().join("snapshot");
        let to = json!({"destination_url": format!("file://{}", plain(&snapshot))});
        put(&mut client, "vm.pause", None).expect("it is paused");
        put(&mut client, "vm.snapshot", Some(to)).expect("it is saved");
        let api = plain(&self.folder.path().join("api-of-restored")).to_owned();
        let arguments = ["--restore", plain(&snapshot), "--api-socket", &api];
        let running = Podvmm::new(arguments).spawn();
        let Some(puppet) = Puppet::attach(running.pid()) else {
            panic!("{:?}", running.wait());
        };
        let mut rig = self;
        rig.puppet = puppet;
        // Dropping the first one ends it.
        rig.running = Some(running);
        fs::rename(&api, rig.folder.path().join("api"))
            .expect("the first one's is not used any more");
        rig
    }

    /// Takes stock, ends the guest in an orderly way, and sees podvmm end likewise.
    pub(crate) fn finish(self) {
        self.is_well("at the end");
        self.puppet
            .begin(0, &[Step::output(0x64, 1, 0xfe), Step::new(Op::End, 0)]);
        let ended = self.ended();
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }

    /// Whether the first CPU ends its script before podvmm ends.
    pub(crate) fn is_done_soon(&self) -> bool {
        loop {
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
            if has_ended(&status.unwrap_or_default()) {
                return false;
            }
            if self.puppet.is_done(0) {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for podvmm's end, which must be one of a VM and not of a fault.
    pub(crate) fn ended(mut self) -> Ended {
        let running = self.running.take();
        let ended = running.expect("it is waited for once").wait();
        for fault in ["panicked", "made the system call"] {
            assert!(!ended.stderr.contains(fault), "{ended:?}");
        }
        assert!(ended.stderr.len() < MOST_LOGGED, "{ended:?}");
        for (path, content) in &self.canaries {
            let now = fs::read(path).expect("it is still there");
            assert!(now == *content, "{} has changed", path.display());
        }
        ended
    }
}

/// A test that fails because podvmm has ended says how.
impl Drop for Rig {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        let status = fs::read_to_string(format!("/proc/{}/status", running.pid()));
        if thread::panicking() && has_ended(&status.unwrap_or_default()) {
            eprintln!("podvmm has ended: {:?}", running.wait());
        }
    }
}

/// Whether a process of this status (proc_pid_status(5)) has only to be waited for.
pub(crate) fn has_ended(status: &str) -> bool {
    status.contains("State:\tZ")
}

fn canary() -> Vec<u8> {
    (0..=250).cycle().take(CANARY_BYTES).collect()
}

/// A path of the tests' own, which is plain.
pub(crate) fn plain(path: &Path) -> &str {
    path.to_str().expect("temporary files have plain names")
}
