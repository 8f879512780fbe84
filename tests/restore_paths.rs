//! The ways of RAM into a restored VM besides mapping its files as it touches them: a working set that
//! was recorded, and another process that gives it page by page.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::Podvmm;
use tests::counter::{Counter, memory_files, names, restore_body, url};
use tests::podvmm::{Running, kvm_is_here};
use tests::service::{Service, get, put, refusal};

const MIB: u64 = 1 << 20;

/// A folder with the snapshot of a guest that has counted to 'A'.
fn snapshot() -> TempDir {
    let folder = TempDir::new().expect("there is a folder for temporary files");
    let mut original = Counter::boot();
    assert_eq!(original.count(), 'A');
    original.snapshot(folder.path(), false);
    original.end();
    folder
}

fn working_sets(folder: &Path) -> Vec<PathBuf> {
    let mut names = names(folder);
    names.retain(|name| name.contains("working-set"));
    names.iter().map(|name| folder.join(name)).collect()
}

/// Bytes that a VM has before it runs.
fn resident_when_restored(folder: &Path, more: &[(&str, Value)]) -> u64 {
    let service = Service::start(&[]);
    let mut body = restore_body(&service, folder, more);
    body["resume"] = false.into();
    put(&mut service.client(), "vm.restore", Some(body)).expect("podvmm and its files are there");
    let resident = service.resident();
    service.dismiss();
    resident
}

#[test]
fn what_a_vm_touched_is_there_before_the_next_one_runs() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let prefetch = [("prefetch", true.into())];
    let mut clone = Counter::restore(folder.path(), &prefetch);
    assert_eq!((clone.count(), clone.read_all()), ('B', 'r'));
    let without = resident_when_restored(folder.path(), &prefetch);
    put(&mut clone.client, "vm.record-working-set", None).unwrap();
    let recorded = working_sets(folder.path());
    assert_eq!(recorded.len(), 1);
    let with = resident_when_restored(folder.path(), &prefetch);
    assert!(with > without + 7 * MIB, "{with} {without}");
    // Only if it is asked for.
    let unasked = resident_when_restored(folder.path(), &[]);
    assert!(unasked < without + MIB, "{unasked} {without}");
    let mut next = Counter::restore(folder.path(), &prefetch);
    assert_eq!((next.count(), next.read_all()), ('B', 'r'));

    // Paused, it may be asked for, too, and it does no harm where it is broken.
    put(&mut clone.client, "vm.pause", None).unwrap();
    put(&mut clone.client, "vm.record-working-set", None).unwrap();
    put(&mut clone.client, "vm.resume", None).unwrap();
    assert_eq!(working_sets(folder.path()), recorded);
    let file = fs::OpenOptions::new().write(true).open(&recorded[0]);
    file.unwrap().write_all_at(b"9", 100).unwrap();
    let broken = resident_when_restored(folder.path(), &prefetch);
    assert!(broken < without + MIB, "{broken} {without}");
    let mut other = Counter::restore(folder.path(), &prefetch);
    assert_eq!(other.count(), 'B');
    put(&mut other.client, "vmm.shutdown", None).unwrap();
    let outcome = other.service.running.wait();
    let complaints = outcome.stderr.matches("is not used: ").count();
    assert_eq!(complaints, 1, "{outcome:?}");
    [clone, next].into_iter().for_each(Counter::end);
}

#[test]
fn a_working_set_goes_with_its_snapshot() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let mut clone = Counter::restore(folder.path(), &[]);
    let mut late = Counter::restore(folder.path(), &[]);
    put(&mut clone.client, "vm.record-working-set", None).unwrap();
    let first = working_sets(folder.path());
    // A snapshot elsewhere is none of its business.
    let other = TempDir::new().unwrap();
    clone.snapshot(other.path(), true);
    assert_eq!(working_sets(folder.path()), first);
    put(&mut clone.client, "vm.record-working-set", None).unwrap();
    assert_eq!(working_sets(folder.path()), first);
    assert_eq!(working_sets(other.path()).len(), 1);
    // One in its place takes it away, and what an unlucky podvmm left of one.
    let draft = folder.path().join(".working-set-1");
    fs::write(&draft, "").unwrap();
    clone.snapshot(folder.path(), true);
    assert_eq!(working_sets(folder.path()), Vec::<PathBuf>::new());
    let answer = put(&mut late.client, "vm.record-working-set", None);
    let why = format!(
        "the snapshot in {} is another one by now",
        folder.path().display()
    );
    assert_eq!(refusal(answer), (400, why));
    [clone, late].into_iter().for_each(Counter::end);
}

