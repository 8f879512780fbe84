//! Snapshots of guests of a few instructions: what they take along, what they survive, and what is
//! refused.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::Podvmm;
use tests::counter::{Counter, files, memory_files, names, url};
use tests::podvmm::kvm_is_here;
use tests::service::{Service, get, put, refusal};

#[test]
fn guests_go_on_where_their_snapshot_was_taken_and_are_each_their_own() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let mut original = Counter::boot();
    assert_eq!(original.count(), 'A');
    original.snapshot(&first, true);
    assert_eq!((original.count(), original.count()), ('B', 'C'));
    original.snapshot(&second, true);
    assert_eq!(original.count(), 'D');
    original.end();

    let mut clone = Counter::restore(&first, &[]);
    let mut other = Counter::restore(&first, &[("verify", true.into())]);
    let mut later = Counter::restore(&second, &[("prefetch", true.into())]);
    assert_eq!(
        (clone.count(), clone.count(), clone.count()),
        ('B', 'C', 'D')
    );
    assert_eq!((other.count(), later.count()), ('B', 'D'));
    // What changed is little, and what did not is shared.
    let sizes: Vec<_> = files(&second).into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(sizes.len(), 4);
    let written = sizes.iter().filter(|bytes| **bytes > 8 << 20).count();
    assert_eq!(written, 1, "{sizes:?}");

    // A snapshot of a clone, over the one it is from.
    clone.snapshot(&first, true);
    let mut again = Counter::restore(&first, &[]);
    assert_eq!((clone.count(), again.count()), ('E', 'E'));
    // And whole: what it does not need any more is gone.
    clone.snapshot(&first, false);
    assert_eq!(memory_files(&first).len(), 1);
    let mut whole = Counter::restore(&first, &[("verify", true.into())]);
    assert_eq!((whole.count(), other.count()), ('F', 'C'));
    [clone, other, later, again, whole]
        .into_iter()
        .for_each(Counter::end);
}

#[test]
fn the_command_line_restores_too() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot();
    original.count();
    original.snapshot(folder.path(), false);
    original.end();
    let path = folder.path().to_str().unwrap();
    let outcome = Podvmm::new(["--restore", path, "--prefetch", "--serial", "tty"])
        .input(b"..q")
        .run();
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(0), "BC"),
        "{outcome:?}"
    );
    let outcome = Podvmm::new(["--restore", "/nowhere"]).run();
    assert_eq!(outcome.code, Some(125), "{outcome:?}");
    let why = "podvmm: --restore /nowhere: read /nowhere/state.json: No such file";
    assert!(outcome.stderr.contains(why), "{outcome:?}");
}

