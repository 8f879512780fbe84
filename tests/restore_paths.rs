//! The ways of RAM into a restored VM besides mapping its files: a working set that was recorded.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::counter::{Counter, names, restore_body};
use tests::podvmm::kvm_is_here;
use tests::service::{Service, put, refusal};

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
    original.snapshot(folder.path(), false);
    let (status, why) = record(&mut original);
    assert_eq!(status, 400);
    assert!(why.starts_with("the VM's RAM is a copy"), "{why}");
    put(&mut original.client, "vm.shutdown", None).unwrap();
    let (status, why) = record(&mut original);
    assert_eq!(status, 409);
    assert!(why.ends_with("it must be Running or Paused"), "{why}");
    original.service.dismiss();
}