#[test]
fn only_of_what_is_mapped_from_a_snapshot_is_a_working_set_known() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot_with(&json!({"shared": true}));
    let record =
        |guest: &mut Counter| refusal(put(&mut guest.client, "vm.record-working-set", None));
    let (status, why) = record(&mut original);
    assert_eq!(status, 400);
    assert!(why.starts_with("the VM is of no snapshot"), "{why}");
    original.snapshot(folder.path(), true);
    let (status, why) = record(&mut original);
    assert_eq!(status, 400);
    assert!(why.starts_with("the VM's RAM is a copy"), "{why}");
    put(&mut original.client, "vm.shutdown", None).unwrap();
    let (status, why) = record(&mut original);
    assert_eq!(status, 409);
    assert!(why.ends_with("it must be Running or Paused"), "{why}");
    original.service.dismiss();
}

/// A process that gives the RAM of a snapshot.
struct Handler {
    folder: TempDir,
    running: Running,
}

impl Handler {
    fn start(snapshot: &Path) -> Self {
        Self::start_with(snapshot, &[])
    }

    fn start_with(snapshot: &Path, options: &[&str]) -> Self {
        let folder = TempDir::new().expect("there is a folder for temporary files");
        let socket = folder.path().join("pages");
        let arguments = ["pages", "-v", "--socket"].map(PathBuf::from);
        let more = [socket.clone(), "--snapshot".into(), snapshot.into()];
        let options: Vec<_> = options.iter().map(PathBuf::from).collect();
        let running = Podvmm::new(arguments.iter().chain(&more).chain(&options)).spawn();
        while !socket.exists() {
            thread::sleep(Duration::from_millis(1));
        }
        Self { folder, running }
    }

    fn socket(&self) -> (&'static str, Value) {
        socket(&self.folder.path().join("pages"))
    }

    fn restore(&self, folder: &Path) -> Counter {
        Counter::restore(folder, &[self.socket()])
    }

    /// Ends it as its user would. What it said.
    fn end(self) -> String {
        self.running.signal(libc::SIGTERM);
        let outcome = self.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(!self.folder.path().join("pages").exists());
        outcome.stderr
    }
}

fn socket(path: &Path) -> (&'static str, Value) {
    ("memory_socket", json!(path))
}

/// What VMs need of a snapshot whose RAM is elsewhere.
fn without_memory(folder: &Path) -> TempDir {
    let bare = TempDir::new().expect("there is a folder for temporary files");
    for name in ["config.json", "state.json"] {
        fs::copy(folder.join(name), bare.path().join(name)).expect("podvmm wrote them");
    }
    bare
}

/// Where podvmm itself waits for no page. Where it does, it is given some time.
const PROMPT: Duration = Duration::from_millis(1500);
const SOON: Duration = Duration::from_secs(4);

/// Waits for the end of a VM that has lost its memory.
fn ends_without_memory(guest: Counter, since: Instant, most: Duration) {
    let outcome = guest.service.running.wait();
    let took = since.elapsed();
    assert_eq!(outcome.code, Some(119), "{outcome:?}");
    let why = "the VM cannot go on: the process at ";
    assert_eq!(outcome.stderr.matches(why).count(), 1, "{outcome:?}");
    assert!(
        outcome.stderr.contains("gives it memory is gone"),
        "{outcome:?}"
    );
    assert!(took < most, "{took:?}");
    eprintln!("ended after {took:?}");
}

