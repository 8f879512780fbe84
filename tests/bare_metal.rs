//! Guests without an operating system: how they are entered, what they can
//! reach, and how they end. Milliseconds each.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::payload::Protocol;
use tests::podvmm::kvm_is_here;
use tests::{Outcome, Payload, Podvmm, code};

/// Boots `code` and waits for its end.
fn boot(code: &[u8], protocol: Protocol, more: &[&str]) -> Outcome {
    let payload = Payload::new(code, protocol);
    Podvmm::new(payload.arguments().iter().chain(more)).run()
}

code!(
    pvh_entry,
    ".code32",
    // hvm_start_info begins with its magic number; "P" if EBX points there.
    "cmp dword ptr [ebx], 0x336ec578",
    "jne 1f",
    "mov dx, 0x3f8",
    "mov al, 'P'",
    "out dx, al",
    "1: mov al, 0xfe",
    "out 0x64, al",
    "2: hlt",
    "jmp 2b",
);

#[test]
fn a_kernel_with_a_pvh_note_finds_its_start_info() {
    if !kvm_is_here() {
        return;
    }
    let outcome = boot(pvh_entry(), Protocol::Pvh, &[]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(0), "P"),
        "{outcome:?}"
    );
}

#[test]
fn a_guest_in_a_jail_runs_as_any() {
    if !kvm_is_here() || !rustix::process::geteuid().is_root() {
        return;
    }
    let outcome = boot(pvh_entry(), Protocol::Pvh, &["--jail", "required"]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(0), "P"),
        "{outcome:?}"
    );
}

code!(
    linux64_entry,
    // boot_params has "HdrS" at 0x202; "L" if RSI points there in long mode.
    "cmp dword ptr [rsi + 0x202], 0x53726448",
    "jne 1f",
    "mov dx, 0x3f8",
    "mov al, 'L'",
    "out dx, al",
    "1: mov al, 0xfe",
    "out 0x64, al",
    "2: hlt",
    "jmp 2b",
);

#[test]
fn a_kernel_without_one_is_entered_in_long_mode_with_boot_params() {
    if !kvm_is_here() {
        return;
    }
    let outcome = boot(linux64_entry(), Protocol::Linux64, &[]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (Some(0), "L"),
        "{outcome:?}"
    );
}

code!(halt, ".code32", "cli", "1: hlt", "jmp 1b");

