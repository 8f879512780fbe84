//! What is left in a jail. It is entered by a process of its own, this program once more.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, mknodat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{
    Pid, Signal, dumpable_behavior, parent_process_death_signal, set_parent_process_death_signal,
    test_kill_process,
};
use tempfile::TempDir;

use super::*;

/// Names a folder for the process that is to enter the jail.
const FOLDER: &str = "PODVMM_TEST_JAIL";

/// The user that some of them are.
const USER: &str = "7777:7778";

/// A folder with something to read, to write, to make sockets in, and to stay away from.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["read", "write", "sockets", "other"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join("file"), name).unwrap();
    }
    let device = rustix::fs::makedev(1, 3);
    let null = folder.path().join("write/null");
    // Another user than root makes none.
    let _ = mknodat(CWD, null, FileType::CharacterDevice, Mode::RUSR, device);
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
fn enter_as_told(user: Option<&str>) -> PathBuf {
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let paths = [
        HostPath::read("read".as_ref()),
        HostPath::write(&folder.join("write")),
        HostPath::write(&folder.join("write/later")),
        HostPath::sockets(&folder.join("sockets")),
        HostPath::read(&folder.join("missing")),
        HostPath::write("/dev/stderr".as_ref()),
        HostPath::write("/dev/kvm".as_ref()),
    ];
    enter(&required(user), &paths).unwrap();
    folder
}

