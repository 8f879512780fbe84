//! What is left in a jail. It is entered by a process of its own, this program once more.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, test_kill_process};
use tempfile::TempDir;

use super::*;

/// Names a folder for the process that is to enter the jail.
const FOLDER: &str = "PODVMM_TEST_JAIL";

/// A folder with something to read, to write, and to stay away from.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["read", "write", "other"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join("file"), name).unwrap();
    }
    folder
}

/// Runs the test `name` of this program in a process that finds `folder`.
fn apart(name: &str, folder: &Path) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("host::jail::tests::{name}"),
            "--nocapture",
            "--ignored",
        ])
        .env(FOLDER, folder)
        .current_dir(folder)
        .output()
        .unwrap()
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: only root makes namespaces");
    }
    is_root
}

/// Enters the jail of the folder that the environment names, with a path that is not there yet.
fn enter_as_told() -> PathBuf {
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let paths = [
        HostPath::read("read".as_ref()),
        HostPath::write(&folder.join("write")),
        HostPath::write(&folder.join("write/later")),
        HostPath::read(&folder.join("missing")),
        HostPath::write("/dev/stderr".as_ref()),
    ];
    enter(Wanted::Required, &paths).unwrap();
    folder
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside() {
    let outside = Pid::from_raw(std::process::id().cast_signed()).unwrap();
    let folder = enter_as_told();
    let read = |path: &Path| fs::read_to_string(path).map_err(|error| error.kind());
    // What it was given is where it was, and can be done what it was given for.
    assert_eq!(read(&folder.join("read/file")).as_deref(), Ok("read"));
    assert_eq!(read("read/file".as_ref()).as_deref(), Ok("read"));
    fs::write(folder.join("write/later"), "now").unwrap();
    fs::rename(folder.join("write/file"), folder.join("write/moved")).unwrap();
    std::os::unix::fs::chown(folder.join("write/moved"), Some(7), Some(8)).unwrap();
    for refused in [
        fs::write(folder.join("read/file"), "x"),
        fs::write(folder.join("read/new"), "x"),
        fs::write(folder.join("beside"), "x"),
        fs::write("/beside", "x"),
    ] {
        let kind = refused.unwrap_err().kind();
        let known = [ErrorKind::ReadOnlyFilesystem, ErrorKind::PermissionDenied];
        assert!(known.contains(&kind), "{kind:?}");
    }
    // Also what is mounted below it, whatever Landlock says.
    let below = rustix::fs::statvfs(folder.join("read/inner")).unwrap();
    assert!(below.f_flag.contains(StatVfsMountFlags::RDONLY));
    File::options().append(true).open("/dev/stderr").unwrap();
    // Nothing else is there.
    for path in [
        "/etc/passwd",
        "/usr",
        "/sys/kernel",
        "/dev/null",
        "/dev/mem",
        "/proc/sys/kernel/core_pattern",
    ] {
        assert_eq!(read(path.as_ref()), Err(ErrorKind::NotFound), "{path}");
    }
    assert_eq!(read(&folder.join("other/file")), Err(ErrorKind::NotFound));
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    // No device can be made, nor anything run.
    let device = rustix::fs::makedev(1, 1);
    let made = mknodat(
        CWD,
        folder.join("write/mem"),
        FileType::CharacterDevice,
        Mode::RUSR,
        device,
    );
    assert!(matches!(made, Err(Errno::PERM | Errno::ACCESS)), "{made:?}");
    // No mount, no way back.
    let mounted = mount(
        "none",
        folder.join("write"),
        "tmpfs",
        MountFlags::empty(),
        None,
    );
    assert_eq!(mounted, Err(Errno::PERM));
    assert_eq!(unmount("/proc", UnmountFlags::DETACH), Err(Errno::PERM));
    assert_eq!(rustix::process::chroot("write"), Err(Errno::PERM));
    #[expect(deprecated, reason = "it is refused")]
    let unshared = rustix::thread::unshare(UnshareFlags::NEWNS);
    assert_eq!(unshared, Err(Errno::PERM));
    // No process of the host's.
    assert!(rustix::process::getpid().is_init());
    assert_eq!(test_kill_process(outside), Err(Errno::SRCH));
    let capabilities = rustix::thread::capabilities(None).unwrap();
    assert_eq!(
        capabilities.permitted,
        needed(&[HostPath::write("write".as_ref())])
    );
    // By the number of a file, one could open what is outside the share.
    assert!(
        !capabilities
            .permitted
            .contains(CapabilitySet::DAC_READ_SEARCH)
    );
    assert!(rustix::thread::no_new_privs().unwrap());
    println!("all of it was tried");
}

#[test]
fn a_jail_has_what_it_was_given_and_nothing_else() {
    if !is_root() {
        return;
    }
    let folder = folder();
    let inner = folder.path().join("read/inner");
    fs::create_dir(&inner).unwrap();
    mount("podvmm-test", &inner, "tmpfs", MountFlags::empty(), None).unwrap();
    let output = apart("inside", folder.path());
    unmount(&inner, UnmountFlags::DETACH).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("all of it was tried"), "{output:?}");
    let written = folder.path().join("write/later");
    assert_eq!(fs::read_to_string(&written).unwrap(), "now");
    assert_eq!(
        fs::metadata(folder.path().join("write/moved"))
            .unwrap()
            .uid(),
        7
    );
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn ends_with_seven() {
    enter_as_told();
    // SAFETY: it ends the process.
    unsafe { libc::_exit(7) }
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn ends_by_a_signal() {
    enter_as_told();
    File::open("read/file").unwrap();
    let own = rustix::process::getpid();
    // The first process of a namespace ignores what it has no handler for, but from outside.
    let killed = rustix::process::kill_process(own, Signal::KILL);
    assert_eq!(killed, Ok(()));
    // SAFETY: it ends the process by SIGSEGV, which the kernel does not let it ignore.
    unsafe { std::ptr::null_mut::<u8>().write_volatile(0) }
}

#[test]
fn the_process_outside_has_the_outcome_of_the_one_inside() {
    if !is_root() {
        return;
    }
    let folder = folder();
    assert_eq!(
        apart("ends_with_seven", folder.path()).status.code(),
        Some(7)
    );
    let code = apart("ends_by_a_signal", folder.path()).status.code();
    assert!(matches!(code, Some(129..)), "{code:?}");
}

#[test]
fn a_share_that_is_read_takes_less_than_one_that_is_written() {
    let (read, write) = (HostPath::read("/".as_ref()), HostPath::write("/".as_ref()));
    assert_eq!(needed(&[]), CapabilitySet::empty());
    assert_eq!(
        needed(&[HostPath::write("/dev/kvm".as_ref())]),
        CapabilitySet::empty()
    );
    assert_eq!(needed(&[read]), CapabilitySet::DAC_OVERRIDE);
    assert!(needed(&[write]).contains(CapabilitySet::CHOWN));
    let tun = HostPath::write("/dev/net/tun".as_ref());
    assert_eq!(needed(&[tun]), CapabilitySet::NET_ADMIN);
}