#[test]
fn a_process_gives_vms_the_memory_of_a_snapshot() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let bare = without_memory(folder.path());
    let handler = Handler::start(folder.path());
    let mut clone = handler.restore(bare.path());
    let mut other = handler.restore(bare.path());
    assert_eq!((clone.count(), clone.count()), ('B', 'C'));
    assert_eq!((other.count(), other.read_all()), ('B', 'r'));
    assert_eq!((clone.read_all(), clone.count()), ('r', 'D'));

    // A snapshot also has the memory that the guest never touched. Neither the snapshot nor the VM
    // that wrote it needs the process that gave the memory any more.
    let whole = TempDir::new().unwrap();
    let mut third = handler.restore(bare.path());
    assert_eq!(third.count(), 'B');
    third.snapshot(whole.path(), true);
    let mut plain = Counter::restore(whole.path(), &[("verify", true.into())]);
    assert_eq!((plain.count(), plain.read_all()), ('C', 'r'));
    [clone, other].into_iter().for_each(Counter::end);
    let said = handler.end();
    assert_eq!(said.matches("is gone: ").count(), 3, "{said}");
    assert_eq!((third.count(), third.read_all()), ('C', 'r'));
    [third, plain].into_iter().for_each(Counter::end);
}

/// It sees its socket's folder and no more, as a user who has a right to that at most.
#[test]
fn a_process_gives_memory_from_a_jail() {
    if !kvm_is_here() || !rustix::process::geteuid().is_root() {
        return;
    }
    let folder = snapshot();
    let options = ["--jail", "required", "--jail-user", "7777"];
    let handler = Handler::start_with(folder.path(), &options);
    let mut clone = handler.restore(folder.path());
    assert_eq!((clone.count(), clone.read_all()), ('B', 'r'));
    let outside = handler.running.pid();
    let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).unwrap();
    let inside = PathBuf::from(format!("/proc/{}", children.trim()));
    let status = fs::read_to_string(inside.join("status")).unwrap();
    let has = |line: &str| assert!(status.contains(line), "{line}: {status}");
    has("Uid:\t7777\t7777\t7777\t0\n");
    // DAC_OVERRIDE, for the folder is root's.
    has("CapPrm:\t0000000000000002\n");
    has("Seccomp:\t2\n");
    let root = inside.join("root");
    assert!(
        root.join(handler.folder.path().strip_prefix("/").unwrap())
            .exists()
    );
    for hidden in ["dev", "etc", "usr"] {
        assert!(!root.join(hidden).exists(), "{hidden}");
    }
    let snapshot = folder.path().strip_prefix("/").unwrap();
    assert!(!root.join(snapshot).join("state.json").exists());
    clone.end();
    let said = handler.end();
    assert!(!said.contains("WARN"), "{said}");
}

/// Compresses the files of a snapshot, and removes them. How many bytes they come to.
fn compress(folder: &Path) -> u64 {
    let plain = memory_files(folder);
    let arguments = ["pages", "--compress"].map(PathBuf::from);
    let outcome = Podvmm::new(arguments.iter().chain([&folder.to_path_buf()])).run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stdout.lines().count(), plain.len(), "{outcome:?}");
    for path in plain {
        fs::remove_file(path).expect("it is there");
    }
    let compressed = memory_files(folder);
    let len = |path: &PathBuf| fs::metadata(path).expect("it is there").len();
    compressed.iter().map(len).sum()
}

#[test]
fn a_process_gives_memory_that_is_compressed() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    // 8 MiB of it are alike.
    let bytes = compress(folder.path());
    assert!(bytes < 2 * MIB, "{bytes}");
    let handler = Handler::start(folder.path());
    let mut clone = handler.restore(folder.path());
    let mut other = handler.restore(folder.path());
    assert_eq!((clone.count(), clone.count()), ('B', 'C'));
    assert_eq!((clone.read_all(), other.read_all()), ('r', 'r'));
    assert_eq!(other.count(), 'B');
    [clone, other].into_iter().for_each(Counter::end);
    handler.end();

    // A block that is damaged is not given: the VM that waits for it ends.
    let memory = memory_files(folder.path()).remove(0);
    let file = fs::OpenOptions::new().write(true).open(&memory).unwrap();
    file.write_all_at(&[0x55; 4096], 100).unwrap();
    let handler = Handler::start(folder.path());
    // Its console is there until it runs.
    let paused = [handler.socket(), ("resume", false.into())];
    let mut guest = Counter::restore(folder.path(), &paused);
    // It may end before it answers.
    let _ = put(&mut guest.client, "vm.resume", None);
    ends_without_memory(guest, Instant::now(), PROMPT);
    let said = handler.end();
    assert!(
        said.contains("VM 0 is left: read the RAM at offset 0x"),
        "{said}"
    );
    assert!(said.contains("the compressed block is damaged"), "{said}");
    // And a file that is none at all is said to be so.
    fs::write(&memory, "memory").unwrap();
    let arguments = ["pages", "--socket", "/nowhere/pages", "--snapshot"].map(PathBuf::from);
    let outcome = Podvmm::new(arguments.iter().chain([&folder.path().to_path_buf()])).run();
    assert_eq!(outcome.code, Some(125), "{outcome:?}");
    let why = ".lz4: it is truncated, or no compressed RAM of podvmm's";
    assert!(outcome.stderr.contains(why), "{outcome:?}");
}

