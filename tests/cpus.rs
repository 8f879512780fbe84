//! What guests of a few instructions find of their CPUs, interrupts and clocks.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;
use tempfile::TempDir;
use tests::payload::Protocol;
use tests::podvmm::kvm_is_here;
use tests::probe::{ClockFlags, Probe};
use tests::service::{get, put, refusal};
use tests::{Outcome, Payload, Podvmm, code};

/// Boots `code` and waits for its end.
fn run(code: &[u8], more: &[&str]) -> Outcome {
    let payload = Payload::new(code, Protocol::Pvh);
    Podvmm::new(payload.arguments().iter().chain(more)).run()
}

#[test]
fn a_vcpu_started_after_a_restore_has_the_time_of_the_first() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Probe::boot(2);
    let stable = original.clock_flags().is_stable;
    original.pause();
    original.snapshot(folder.path());
    original.resume();
    // The snapshot's vCPU 1 has not been started: it has no time of its own.
    assert_eq!(original.start_next_cpu(), '=');
    original.end();

    let mut clone = Probe::restore(folder.path());
    let expected = ClockFlags {
        is_stable: stable,
        was_stopped: true,
    };
    assert_eq!(clone.clock_flags(), expected);
    assert_eq!(clone.start_next_cpu(), '=');
    clone.end();
}

#[test]
fn vcpus_are_made_when_the_vm_grows_to_them() {
    if !kvm_is_here() {
        return;
    }
    let mut guest = Probe::boot(1);
    guest.has_vcpu_threads(1);
    let stable = guest.clock_flags().is_stable;
    guest.resize(2);
    guest.has_vcpu_threads(2);
    assert_eq!(guest.start_next_cpu(), '=');
    guest.resize(3);
    guest.has_vcpu_threads(3);
    assert_eq!(guest.start_next_cpu(), '=');
    assert_eq!(guest.clock_flags().is_stable, stable);
    // Those that are not to run any more stay: KVM cannot take them away.
    guest.resize(1);
    guest.resize(3);
    guest.has_vcpu_threads(3);
    guest.end();
}

#[test]
fn a_restored_vm_grows_as_the_original_would() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Probe::boot(1);
    let stable = original.clock_flags().is_stable;
    original.pause();
    original.snapshot(folder.path());
    original.resume();
    original.end();

    let mut clone = Probe::restore(folder.path());
    clone.has_vcpu_threads(1);
    clone.resize(3);
    assert_eq!((clone.start_next_cpu(), clone.start_next_cpu()), ('=', '='));
    assert_eq!(clone.clock_flags().is_stable, stable);

    // Its guest goes on with what it has started, though one vCPU alone is to run.
    clone.resize(1);
    clone.pause();
    clone.snapshot(folder.path());
    clone.resume();
    clone.end();
    let again = Probe::restore(folder.path());
    again.has_vcpu_threads(3);
    again.end();
}

#[test]
fn a_paused_vm_grows_when_it_is_resumed() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut guest = Probe::boot(1);
    guest.pause();
    guest.resize(2);
    guest.snapshot(folder.path());
    guest.resume();
    assert_eq!(guest.start_next_cpu(), '=');
    guest.end();

    let mut clone = Probe::restore(folder.path());
    clone.has_vcpu_threads(2);
    assert_eq!(clone.start_next_cpu(), '=');
    clone.end();
}

/// Linux waits for interrupts that it sends to other CPUs, with its locks held.
#[test]
fn a_vcpu_that_the_guest_keeps_is_slow_but_not_stopped() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut guest = Probe::boot(2);
    guest.start_busy_cpu();
    guest.waits_for_busy_cpu();
    guest.resize(1);
    // It has been asked to give the vCPU up, and may still be at it.
    guest.pause();
    guest.snapshot(folder.path());
    guest.resume();
    guest.waits_for_busy_cpu();
    for mut guest in [guest, Probe::restore(folder.path())] {
        // It may take three seconds to give the vCPU up.
        thread::sleep(Duration::from_secs(4));
        guest.waits_for_busy_cpu();
        let (start, before) = (Instant::now(), guest.vcpu_time(1));
        thread::sleep(Duration::from_secs(2));
        let used = guest.vcpu_time(1) - before;
        assert!(used < start.elapsed() / 4, "{used:?}");
        let info = get(&mut guest.client, "vm.info");
        assert_eq!(info["vcpus_actual"], 2);
        // It is as fast as ever when it may run again.
        guest.resize(2);
        guest.waits_for_busy_cpu();
        guest.end();
    }
}

/// Limits a resource of podvmm. Returns what limited it before.
fn limit(guest: &Probe, resource: Resource, limit: Rlimit) -> Rlimit {
    let pid = i32::try_from(guest.service.running.pid()).expect("pids are positive");
    prlimit(Pid::from_raw(pid), resource, limit).expect("the hard limit stays")
}