#[test]
fn a_guest_that_halts_for_good_ends_the_vm() {
    if !kvm_is_here() {
        return;
    }
    let outcome = boot(halt(), Protocol::Pvh, &["-v"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("the guest halted"), "{outcome:?}");
}

code!(undefined, ".code32", "ud2");

#[test]
fn a_triple_fault_names_its_place() {
    if !kvm_is_here() {
        return;
    }
    let outcome = boot(undefined(), Protocol::Pvh, &[]);
    assert_eq!(outcome.code, Some(121), "{outcome:?}");
    // KVM on AMD hosts resets the vCPU first (svm.c, shutdown_interception).
    let said = if Path::new("/sys/module/kvm_amd").exists() {
        "the guest triple-faulted; where is not known"
    } else {
        "the guest triple-faulted at RIP 0x100000, instruction bytes 0f 0b"
    };
    assert!(outcome.stderr.contains(said), "{outcome:?}");
}

code!(run_from_mmio, ".code32", "mov eax, 0xd0000000", "jmp eax");

#[test]
fn what_kvm_cannot_emulate_ends_the_vm_with_the_reason_and_place() {
    if !kvm_is_here() {
        return;
    }
    let outcome = boot(run_from_mmio(), Protocol::Pvh, &[]);
    assert_eq!(outcome.code, Some(120), "{outcome:?}");
    assert!(outcome.stderr.contains("KVM cannot emulate"), "{outcome:?}");
    assert!(outcome.stderr.contains("RIP 0xd0000000"), "{outcome:?}");
}

code!(
    announce_and_spin,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, '\n'",
    "out dx, al",
    "1: jmp 1b"
);

#[test]
fn a_signal_ends_even_a_guest_that_never_stops() {
    if !kvm_is_here() {
        return;
    }
    let payload = Payload::new(announce_and_spin(), Protocol::Pvh);
    for (signal, code) in [(libc::SIGTERM, 143), (libc::SIGINT, 130)] {
        let running = Podvmm::new(payload.arguments()).spawn();
        std::thread::sleep(Duration::from_millis(300));
        running.signal(signal);
        let outcome = running.wait();
        assert_eq!(
            (outcome.code, outcome.stdout.as_str()),
            (Some(code), "\n"),
            "{outcome:?}"
        );
    }
}

code!(
    nonsense_everywhere,
    ".code32",
    // Every 4-byte word of the first eight windows and of the space behind
    // them, read and written with a changing value in every width.
    "mov edi, 0xc0000000",
    "mov eax, 0xffffffff",
    "1: mov [edi], eax",
    "mov edx, [edi]",
    "mov [edi], ax",
    "mov [edi + 1], al",
    "mov dx, [edi + 2]",
    "imul eax, eax, 1103515245",
    "add eax, 12345",
    "add edi, 4",
    "test edi, 0xe00", // registers and the first config bytes, not the whole window
    "jz 2f",
    "and edi, 0xfffff000",
    "add edi, 0x1000",
    "2: cmp edi, 0xc0008000",
    "jb 1b",
    // Every port but the PIT's, PIC's and the reset line, which KVM or podvmm acts on.
    "mov edx, 0x3f8",
    "3: mov al, dl",
    "out dx, al",
    "in eax, dx",
    "out dx, ax",
    "out dx, eax",
    "inc edx",
    "cmp edx, 0x408",
    "jb 3b",
    "mov al, 0xff",
    "out 0x64, al",
    "in al, 0x64",
    "mov al, 0xfe",
    "out 0x64, al",
    "4: hlt",
    "jmp 4b",
);

#[test]
fn nonsense_in_every_register_of_every_device_is_survived() {
    if !kvm_is_here() {
        return;
    }
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let disk = format!("path={}", disk.path().display());
    let more = ["--disk", &disk, "--console", "null", "--serial", "null"];
    let outcome = boot(nonsense_everywhere(), Protocol::Pvh, &more);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

code!(
    print_3000_bytes,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, 'x'",
    "mov ecx, 3000",
    "1: out dx, al",
    "loop 1b",
    "mov al, 0xfe",
    "out 0x64, al",
    "2: hlt",
    "jmp 2b",
);

#[test]
fn a_serial_file_beyond_the_file_size_limit_does_not_end_the_vm() {
    if !kvm_is_here() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let payload = Payload::new(print_3000_bytes(), Protocol::Pvh);
    let serial = format!("file={}", file.path().display());
    let arguments = payload.arguments().into_iter().chain(["--serial", &serial]);
    let outcome = Podvmm::new(arguments).file_size_limit(1000).run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(file.as_file().metadata().unwrap().len(), 1000);
}

#[test]
fn sockets_of_a_podvmm_that_was_killed_are_replaced_and_those_of_one_that_runs_are_not() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let [api, vsock, serial] =
        ["api", "vsock", "serial"].map(|name| folder.path().join(name).display().to_string());
    let payload = Payload::new(announce_and_spin(), Protocol::Pvh);
    let options = [
        ["--api-socket", &api],
        ["--vsock", &format!("cid=3,socket={vsock}")],
        ["--serial", &format!("socket={serial}")],
    ];
    let start = || {
        let arguments = payload.arguments();
        Podvmm::new(arguments.iter().chain(options.as_flattened())).spawn()
    };
    let served = || {
        let deadline = Instant::now() + Duration::from_secs(10);
        for socket in [&api, &vsock, &serial] {
            while UnixStream::connect(socket).is_err() {
                assert!(Instant::now() < deadline, "{socket} is not served");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    };
    let killed = start();
    served();
    drop(killed);
    assert!(Path::new(&vsock).exists(), "it had no time to remove it");
    let running = start();
    served();
    let refused = start().wait();
    assert_eq!(refused.code, Some(125), "{refused:?}");
    let said = format!("podvmm: --api-socket: {api} is in use by a process that answers there");
    assert!(refused.stderr.starts_with(&said), "{refused:?}");
    served();
    running.signal(libc::SIGTERM);
    running.wait();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
