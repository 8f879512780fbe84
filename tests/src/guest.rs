//! Linux in the guest: what is in it, and one at a time.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use tempfile::TempDir;

/// Boots come one after the other: an emulated one keeps a processor busy, and the host is compared
/// before and after.
pub fn one_at_a_time() -> Turn {
    static ONE_GUEST: Mutex<()> = Mutex::new(());
    let here = match ONE_GUEST.lock() {
        Ok(guard) => guard,
        // A test that failed does not fail the others.
        Err(poisoned) => poisoned.into_inner(),
    };
    let file = File::create(turns()).expect("there is a temporary folder");
    file.lock().expect("it is a file");
    Turn(here, file)
}

/// The file that is locked by the one on this host whose turn it is.
pub(crate) fn turns() -> PathBuf {
    std::env::temp_dir().join("podvmm.lock")
}

/// Among this process's tests, and all of this host's.
#[derive(Debug)]
#[expect(dead_code, reason = "they are held, not used")]
pub struct Turn(MutexGuard<'static, ()>, File);

/// The folder with the guest's kernel, initramfs and root file system.
pub fn folder() -> PathBuf {
    std::env::var_os("PODVMM_GUEST")
        .expect("PODVMM_GUEST names the guest's folder; resources/test sets it")
        .into()
}

/// How Linux finds its devices in tests: `PODVMM_TEST_TRANSPORT`, or what the guest's folder says of its kernel, or
/// `mmio`.
pub fn transport() -> String {
    let said = || fs::read_to_string(folder().join("transport")).unwrap_or_else(|_| "mmio".into());
    let transport = std::env::var("PODVMM_TEST_TRANSPORT").unwrap_or_else(|_| said());
    transport.trim_end().into()
}

/// A folder to boot from: busybox by the names given, `guest_load`, and places to mount on.
pub fn root(applets: &[&str]) -> TempDir {
    let root = TempDir::new().expect("there is a folder for temporary files");
    let at = |path: &str| root.path().join(path);
    for folder in [
        "bin", "dev", "proc", "sys", "run", "tmp", "etc", "mnt", "root",
    ] {
        fs::create_dir(at(folder)).expect("it is writable");
    }
    let busybox = folder().join("../busybox-static/bin/busybox");
    fs::copy(busybox, at("bin/busybox")).expect("the guest's build fetched it");
    for applet in applets {
        symlink("busybox", at("bin").join(applet)).expect("it is writable");
    }
    fs::copy(guest_load(), at("bin/guest_load")).expect("it was built");
    root
}

/// The static program with the guest's ends of transfers: `PODVMM_GUEST_LOAD`, or the one cargo builds.
pub fn guest_load() -> &'static Path {
    static TOOL: OnceLock<PathBuf> = OnceLock::new();
    TOOL.get_or_init(|| {
        if let Some(path) = std::env::var_os("PODVMM_GUEST_LOAD") {
            return path.into();
        }
        const TARGET: &str = "x86_64-unknown-linux-gnu";
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| workspace.join("target"), PathBuf::from)
            .join("guest");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "--package", "guest_load"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .current_dir(workspace)
            .status()
            .expect("cargo runs");
        assert!(status.success(), "guest_load does not build");
        target.join(TARGET).join("release/guest_load")
    })
}