#[test]
fn a_compressed_file_goes_with_the_one_it_is_of() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let plain = memory_files(folder.path());
    let mut clone = Counter::restore(folder.path(), &[]);
    let arguments = ["pages", "--compress"].map(PathBuf::from);
    Podvmm::new(arguments.iter().chain([&folder.path().to_path_buf()])).run();
    let both = memory_files(folder.path());
    assert_eq!(both.len(), 2);
    // Over what there is, and instead of it.
    clone.snapshot(folder.path(), true);
    let kept = memory_files(folder.path());
    assert!(
        kept.len() == 3 && both.iter().all(|path| kept.contains(path)),
        "{kept:?}"
    );
    clone.snapshot(folder.path(), false);
    let kept = memory_files(folder.path());
    assert!(kept.len() == 1 && !kept.contains(&plain[0]), "{kept:?}");
    clone.end();
}

#[test]
fn layers_lie_over_one_another_in_what_a_process_gives() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let mut original = Counter::boot();
    assert_eq!(original.count(), 'A');
    original.snapshot(&first, true);
    assert_eq!(original.count(), 'B');
    original.snapshot(&second, true);
    original.end();
    assert_eq!(memory_files(&second).len(), 2);
    let handler = Handler::start(&second);
    let mut clone = handler.restore(&second);
    assert_eq!((clone.count(), clone.read_all()), ('C', 'r'));
    clone.end();
    handler.end();
    compress(&second);
    let handler = Handler::start(&second);
    let mut clone = handler.restore(&second);
    assert_eq!((clone.count(), clone.read_all()), ('C', 'r'));
    clone.end();
    handler.end();
}

#[test]
fn a_vm_ends_with_the_process_that_gives_it_memory() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    // It has nothing to wait for.
    let handler = Handler::start(folder.path());
    let mut idle = handler.restore(folder.path());
    assert_eq!(idle.count(), 'B');
    // And it waits for a page: no more come.
    let mut waits = handler.restore(folder.path());
    assert_eq!(waits.count(), 'B');
    handler.running.signal(libc::SIGSTOP);
    waits.console.write_all(b"r").unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(get(&mut waits.client, "vm.info")["state"], "Running");
    handler.running.signal(libc::SIGKILL);
    let since = Instant::now();
    ends_without_memory(waits, since, PROMPT);
    ends_without_memory(idle, since, PROMPT);
}

#[test]
fn a_vm_whose_snapshot_is_being_written_ends_with_that_process_too() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let handler = Handler::start(folder.path());
    let mut guest = handler.restore(folder.path());
    assert_eq!(guest.count(), 'B');
    put(&mut guest.client, "vm.pause", None).unwrap();
    handler.running.signal(libc::SIGSTOP);
    let mut client = guest.service.client();
    let body = json!({"destination_url": url(folder.path())});
    let writes = thread::spawn(move || put(&mut client, "vm.snapshot", Some(body)));
    // Meanwhile others are answered: what was so then, or that they have to wait.
    let mut other = guest.service.client();
    thread::sleep(Duration::from_millis(300));
    get(&mut other, "vmm.ping");
    assert_eq!(get(&mut other, "vm.info")["state"], "Paused");
    assert!(get(&mut other, "vm.counters")["exits"].is_object());
    let metrics = other.call("GET", "/metrics", None, &[]).unwrap();
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(
        metrics.contains("podvmm_vm_state{state=\"Paused\"} 1"),
        "{metrics}"
    );
    for request in ["vm.resume", "vm.shutdown", "vm.delete", "vm.snapshot"] {
        let body = (request == "vm.snapshot").then(|| json!({"destination_url": "file:///other"}));
        let (status, why) = refusal(put(&mut other, request, body));
        let expected =
            format!("{request}: a snapshot of the VM is being written; wait for its answer");
        assert_eq!((status, why), (409, expected));
    }
    handler.running.signal(libc::SIGKILL);
    ends_without_memory(guest, Instant::now(), SOON);
    assert!(writes.join().unwrap().is_err());
    // The older one is still there.
    let mut clone = Counter::restore(folder.path(), &[("verify", true.into())]);
    assert_eq!(clone.count(), 'B');
    clone.end();
}

