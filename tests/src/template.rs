//! A pod's guest that tests restore instead of booting: its agent has answered, and nothing of a
//! pod is in it.
//!
//! It is made by the first test that wants it and kept, beside the shims' own templates, for as long
//! as it would be made of the same. A test needs the host's turn for it, so one at a time makes it.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::guest::{self, Turn};
use crate::network::alone;
use crate::pod::Agent;
use crate::service::{Service, get, put};
use crate::{containerd, podvmm};

/// What the disk of all these guests begins with.
pub const ON_DISK: &str = "on disk\n";
const DISK_LEN: u64 = 1 << 20;
const MAX_VCPUS: u8 = 2;
/// What our folders among the templates begin with.
const PREFIX: &str = "tests-";
/// What one was made of. It is not there before the rest is.
const MADE_OF: &str = "made-of";
const AGE: &str = "age";

/// A guest whose agent waits for a pod, as a snapshot.
#[derive(Debug)]
pub struct Template {
    folder: PathBuf,
    /// Of one that is not kept.
    _place: Option<TempDir>,
    /// How long the guest had run: at least since its agent answered, at most since it was started.
    pub age: [Duration; 2],
}

impl Template {
    /// The kept one, made if there is none. None where pods are to boot: `PODVMM_TEST_TEMPLATES` is
    /// empty.
    pub fn kept(_turn: &Turn) -> Option<Self> {
        if !containerd::has_templates() {
            return None;
        }
        let templates = containerd::templates();
        let made_of = made_of();
        let mut hasher = DefaultHasher::new();
        made_of.hash(&mut hasher);
        let folder = templates.join(format!("{PREFIX}{:016x}", hasher.finish()));
        if fs::read_to_string(folder.join(MADE_OF)).is_ok_and(|text| text == made_of) {
            let age = read_age(&folder);
            return Some(Self {
                folder,
                _place: None,
                age,
            });
        }
        fs::create_dir_all(&templates).expect("the folder for templates is writable");
        for entry in fs::read_dir(&templates).expect("it is there") {
            let path = entry.expect("it is there").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(PREFIX) {
                // Made of something else, or not to its end.
                fs::remove_dir_all(&path).expect("it is ours");
            }
        }
        fs::create_dir(&folder).expect("the folder for templates is writable");
        let age = make(&folder);
        let text = age.map(|age| age.as_millis().to_string()).join(" ");
        fs::write(folder.join(AGE), text).expect("it is writable");
        fs::write(folder.join(MADE_OF), made_of).expect("it is writable");
        Some(Self {
            folder,
            _place: None,
            age,
        })
    }

    /// One for this test alone.
    pub fn own(_turn: &Turn) -> Self {
        let place = TempDir::new().expect("there is a folder for temporary files");
        Self {
            age: make(place.path()),
            folder: place.path().into(),
            _place: Some(place),
        }
    }

    /// A VM restored from it.
    pub fn restore(&self, share: &Path, net: &Value) -> Vm {
        self.restore_with(share, net, &[])
    }

    /// With descriptors of taps.
    pub fn restore_with(&self, share: &Path, net: &Value, taps: &[BorrowedFd<'_>]) -> Vm {
        Vm::restore_with(&self.folder, share, net, taps)
    }
}

/// All that the guest and its snapshot depend on.
fn made_of() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("/proc is mounted");
    let guest = guest::folder();
    let files = [
        podvmm::binary().into(),
        guest.join("vmlinux"),
        guest.join("initramfs.cpio"),
    ];
    let mut text = format!("host {host}vm {}\n", definition());
    for file in files {
        let metadata = fs::metadata(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        text.push_str(&format!(
            "{file:?}: inode {}, {} bytes, {}.{:09}\n",
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        ));
    }
    text
}

fn read_age(folder: &Path) -> [Duration; 2] {
    let text = fs::read_to_string(folder.join(AGE)).expect("it was written before");
    let (answered, started) = text.split_once(' ').expect("two numbers");
    [answered, started].map(|ms| Duration::from_millis(ms.parse().expect("a number")))
}

/// Boots a guest in a network of its own and writes it down. Gives its age.
fn make(folder: &Path) -> [Duration; 2] {
    let (tell, told) = std::sync::mpsc::channel();
    let folder = folder.to_path_buf();
    alone(move || {
        let share = TempDir::new().expect("there is a folder for temporary files");
        let net = json!({"tap": "template", "mac": "02:00:00:00:00:01"});
        let mut vm = Vm::boot(&folder, share.path(), &net);
        let started = vm.resumed;
        // It stays connected: a template's connections are not its clones'.
        let agent = vm.agent();
        let answered = Instant::now();
        agent.check();
        vm.pause();
        let age = [answered.elapsed(), started.elapsed()];
        vm.snapshot(&folder);
        drop(agent);
        vm.end();
        eprintln!("the agent answered {:?} after vm.boot", answered - started);
        tell.send(age).expect("it is waited for");
    });
    told.recv().expect("it was made")
}

/// A VM of a pod's guest, with its podvmm.
#[derive(Debug)]
pub struct Vm {
    pub service: Service,
    client: Client,
    /// When it began to run.
    pub resumed: Instant,
}

impl Vm {
    /// From the kept template, if there is to be one.
    pub fn start(template: Option<&Template>, folder: &Path, share: &Path, net: &Value) -> Self {
        match template {
            Some(template) => template.restore(share, net),
            None => Self::boot(folder, share, net),
        }
    }

