//! Where a container's things are put, whatever its image has there.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use protocol::agent::oci::{Mount, User};
use tests::pod::{Agent, SHARED, refusal, shell, spec, strings};

fn bind(source: &str, destination: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: format!("{SHARED}/{source}"),
        r#type: "bind".into(),
        options: strings(&["rbind", "ro"]),
    }
}

/// A working directory that is missing is made, root's; one that its user may not enter is entered.
pub(crate) fn working_directories_are_made_and_entered(agent: &Agent, host: &Path) {
    let rootfs = host.join("one/rootfs");
    let mut missing = spec("readlink /proc/self/cwd");
    missing.root.as_mut().unwrap().readonly = true;
    missing.process.as_mut().unwrap().cwd = "/not/there".into();
    let (out, err, status) = agent.run("missing-cwd", missing);
    assert_eq!((out.as_str(), status), ("/not/there\n", 0), "{err}");
    let made = fs::metadata(rootfs.join("not/there")).unwrap();
    assert_eq!((made.uid(), made.mode() & 0o777), (0, 0o755));

    let closed = rootfs.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let mut entered = spec("readlink /proc/self/cwd; id -u; ls 2>/dev/null || echo refused");
    let process = entered.process.as_mut().unwrap();
    process.cwd = "/closed".into();
    process.user = Some(User {
        uid: 1000,
        gid: 1000,
        ..User::default()
    });
    let (out, err, _) = agent.run("closed-cwd", entered);
    assert_eq!(out, "/closed\n1000\nrefused\n", "{err}");

    // For one more process none is made, as by runc.
    agent.create("exec-cwd", spec("exec sleep 1000")).unwrap();
    agent.start("exec-cwd").unwrap();
    let mut late = shell("true");
    late.cwd = "/no/such/folder".into();
    let (_, why) = refusal(agent.exec("exec-cwd", "late", late));
    assert!(why.starts_with("/no/such/folder: "), "{why}");
    agent.remove("exec-cwd");
    assert!(!rootfs.join("no").exists());
}

/// Links that point nowhere are followed below the container's root, and what is missing is made there.
pub(crate) fn dangling_links_lead_nowhere_outside(agent: &Agent, host: &Path) {
    let rootfs = host.join("one/rootfs");
    symlink(
        "../run/resolver/resolv.conf",
        rootfs.join("etc/resolv.conf"),
    )
    .unwrap();
    fs::create_dir(rootfs.join("var")).unwrap();
    symlink("/../../run/later", rootfs.join("var/run")).unwrap();
    symlink("b", rootfs.join("etc/a")).unwrap();
    symlink("a", rootfs.join("etc/b")).unwrap();
    let mut linked =
        spec("cat /etc/resolv.conf /var/run/inner/greeting; readlink /etc/resolv.conf");
    linked.mounts.extend([
        bind("greeting", "/etc/resolv.conf"),
        bind("greeting", "/var/run/inner/greeting"),
    ]);
    let (out, err, status) = agent.run("linked", linked);
    let expected = "hello\nhello\n../run/resolver/resolv.conf\n";
    assert_eq!((out.as_str(), status), (expected, 0), "{err}");
    assert!(rootfs.join("run/resolver/resolv.conf").is_file());
    assert!(rootfs.join("run/later/inner/greeting").is_file());

    let mut endless = spec("true");
    endless.mounts.push(bind("greeting", "/etc/a"));
    let (_, why) = refusal(agent.create("endless", endless));
    assert!(why.contains("symbolic links"), "{why}");
}

/// What hides paths is the null device, not what the image or a volume has in its place (the class of
/// CVE-2025-31133).
pub(crate) fn a_false_null_device_is_refused(agent: &Agent) {
    let mut false_null = spec("cat /proc/kcore");
    false_null.mounts.push(bind("greeting", "/dev/null"));
    let (_, why) = refusal(agent.create("false-null", false_null));
    assert!(why.contains("/dev/null"), "{why}");
}
