//! What a user can get wrong, and the message for it. Nothing here runs a guest
//! for longer than it takes to refuse it.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use tests::payload::{Protocol, image};
use tests::podvmm::kvm_is_here;
use tests::{Payload, Podvmm, code};

code!(
    reset,
    ".code32",
    "mov al, 0xfe",
    "out 0x64, al",
    "1: hlt",
    "jmp 1b"
);

fn kernel() -> Payload {
    Payload::new(reset(), Protocol::Pvh)
}

/// Runs podvmm, which must fail with exit code 125, and returns what it said.
fn refusal(mut podvmm: Podvmm) -> String {
    podvmm.command().env("PODVMM_GUEST", "/nonexistent");
    let outcome = podvmm.run();
    assert_eq!(outcome.code, Some(125), "{outcome:?}");
    assert_eq!(outcome.stdout, "");
    outcome.stderr
}

/// A case: arguments and a part of the message.
type Case<'a> = (&'a [&'a str], &'a str);

fn check(cases: &[Case]) {
    for (arguments, expected) in cases {
        let said = refusal(Podvmm::new(*arguments));
        assert!(said.contains(expected), "{arguments:?} said: {said}");
    }
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    check(&[
        (&["--kernle", "x"], "invalid option '--kernle'"),
        (&["--kernel"], "missing argument for option '--kernel'"),
        (
            &["--memory", "size=16M"],
            "--memory: size: 16M of RAM: 32M to 1024G is possible",
        ),
        (
            &["--memory", "size=2T"],
            "--memory: size: 2048G of RAM: 32M to 1024G is possible",
        ),
        (&["--memory", "size=lots"], "'lots' is not a size"),
        (&["--cpus", "boot=0"], "0 vCPUs: 1 to 254 is possible"),
        (&["--cpus", "boot=255"], "255 vCPUs: 1 to 254 is possible"),
        (&["--cpus", "boot=2,max=1"], "max=1 is less than boot=2"),
        (&["--disk", "readonly=on"], "--disk: 'path' is missing"),
        (
            &["--serial", "loud"],
            "'loud' is none of off, null, tty, file=PATH",
        ),
        (
            &["--serial", "tty", "--", "true"],
            "standard output is COMMAND's alone",
        ),
    ]);
}

#[test]
fn a_missing_guest_says_how_to_make_one() {
    check(&[(&[], "no vmlinux in /nonexistent: run resources/guest/build")]);
}

#[test]
fn kernel_files_that_are_none_are_named() {
    if !kvm_is_here() {
        return;
    }
    let whole = image(reset(), Protocol::Pvh);
    let mut low = whole.clone();
    low[64 + 24..64 + 32].copy_from_slice(&0x8000_u64.to_le_bytes()); // p_paddr
    let mut high = whole.clone();
    high[64 + 24..64 + 32].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let mut longer_in_file = whole.clone();
    longer_in_file[64 + 40..64 + 48].copy_from_slice(&1_u64.to_le_bytes()); // p_memsz
    let cases: [(&[u8], &str); 8] = [
        (b"", "not a kernel"),
        (b"#!/bin/sh\n", "not a kernel"),
        (&[0xff; 4096], "not a kernel"),
        (&whole[..40], "truncated: the ELF header"),
        (&whole[..0x1004], "truncated: a segment"),
        (&low, "a segment is linked at 0x8000"),
        (&high, "do not fit into guest RAM"),
        (&longer_in_file, "longer in the file than in memory"),
    ];
    for (bytes, expected) in cases {
        let payload = Payload::from_bytes(bytes);
        let said = refusal(Podvmm::new(payload.arguments()));
        assert!(said.contains(expected), "expected {expected}: {said}");
    }
    check(&[
        (
            &["--kernel", "/nonexistent/vmlinux"],
            "open /nonexistent/vmlinux: No such file",
        ),
        (&["--kernel", "/"], "open /: not a regular file"),
        (
            &["--kernel", "/dev/zero"],
            "open /dev/zero: not a regular file",
        ),
    ]);
}

#[test]
fn what_does_not_fit_into_the_guest_is_named() {
    if !kvm_is_here() {
        return;
    }
    let kernel = kernel();
    let [_, path] = kernel.arguments();
    let initramfs = tempfile::NamedTempFile::new().unwrap();
    initramfs.as_file().set_len(64 << 20).unwrap();
    let initramfs = initramfs.path().to_str().unwrap();
    let long = "x".repeat(4096);
    check(&[
        (
            &[
                "--kernel",
                path,
                "--memory",
                "size=32M",
                "--initramfs",
                initramfs,
            ],
            "an initramfs of 67108864 bytes does not fit",
        ),
        (
            &["--kernel", path, "--cmdline", &long],
            "Linux reads at most 2047",
        ),
        (
            &["--kernel", path, "--initramfs", "/nonexistent"],
            "open /nonexistent: No such file",
        ),
    ]);
}