    /// Boots one, with its disk in `folder`.
    fn boot(folder: &Path, share: &Path, net: &Value) -> Self {
        let disk = folder.join("disk");
        fs::write(&disk, ON_DISK).expect("the folder is writable");
        let file = fs::File::options().write(true).open(&disk);
        let grown = file.and_then(|file| file.set_len(DISK_LEN));
        grown.expect("there is room in it");
        let service = Service::start(&[]);
        let mut client = service.client();
        let mut config = definition();
        config["disks"] = json!([{"path": disk, "readonly": true}]);
        for (part, value) in own_parts(&service, share, net)
            .as_object()
            .into_iter()
            .flatten()
        {
            config[part] = value.clone();
        }
        put(&mut client, "vm.create", Some(config)).expect("it is not refused");
        let resumed = Instant::now();
        put(&mut client, "vm.boot", None).expect("it is not refused");
        Self {
            service,
            client,
            resumed,
        }
    }

    /// Restores a snapshot.
    pub fn restore_with(
        snapshot: &Path,
        share: &Path,
        net: &Value,
        taps: &[BorrowedFd<'_>],
    ) -> Self {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = json!({
            "source_url": url(snapshot),
            "config": own_parts(&service, share, net),
            "resume": true,
        });
        let resumed = Instant::now();
        let body = body.to_string();
        client
            .call("PUT", "/api/v1/vm.restore", Some(&body), taps)
            .expect("it is not refused");
        Self {
            service,
            client,
            resumed,
        }
    }

    pub fn vsock(&self) -> PathBuf {
        self.service.folder.path().join("vsock")
    }

    pub fn agent(&self) -> Agent {
        Agent::reach(&self.vsock())
    }

    pub fn pause(&mut self) {
        put(&mut self.client, "vm.pause", None).expect("it is not refused");
    }

    pub fn snapshot(&mut self, folder: &Path) {
        let body = json!({"destination_url": url(folder)});
        put(&mut self.client, "vm.snapshot", Some(body)).expect("it is not refused");
    }

    /// Gives it as many vCPUs as it may have, which its agent is to turn on.
    pub fn grow(&mut self) {
        let body = json!({"desired_vcpus": MAX_VCPUS});
        put(&mut self.client, "vm.resize", Some(body)).expect("it is not refused");
    }

    /// Adds a disk. Returns its name, and the number of its device on the guest's PCI bus as agents are told it.
    pub fn add_disk(&mut self, disk: &Path) -> (String, String) {
        let body = json!({ "path": disk });
        let answer = put(&mut self.client, "vm.add-disk", Some(body)).expect("it is not refused");
        let answer: Value = serde_json::from_slice(&answer).expect("answers are JSON");
        let word = |name: &str| answer[name].as_str().expect("it is a word").to_owned();
        let place = word("bdf");
        let device = place.strip_prefix("0000:00:");
        let device = device.and_then(|device| device.strip_suffix(".0"));
        (word("id"), device.expect("it is on bus 0").into())
    }

    /// Takes a device away that the guest has let go of.
    pub fn remove_device(&mut self, id: &str) {
        let body = json!({ "id": id });
        put(&mut self.client, "vm.remove-device", Some(body)).expect("it is not refused");
        let leaving = &get(&mut self.client, "vm.info")["leaving"];
        assert_eq!(*leaving, Value::Null, "the guest has not let go of it");
    }

    /// Ends it, and sees that it leaves nothing in its folder.
    pub fn end(mut self) {
        put(&mut self.client, "vmm.shutdown", None).expect("it is not refused");
        self.ended();
    }

    /// Waits for its end, and sees that it leaves nothing in its folder.
    pub fn ended(self) {
        let outcome = self.service.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let left = fs::read_dir(self.service.folder.path()).expect("it is ours");
        let left = left.map(|entry| entry.expect("it is ours").file_name());
        let left: Vec<_> = left
            .filter(|name| !name.to_string_lossy().contains('_'))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// What all VMs have in common.
fn definition() -> Value {
    json!({
        "payload": {
            "kernel": guest::folder().join("vmlinux"),
            "initramfs": guest::folder().join("initramfs.cpio"),
            // As Kata's shim has it: without the disk that it names.
            "cmdline": "podvmm.pod root=/dev/vda1",
        },
        "cpus": {"boot_vcpus": 1, "max_vcpus": MAX_VCPUS},
        "memory": {"size": 512 << 20},
        "balloon": {"size": 0},
        "serial": {"mode": "Null"},
        "console": {"mode": "Off"},
        "transport": guest::transport(),
    })
}

/// What differs from one VM to the next.
fn own_parts(service: &Service, share: &Path, net: &Value) -> Value {
    json!({
        "vsock": {"cid": 3, "socket": service.folder.path().join("vsock")},
        "fs": [{"tag": "kataShared", "shared_dir": share}],
        "net": [net],
    })
}