/// A process that takes what it is handed, if that, and gives nothing.
fn silent_handler() -> (TempDir, UnixListener, (&'static str, Value)) {
    let folder = TempDir::new().expect("there is a folder for temporary files");
    let path = folder.path().join("pages");
    let listener = UnixListener::bind(&path).expect("it is new");
    (folder, listener, socket(&path))
}

#[test]
fn a_process_that_gives_nothing_keeps_a_vm_but_not_podvmm() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let (_folder, listener, socket) = silent_handler();
    let restore = |resume: bool| {
        let more = [socket.clone(), ("resume", resume.into())];
        let guest = Counter::restore(folder.path(), &more);
        let (stream, _) = listener.accept().unwrap();
        (guest, stream)
    };
    let (mut guest, stream): (Counter, UnixStream) = restore(true);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(get(&mut guest.client, "vm.info")["state"], "Running");
    drop(stream);
    ends_without_memory(guest, Instant::now(), PROMPT);

    // Neither a VM that is to end nor one whose snapshot is to be taken waits for it for ever.
    let (ends, _stream) = restore(true);
    let (mut written, _other) = restore(false);
    let since = Instant::now();
    ends.service.running.signal(libc::SIGTERM);
    let elsewhere = TempDir::new().unwrap();
    let body = json!({"destination_url": url(elsewhere.path())});
    put(&mut written.client, "vm.snapshot", Some(body)).unwrap_err();
    for guest in [ends, written] {
        let outcome = guest.service.running.wait();
        let took = since.elapsed();
        assert!(took < Duration::from_secs(15), "{took:?}");
        // A KVM that can leave a guest which waits for a page ends in good order.
        assert!(matches!(outcome.code, Some(119 | 143)), "{outcome:?}");
        let silent = "gives it memory has given none for 10 seconds";
        let is_said = outcome.stderr.contains(silent);
        assert_eq!(is_said, outcome.code == Some(119), "{outcome:?}");
    }
}

#[test]
fn memory_that_cannot_come_is_refused_with_the_reason() {
    if !kvm_is_here() {
        return;
    }
    let folder = snapshot();
    let service = Service::start(&[]);
    let mut client = service.client();
    let mut refused = |more: &[(&str, Value)], why: &str| {
        let answer = put(
            &mut client,
            "vm.restore",
            Some(restore_body(&service, folder.path(), more)),
        );
        let (status, found) = refusal(answer);
        assert_eq!(status, 400, "{found}");
        assert!(found.starts_with(why), "{found}");
    };
    let nowhere = [socket(Path::new("/nowhere"))];
    refused(&nowhere, "memory_socket /nowhere: No such file");
    let (_folder, listener, socket) = silent_handler();
    let why = "memory_socket: RAM is elsewhere, so here it can be neither prefetched nor verified";
    refused(&[socket.clone(), ("prefetch", true.into())], why);
    refused(&[socket.clone(), ("verify", true.into())], why);
    let shared = json!({"memory": {"shared": true}, "serial": {"mode": "Null"}});
    let why = "RAM that is shared or of huge pages cannot come";
    refused(&[socket.clone(), ("config", shared)], why);
    drop(listener);
    refused(&[socket], "memory_socket ");
    // It can still do something else.
    put(
        &mut service.client(),
        "vm.restore",
        Some(restore_body(&service, folder.path(), &[])),
    )
    .unwrap();
    service.dismiss();
}
