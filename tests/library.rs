//! The library as others use it: its examples, copied into a crate of its own outside the workspace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use tests::podvmm::kvm_is_here;
use tests::{Payload, code};

code!(
    hello,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, 0x68", // h
    "out dx, al",
    "mov al, 0x69", // i
    "out dx, al",
    "mov al, 0xfe",
    "out 0x64, al", // the reset line
    "1: hlt",
    "jmp 1b"
);
code!(spin, ".code32", "1: pause", "jmp 1b");

fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("tests is a folder of the workspace")
}

/// Writes a crate with the examples as its programs, and what the workspace has locked.
fn write_crate(folder: &Path) -> io::Result<()> {
    let workspace = workspace();
    let manifest = format!(
        "[package]\nname = \"outside\"\nedition = \"2024\"\n\n\
         [dependencies]\nvmm = {{ path = \"{}\" }}\n\n[workspace]\n",
        workspace.join("vmm").display()
    );
    fs::create_dir_all(folder.join("src/bin"))?;
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::copy(workspace.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    for example in fs::read_dir(workspace.join("vmm/examples"))? {
        let example = example?;
        let program = folder.join("src/bin").join(example.file_name());
        fs::copy(example.path(), program)?;
    }
    Ok(())
}

/// Builds the crate in `folder`, and returns the folder of its programs.
fn build(folder: &Path) -> PathBuf {
    // Of its own, since this workspace's may be locked, but kept for the next time.
    let target = workspace().join("target/outside");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--quiet"])
        .args(["--config", "profile.dev.debug=false"])
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(folder)
        .status();
    assert!(built.expect("cargo runs").success(), "it does not build");
    target.join("debug")
}

fn run(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("it was built");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("it prints text")
}

#[test]
fn the_examples_build_and_run_in_a_crate_outside() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().expect("there is a folder for temporary files");
    write_crate(folder.path()).expect("the folder can be written");
    let programs = build(folder.path());

    let hello = Payload::new(hello(), tests::payload::Protocol::Pvh);
    let printed = run(&programs.join("boot"), &hello.arguments()[1..]);
    assert_eq!(printed, "hi\nthe guest reset itself\n");

    let spin = Payload::new(spin(), tests::payload::Protocol::Pvh);
    let printed = run(&programs.join("boot"), &[spin.arguments()[1], "1"]);
    assert_eq!(printed, "\na client ended it\n");

    let snapshot = folder.path().join("snapshot");
    let to = snapshot
        .to_str()
        .expect("temporary folders have plain names");
    let printed = run(&programs.join("restore"), &[spin.arguments()[1], to]);
    let expected = "the first VM: a client ended it\n\
                    the second VM: a client ended it\n\
                    it had 1 vCPU and was Running\n";
    assert_eq!(printed, expected);
}