#[test]
fn a_disk_that_is_missing_or_busy_is_named() {
    if !kvm_is_here() {
        return;
    }
    let kernel = kernel();
    let [_, path] = kernel.arguments();
    let odd = Payload::from_bytes(&[0; 1000]);
    let odd = format!("path={}", odd.path().display());
    check(&[
        (
            &["--kernel", path, "--disk", "path=/nonexistent.img"],
            "/nonexistent.img",
        ),
        (&["--kernel", path, "--disk", &odd], "512"),
    ]);
}

#[test]
fn a_missing_kvm_is_named_with_the_remedy() {
    let kernel = kernel();
    let mut podvmm = Podvmm::new(kernel.arguments());
    // SAFETY: between fork and exec only system calls are made.
    unsafe { podvmm.command().pre_exec(hide_dev) };
    let said = refusal(podvmm);
    assert!(
        said.contains("open /dev/kvm: is there a KVM module"),
        "{said}"
    );
}

/// Gives the process a mount namespace with an empty `/dev`.
fn hide_dev() -> std::io::Result<()> {
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: no pointers are involved.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let none = std::ptr::null();
    // SAFETY: all strings are NUL-terminated and live on.
    check(unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) })?;
    // SAFETY: all strings are NUL-terminated and live on.
    check(unsafe {
        libc::mount(
            c"none".as_ptr(),
            c"/dev".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            none.cast(),
        )
    })
}

#[test]
fn a_forbidden_kvm_is_named_with_the_remedy() {
    if !kvm_is_here() {
        return;
    }
    const NOBODY: u32 = 65534;
    let folder = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()
        .unwrap();
    let binary = folder.path().join("podvmm");
    tests::podvmm::copy_program(tests::podvmm::binary(), &binary);
    let kernel = Path::new("/etc/hostname");
    let mut podvmm = Podvmm::new(["--kernel".as_ref(), kernel]);
    *podvmm.command() = Command::new(binary);
    podvmm
        .command()
        .args(["--kernel".as_ref(), kernel])
        .uid(NOBODY)
        .gid(NOBODY);
    let said = refusal(podvmm);
    assert!(
        said.contains("open /dev/kvm: may this user open it?"),
        "{said}"
    );
}

/// By the command that makes it, which does so at once, however often it failed before.
#[test]
fn a_template_that_was_set_aside_is_named_with_the_reason() {
    if !kvm_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (config, templates) = (
        folder.path().join("config"),
        folder.path().join("templates"),
    );
    let text = format!(
        "podvmm = {:?}\nkernel = '/dev/null'\ninitramfs = '/dev/null'\ntemplates = {templates:?}",
        tests::podvmm::binary()
    );
    std::fs::write(&config, text).unwrap();
    let template = || {
        let mut command = Command::new(tests::containerd::shim());
        let output = command.arg("template").arg("-config").arg(&config).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    let (code, said) = template();
    assert!(code == Some(1) && said.contains("boot the VM"), "{said}");

    let mut made = std::fs::read_dir(&templates).unwrap();
    let made = made.next().unwrap().unwrap().path();
    let (state, failures) = (made.join("state.json"), made.join("failures"));
    std::fs::write(&state, "{}").unwrap();
    let stamp = std::fs::metadata(&state).unwrap();
    let failure = serde_json::json!({
        "snapshot": {
            "path": state,
            "inode": stamp.ino(),
            "len": stamp.len(),
            "changed_s": stamp.ctime(),
            "changed_ns": stamp.ctime_nsec(),
        },
        "at_s": 1,
        "why": "it is cursed",
    });
    std::fs::write(&failures, format!("{failure}\n").repeat(2)).unwrap();
    let (code, said) = template();
    assert!(
        code == Some(0) && said.is_empty(),
        "two are too few: {said}"
    );
    std::fs::write(&failures, format!("{failure}\n").repeat(3)).unwrap();
    let (code, said) = template();
    let folder = made.display();
    let why = format!("template {folder} was set aside and is made anew: it is cursed");
    assert!(code == Some(1) && said.contains(&why), "{said}");
    assert!(said.contains("boot the VM"), "{said}");
    assert!(!state.exists() && !failures.exists());
}