#[test]
fn a_snapshot_is_of_a_paused_vm_and_restored_where_there_is_none() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot();
    let snapshot = json!({"destination_url": url(folder.path())});
    let (status, why) = refusal(put(&mut original.client, "vm.snapshot", Some(snapshot)));
    assert_eq!(
        (status, why.as_str()),
        (409, "vm.snapshot: the VM is Running, it must be Paused")
    );
    let (status, _) = refusal(put(
        &mut original.client,
        "vm.restore",
        Some(json!({"source_url": url(folder.path())})),
    ));
    assert_eq!(status, 409);
    original.end();
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot();
    original.count();
    original.snapshot(folder.path(), false);
    original.end();

    let state = folder.path().join("state.json");
    let memory = memory_files(folder.path()).remove(0);
    let service = Service::start(&[]);
    let mut client = service.client();
    let mut refused = |more: Value| {
        let mut body = json!({"source_url": url(folder.path()), "config": more});
        body["config"]["serial"] = json!({"mode": "Null"});
        body["verify"] = true.into();
        let answer = put(&mut client, "vm.restore", Some(body.clone()));
        assert!(answer.is_err(), "{body}");
        let (status, why) = refusal(answer);
        assert_eq!(status, 400, "{why}");
        why
    };
    let cases = [
        (
            json!({"cpus": {"max_vcpus": 2}}),
            "its guest has 3 vCPUs, the configuration 2",
        ),
        (
            json!({"memory": {"size": 128 << 20}}),
            "its guest has 67108864 bytes of memory at most, the configuration 134217728",
        ),
        (
            json!({"balloon": null}),
            "its guest has the devices rng, balloon, the configuration the devices rng",
        ),
        (
            json!({"vsock": {"cid": 3, "socket": service.folder.path().join("v")}}),
            "its guest has the devices rng, balloon, the configuration the devices vsock, rng, balloon",
        ),
        (
            json!({"memory": {"shared": "x"}}),
            "memory.shared: invalid type",
        ),
    ];
    for (patch, why) in cases {
        let found = refused(patch);
        assert!(found.contains(why), "{found}");
    }

    let whole = fs::read(&state).unwrap();
    let text = String::from_utf8(whole.clone()).unwrap();
    let spoilt = [
        (text[..text.len() / 2].into(), "it is truncated, or no JSON"),
        (
            text.replace("\"version\":", "\"version\":9"),
            "its format is version 9",
        ),
        (
            text.replace("x86_64", "aarch64"),
            "it is of a VM on aarch64",
        ),
        (
            text.replace("\"devices\":", "\"devices\": "),
            "its state is",
        ),
        (
            text.replace("\"devices\":", "\"device5\":"),
            "its checksum is another",
        ),
    ];
    for (text, why) in spoilt {
        fs::write(&state, text).unwrap();
        let found = refused(json!({}));
        assert!(found.contains(why), "{found}");
    }
    fs::write(&state, &whole).unwrap();

    for name in ["config.json", "state.json"] {
        let path = folder.path().join(name);
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o620);
        let found = refused(json!({}));
        let why = "must be written by its user or root alone: others may write to it (mode 0620)";
        assert!(found.contains(name) && found.contains(why), "{found}");
        mode(0o600);
    }

    let file = fs::OpenOptions::new().write(true).open(&memory).unwrap();
    file.write_all_at(b"!", 0x180_0000 - 0x1000).unwrap();
    assert!(refused(json!({})).contains("is damaged: its checksum is another"));
    file.set_len(1 << 20).unwrap();
    assert!(refused(json!({})).contains("it is truncated: 1048576 bytes instead of"));
    fs::remove_file(&memory).unwrap();
    assert!(refused(json!({})).contains("No such file"));
    fs::create_dir(&memory).unwrap();
    assert!(refused(json!({})).contains("not a regular file"));
    // It can still do something else.
    assert!(get(&mut service.client(), "vmm.ping")["pid"].is_u64());
    service.dismiss();
}

#[test]
fn a_killed_podvmm_leaves_the_older_snapshot_or_the_newer_one() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut newer = 0;
    for round in 0..16 {
        let mut original = Counter::boot();
        original.count();
        original.snapshot(folder.path(), false);
        original.count();
        put(&mut original.client, "vm.pause", None).unwrap();
        let body = json!({"destination_url": url(folder.path()), "incremental": round % 2 == 1});
        let mut client = original.service.client();
        let writes = thread::spawn(move || put(&mut client, "vm.snapshot", Some(body)).is_ok());
        thread::sleep(Duration::from_millis(3 * round));
        original.service.running.signal(libc::SIGKILL);
        let written = writes.join().unwrap();
        drop(original);
        let mut clone = Counter::restore(folder.path(), &[("verify", true.into())]);
        let count = clone.count();
        assert!(
            count == 'C' || (count == 'B' && !written),
            "{count} {written}"
        );
        newer += u32::from(count == 'C');
        clone.snapshot(folder.path(), false);
        // What others left half-written is gone.
        assert_eq!(files(folder.path()).len(), 3);
        clone.end();
    }
    eprintln!("{newer} of 16 times it was the newer one");
}

/// A file system with little room.
struct Small(TempDir);

impl Small {
    fn new() -> Self {
        let folder = TempDir::new().expect("there is a folder for temporary files");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=14m", "podvmm-test"])
            .arg(folder.path())
            .status();
        assert!(mount.expect("mount runs").success());
        Self(folder)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmount.expect("mount runs").success());
    }
}

