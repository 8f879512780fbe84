//! Where a container's things are put, whatever its image has there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use agent::protocol::oci::Mount;
use tests::pod::{Agent, SHARED, refusal, spec, strings};

fn bind(source: &str, destination: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: format!("{SHARED}/{source}"),
        r#type: "bind".into(),
        options: strings(&["rbind", "ro"]),
    }
}

/// Links that point nowhere are followed below the container's root, and what is missing is made there.
pub(crate) fn dangling_links(agent: &Agent, host: &Path) {
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