fn required(user: Option<&str>) -> Jail {
    Jail {
        wanted: Wanted::Required,
        user: user.map(|user| User::parse(user).unwrap()),
        labels: Vec::new(),
    }
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside() {
    let outside = Pid::from_raw(std::process::id().cast_signed()).unwrap();
    let folder = enter_as_told(None);
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
    // And what the host mounts later is not seen.
    let mounts = read("/proc/self/mountinfo".as_ref()).unwrap();
    let of_tree = mounts
        .lines()
        .filter(|line| line.contains(folder.to_str().unwrap()));
    let hears = |line: &str| line.contains(" master:") || line.contains(" shared:");
    assert!(of_tree.clone().count() >= 4, "{mounts}");
    of_tree.for_each(|line| assert!(!hears(line), "{line}"));
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
    // Only /dev has devices. Nothing is run.
    let null = File::open(folder.join("write/null"));
    assert_eq!(null.unwrap_err().kind(), ErrorKind::PermissionDenied);
    for place in ["read", "write", "sockets", "read/inner"] {
        let flags = rustix::fs::statvfs(folder.join(place)).unwrap().f_flag;
        let none = StatVfsMountFlags::NODEV | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NOEXEC;
        assert!(flags.contains(none), "{place}: {flags:?}");
    }
    let devices = fs::read_dir("/dev").unwrap_err();
    assert_eq!(devices.kind(), ErrorKind::PermissionDenied, "by Landlock");
    // No device can be made.
    let device = rustix::fs::makedev(1, 1);
    let made = mknodat(
        CWD,
        folder.join("write/mem"),
        FileType::CharacterDevice,
        Mode::RUSR,
        device,
    );
    assert!(matches!(made, Err(Errno::PERM | Errno::ACCESS)), "{made:?}");
    // But what an overlay in the guest puts where a file was.
    let whiteout = folder.join("write/whiteout");
    let kind = FileType::CharacterDevice;
    assert_eq!(mknodat(CWD, whiteout, kind, Mode::RUSR, 0), Ok(()));
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
    mount_change(&inner, MountPropagationFlags::SHARED).unwrap();
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

/// Who the process is, for the kernel and for files.
fn identity() -> [u32; 6] {
    let (user, group) = devices::host::user_of_files();
    [
        rustix::process::getuid().as_raw(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getgid().as_raw(),
        rustix::process::getegid().as_raw(),
        user,
        group,
    ]
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside_as_another_user() {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let folder = enter_as_told(Some(USER));
    assert_eq!(identity(), [7777, 7777, 7778, 7778, 0, 0]);
    // Which of the signals it was: that of the process outside.
    assert_eq!(parent_process_death_signal(), Ok(Some(Signal::KILL)));
    assert_eq!(
        dumpable_behavior(),
        Ok(DumpableBehavior::NotDumpable),
        "whatever the host says of those that change their user"
    );
    // Files are as they are for root: also those that it makes.
    fs::write(folder.join("write/later"), "now").unwrap();
    std::os::unix::fs::chown(folder.join("write/file"), Some(7), Some(8)).unwrap();
    assert_eq!(fs::metadata(folder.join("write/later")).unwrap().uid(), 0);
    let threads = std::thread::spawn(identity).join().unwrap();
    assert_eq!(threads, identity());
    // No way back.
    let root = rustix::process::Uid::ROOT;
    let back = rustix::thread::set_thread_res_uid(root, root, root);
    assert_eq!(back, Err(Errno::PERM));
    let capabilities = rustix::thread::capabilities(None).unwrap();
    let expected = needed(&[HostPath::write("write".as_ref())]);
    assert_eq!(
        (capabilities.effective, capabilities.permitted),
        (expected, expected)
    );
    println!("all of it was tried");
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside_with_files_alone() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let paths = [
        HostPath::read(&folder.join("read/file")),
        HostPath::write(&folder.join("own/file")),
        HostPath::sockets(&folder.join("own")),
        HostPath::write("/dev/kvm".as_ref()),
    ];
    enter(&required(Some(USER)), &paths).unwrap();
    assert_eq!(identity(), [7777, 7777, 7778, 7778, 7777, 7778]);
    let capabilities = rustix::thread::capabilities(None).unwrap();
    assert_eq!(capabilities.permitted, CapabilitySet::empty());
    File::open(folder.join("read/file")).unwrap();
    let mut own = File::options();
    own.write(true).open(folder.join("own/file")).unwrap();
    std::os::unix::net::UnixListener::bind(folder.join("own/socket")).unwrap();
    println!("all of it was tried");
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside_with_a_file_of_roots() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let file = folder.join("own/secret");
    enter(&required(Some(USER)), &[HostPath::read(&file)]).unwrap();
    assert_eq!(identity(), [7777, 7777, 7778, 7778, 0, 0]);
    let capabilities = rustix::thread::capabilities(None).unwrap();
    assert_eq!(capabilities.permitted, CapabilitySet::DAC_OVERRIDE);
    File::open(file).unwrap();
    println!("all of it was tried");
}

#[test]
fn a_jail_may_be_of_another_user() {
    if !is_root() {
        return;
    }
    let folder = folder();
    let (own, kvm) = (folder.path().join("own"), "/dev/kvm");
    fs::create_dir(&own).unwrap();
    fs::write(own.join("file"), "own").unwrap();
    fs::write(own.join("secret"), "root's").unwrap();
    fs::set_permissions(own.join("secret"), Permissions::from_mode(0o600)).unwrap();
    for path in [own.clone(), own.join("file")] {
        std::os::unix::fs::chown(path, Some(7777), Some(7778)).unwrap();
    }
    let mut tests = vec!["inside_as_another_user", "inside_with_a_file_of_roots"];
    match fs::metadata(kvm).unwrap() {
        file if file.mode() & 0o006 == 0o006 || file.gid() != 0 => {
            tests.push("inside_with_files_alone");
        }
        _ => eprintln!("SKIPPED: {kvm} is root's alone, so no user does without capabilities"),
    }
    for name in tests {
        let output = apart(name, folder.path());
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(said.contains("all of it was tried"), "{output:?}");
    }
}

/// What a thread is asked to do, and whether it could.
fn attempts(folder: &Path) -> [Result<(), ErrorKind>; 5] {
    let kind = |error: io::Error| error.kind();
    [
        File::open(folder.join("read/file")).map(drop),
        fs::remove_file(folder.join("sockets/socket")),
        fs::remove_file(folder.join("write/file")),
        fs::write(folder.join("write/new"), "x"),
        // A file and not a folder of the VM's.
        File::open("/dev/kvm").map(drop),
    ]
    .map(|result| result.map_err(kind))
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn inside_a_thread() {
    use crate::host::thread::Kind;
    let folder = enter_as_told(None);
    let socket = folder.join("sockets/socket");
    let attempts = |kind: Kind| {
        drop(std::os::unix::net::UnixListener::bind(&socket));
        fs::write(folder.join("write/file"), "write").unwrap();
        let folder = folder.clone();
        let builder = std::thread::Builder::new();
        // There is no filter that would end it.
        let thread = kind.spawn(builder, move || attempts(&folder)).unwrap();
        thread.join().unwrap()
    };
    let no = Err(ErrorKind::PermissionDenied);
    for kind in [Kind::Control, Kind::Snapshot] {
        assert_eq!(attempts(kind), [Ok(()); 5], "{kind:?}");
    }
    let of_a_share = [Ok(()), no, Ok(()), Ok(()), no];
    assert_eq!(attempts(Kind::Files), of_a_share);
    use Kind::{Api, Console, Disk, Io, Memory, PageServer, Pages, Signals, Vcpu};
    for kind in [Api, Io, Console, Signals, PageServer] {
        assert_eq!(attempts(kind), [no, Ok(()), no, no, no], "{kind:?}");
    }
    for kind in [Vcpu, Disk, Memory, Pages] {
        assert_eq!(attempts(kind), [no; 5], "{kind:?}");
    }
    println!("all of it was tried");
}

#[test]
fn a_thread_opens_what_its_work_needs() {
    if !is_root() {
        return;
    }
    let folder = folder();
    let output = apart("inside_a_thread", folder.path());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("all of it was tried"), "{output:?}");
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn ends_with_seven() {
    enter_as_told(None);
    // SAFETY: it ends the process.
    unsafe { libc::_exit(7) }
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn ends_by_a_signal() {
    enter_as_told(None);
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
#[ignore = "another test runs it, in a process of its own"]
fn inside_with_a_label() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let jail = Jail {
        labels: vec![Label::parse("apparmor=podvmm-test-no-such-profile").unwrap()],
        ..required(None)
    };
    let refused = enter(&jail, &[HostPath::read(&folder.join("read"))]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "--jail: have the label that it is given"
    );
    // The host has no such profile, or no AppArmor.
    assert!(refused.source.raw_os_error().is_some(), "{refused:?}");
    println!("all of it was tried");
}

#[test]
fn a_label_that_cannot_be_had_is_said() {
    if !is_root() {
        return;
    }
    let folder = folder();
    let output = apart("inside_with_a_label", folder.path());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("all of it was tried"), "{output:?}");
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
    // Whether one of another user's is needed is asked when it is known whom the process is.
    let sockets = HostPath::sockets("/".as_ref());
    assert_eq!(needed(&[sockets]), CapabilitySet::empty());
    let tun = HostPath::write("/dev/net/tun".as_ref());
    assert_eq!(needed(&[tun]), CapabilitySet::NET_ADMIN);
}