#[test]
fn a_vm_that_cannot_grow_stays_as_it_is_and_may_grow_later() {
    if !kvm_is_here() {
        return;
    }
    let mut guest = Probe::boot(1);
    let proc = format!("/proc/{}", guest.service.running.pid());
    let free_fd = || (0..).find(|fd| !Path::new(&format!("{proc}/fd/{fd}")).exists());
    let used_pages = || -> u64 {
        let statm = fs::read_to_string(format!("{proc}/statm")).unwrap();
        statm.split(' ').next().unwrap().parse().unwrap()
    };
    // A vCPU needs a descriptor, and its thread a stack of 2 MiB.
    let descriptors = || free_fd().unwrap();
    let bytes = || 4096 * used_pages() + (1 << 20);
    let shortages: [(Resource, &dyn Fn() -> u64, &str); 2] = [
        (Resource::Nofile, &descriptors, "create vCPU 1"),
        (Resource::As, &bytes, "start the thread of vCPU 1"),
    ];
    for (resource, most, why) in shortages {
        let little = Rlimit {
            current: Some(most()),
            maximum: getrlimit(resource).maximum,
        };
        let before = limit(&guest, resource, little);
        let size = json!({"desired_vcpus": 3});
        let (status, refused) = refusal(put(&mut guest.client, "vm.resize", Some(size)));
        limit(&guest, resource, before);
        assert_eq!(status, 500);
        assert!(refused.starts_with(why), "{refused}");
        let info = get(&mut guest.client, "vm.info");
        assert_eq!(info["vcpus_actual"], 1);
        assert_eq!(info["config"]["cpus"]["boot_vcpus"], 1);
    }
    guest.resize(3);
    assert_eq!((guest.start_next_cpu(), guest.start_next_cpu()), ('=', '='));
    guest.end();
}

code!(
    core_level,
    ".code32",
    // Leaf 0xb, subleaf 1: the type of the level, and how many vCPUs the package has.
    "mov eax, 0xb",
    "mov ecx, 1",
    "cpuid",
    "mov dx, 0x3f8",
    "mov al, ch",
    "add al, '0'",
    "out dx, al",
    "mov al, bl",
    "add al, '0'",
    "out dx, al",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: hlt",
    "jmp 1b",
);

#[test]
fn vcpus_are_cores_of_one_package() {
    if !kvm_is_here() {
        return;
    }
    let outcome = run(core_level(), &["--cpus", "boot=1,max=5"]);
    // Level type 2 is cores.
    assert_eq!(outcome.stdout, "25", "{outcome:?}");
}

code!(
    read_a_counter,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, 'A'",
    "out dx, al",
    "xor ecx, ecx",
    // Without counters this is a general protection fault, for which the guest is not prepared.
    "rdpmc",
    "mov al, 'B'",
    "mov dx, 0x3f8",
    "out dx, al",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: hlt",
    "jmp 1b",
);

#[test]
fn there_are_no_performance_counters() {
    if !kvm_is_here() {
        return;
    }
    let outcome = run(read_a_counter(), &[]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(121), "A"),
        "{outcome:?}"
    );
}

code!(
    late_ticks,
    ".code32",
    "mov esp, 0x80000",
    // The PIC's first input unmasked, and no CPU that takes interrupts: the guest asks the PIC.
    "mov al, 0x11",
    "out 0x20, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 0x04",
    "out 0x21, al",
    "mov al, 0x01",
    "out 0x21, al",
    "mov al, 0xfe",
    "out 0x21, al",
    // Channel 0 ticks each 2 ms (2386 periods of 1.193 MHz).
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x52",
    "out 0x40, al",
    "mov al, 0x09",
    "out 0x40, al",
    // Sleep through 40 ticks, then count those that come during the next 5.
    "mov ebp, 40",
    "xor ebx, ebx",
    "call 5f",
    "xor edi, edi",
    "mov ebp, 5",
    "inc ebx",
    "call 5f",
    "mov dx, 0x3f8",
    "mov al, 'f'", // few
    "cmp edi, 15",
    "jbe 1f",
    "mov al, 'm'", // many
    "1: out dx, al",
    "mov al, 0xfe",
    "out 0x64, al",
    "2: hlt",
    "jmp 2b",
    // Until the channel's counter has started anew EBP times. Counts ticks in EDI if EBX is set.
    "5: mov esi, 0xffff",
    "6: test ebx, ebx",
    "jz 7f",
    // A tick is taken and acknowledged as by a handler.
    "mov al, 0x0a",
    "out 0x20, al",
    "in al, 0x20",
    "test al, 1",
    "jz 7f",
    "mov al, 0x0c",
    "out 0x20, al",
    "in al, 0x20",
    "inc edi",
    "7: xor eax, eax",
    "out 0x43, al",
    "in al, 0x40",
    "mov cl, al",
    "in al, 0x40",
    "mov ch, al",
    "movzx ecx, cx",
    "cmp ecx, esi",
    "mov esi, ecx",
    "jbe 6b",
    "dec ebp",
    "jnz 6b",
    "ret",
);

#[test]
fn ticks_that_were_missed_do_not_come_later() {
    if !kvm_is_here() {
        return;
    }
    let outcome = run(late_ticks(), &[]);
    assert_eq!(outcome.stdout, "f", "{outcome:?}");
}

#[test]
fn a_guest_learns_once_that_it_was_paused() {
    if !kvm_is_here() {
        return;
    }
    let mut guest = Probe::boot(1);
    assert!(!guest.clock_flags().was_stopped);
    guest.pause();
    guest.resume();
    assert!(guest.clock_flags().was_stopped);
    assert!(!guest.clock_flags().was_stopped);
    guest.end();
}