#[test]
fn a_full_disk_leaves_the_older_snapshot_and_nothing_else() {
    if !kvm_is_here() {
        return;
    }
    let disk = Small::new();
    let folder = disk.0.path().join("s");
    let mut original = Counter::boot();
    assert_eq!(original.count(), 'A');
    original.snapshot(&folder, false);
    let before = names(&folder);
    original.count();
    // Another one does not fit beside it.
    let (status, why) = original.refused_snapshot(&folder, false);
    assert_eq!(status, 500, "{why}");
    assert!(why.contains("No space left on device"), "{why}");
    assert_eq!(names(&folder), before);
    let other = disk.0.path().join("t");
    original.refused_snapshot(&other, false);
    assert!(!other.exists());
    assert_eq!(original.count(), 'C');
    let mut clone = Counter::restore(&folder, &[("verify", true.into())]);
    assert_eq!(clone.count(), 'B');
    [original, clone].into_iter().for_each(Counter::end);
}

#[test]
fn changes_alone_are_written_where_what_is_below_can_be_had() {
    if !kvm_is_here() {
        return;
    }
    let (folder, disk) = (TempDir::new().unwrap(), Small::new());
    let mut original = Counter::boot();
    let mut files = Vec::new();
    for round in 0..10 {
        original.count();
        original.snapshot(folder.path(), true);
        assert!(original.is_mapped_from(folder.path()), "{round}");
        files.push(memory_files(folder.path()).len());
    }
    // Not for ever: then all is in one file again.
    assert_eq!(files, [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]);
    let mut clone = Counter::restore(folder.path(), &[("verify", true.into())]);
    assert_eq!(clone.count(), 'K');
    // There are no links to another file system.
    original.snapshot(&disk.0.path().join("s"), true);
    assert_eq!(memory_files(&disk.0.path().join("s")).len(), 1);
    // Links and all else go with a snapshot that fails.
    original.snapshot(&disk.0.path().join("s"), true);
    original.count();
    let filled = fs::write(disk.0.path().join("rest"), vec![1; 16 << 20]);
    filled.unwrap_err();
    let other = disk.0.path().join("t");
    let (status, why) = original.refused_snapshot(&other, true);
    assert_eq!(status, 500, "{why}");
    assert!(why.contains("No space left on device"), "{why}");
    assert!(!other.exists());
    [original, clone].into_iter().for_each(Counter::end);
}

/// A guest that has huge pages keeps them.
#[test]
fn a_guest_goes_on_in_its_own_memory_after_a_snapshot() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot();
    original.count();
    original.snapshot(folder.path(), false);
    assert!(!original.is_mapped_from(folder.path()));
    original.count();
    // Changes since then are known of no file, so this is all of it.
    original.snapshot(folder.path(), true);
    assert_eq!(memory_files(folder.path()).len(), 1);
    let mut clone = Counter::restore(folder.path(), &[("verify", true.into())]);
    assert_eq!((original.count(), clone.count()), ('C', 'C'));
    [original, clone].into_iter().for_each(Counter::end);
}

#[test]
fn one_podvmm_at_a_time_writes_to_a_folder() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let lock = fs::File::open(folder.path()).unwrap();
    lock.lock().unwrap();
    let mut original = Counter::boot();
    let (status, why) = original.refused_snapshot(folder.path(), false);
    assert_eq!(status, 400);
    assert!(
        why.starts_with("another podvmm writes a snapshot to"),
        "{why}"
    );
    original.end();
}

#[test]
fn a_configuration_that_belongs_to_a_snapshot_never_completed_is_not_used() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Counter::boot();
    original.snapshot(folder.path(), false);
    original.end();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["cpus"]["max_vcpus"] = 2.into();
    config["snapshot"] = "another".into();
    fs::write(&path, config.to_string()).unwrap();
    let mut clone = Counter::restore(folder.path(), &[]);
    assert_eq!(clone.count(), 'A');
    clone.end();
}
